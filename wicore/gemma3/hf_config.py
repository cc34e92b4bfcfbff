"""Hugging Face's config.json to hyper-parameters, and back.

Forms and defaults are those of transformers' `Gemma3TextConfig` and `Gemma3Config`, versions 4 and 5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wicore.errors import CheckpointError
from wicore.gemma3.config import Gemma3Config, LayerKind, VisionConfig, alternating_layers

Parsed = TypeVar("Parsed", bound=BaseModel)
_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_TokenId = Annotated[int, Field(ge=0)]


def config_of_folder(folder: Path) -> Gemma3Config:
    """Read config.json and, where present, generation_config.json of a checkpoint folder.

    Text-only (`gemma3_text`) and multimodal (`gemma3`) layouts, in the key styles of transformers
    4 and 5. Absent keys take the defaults of transformers' Gemma3TextConfig, as published
    multimodal checkpoints rely on. Raises CheckpointError saying what was expected and found.
    """
    path = folder / "config.json"
    data = read_json(path)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return config_from_hf(data, generation, source=str(path))


def config_to_hf(config: Gemma3Config, dtype: str) -> dict[str, Any]:
    """The config.json of a text-only checkpoint, in the keys that transformers 4 and 5 both read."""
    scaling = None if config.rope_scale == 1 else {"rope_type": "linear", "factor": config.rope_scale}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "torch_dtype": dtype,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "sliding_window": config.sliding_window,
        "layer_types": [
            "full_attention" if kind == "global" else "sliding_attention" for kind in config.layer_kinds
        ],
        # A whole number as such: newer transformers refuse another type.
        "query_pre_attn_scalar": _plain(config.query_pre_attn_scalar),
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": 0,
    }


def _plain(value: float) -> float:
    """Whole numbers as int, as JSON files hold them."""
    return int(value) if float(value).is_integer() else value


# --- what the file holds ------------------------------------------------------------------------


class _Ends(BaseModel):
    eos_token_id: _TokenId | list[_TokenId] | None = None

    def ids(self) -> list[int]:
        value = self.eos_token_id
        return [] if value is None else value if isinstance(value, list) else [value]


class _Rope(BaseModel):
    model_config = ConfigDict(extra="allow")

    rope_type: str | None = None
    type: str | None = None  # the key before transformers 4.43
    rope_theta: _Positive | None = None
    factor: _Positive = 1.0

    def linear_factor(self) -> float | None:
        """1 for plain RoPE, the factor for linear scaling, None for a kind Gemma 3 does not use."""
        kind = self.rope_type or self.type or "default"
        return {"default": 1.0, "linear": self.factor}.get(kind)


class _RopeByLayer(BaseModel):
    model_config = ConfigDict(extra="forbid")  # one flat set for all layers is another model's

    full_attention: _Rope | None = None
    sliding_attention: _Rope | None = None


class _HfText(_Ends):
    """transformers' Gemma3TextConfig: the keys that matter here, with its defaults."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: _Count = 262_208
    hidden_size: _Count = 2304
    intermediate_size: _Count = 9216
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)] = 26
    num_attention_heads: _Count = 8
    num_key_value_heads: _Count = 4
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 256
    max_position_embeddings: _Count = 131_072
    rms_norm_eps: _Positive = 1e-6
    query_pre_attn_scalar: _Positive = 256
    sliding_window: _Count = 4096
    sliding_window_pattern: _Count = 6
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    rope_theta: _Positive = 1_000_000.0
    rope_local_base_freq: _Positive = 10_000.0
    rope_scaling: _Rope | None = None
    rope_parameters: _RopeByLayer | None = None
    bos_token_id: _TokenId | None = None
    # What no published Gemma 3 uses; another value would silently change the text.
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: Literal[False] = False
    attn_logit_softcapping: None = None
    final_logit_softcapping: None = None
    use_bidirectional_attention: Literal[False] | None = None
    tie_word_embeddings: Literal[True] = True


class _HfVision(BaseModel):
    """transformers' SiglipVisionConfig: the keys that matter here, with its defaults."""

    model_config = ConfigDict(extra="ignore")

    hidden_size: _Count = 768
    intermediate_size: _Count = 3072
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)] = 12
    num_attention_heads: _Count = 12
    image_size: _Count = 224
    patch_size: _Count = 16
    layer_norm_eps: _Positive = 1e-6
    # What no published Gemma 3 uses; another value would silently change what is seen.
    num_channels: Literal[3] = 3
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"


class _HfImages(BaseModel):
    """How a prompt holds images: keys of transformers' Gemma3Config beside its two parts."""

    model_config = ConfigDict(extra="ignore")

    mm_tokens_per_image: _Count = 256
    boi_token_index: _TokenId = 255_999
    eoi_token_index: _TokenId = 256_000
    image_token_index: _TokenId = 262_144


def config_from_hf(
    data: Mapping[str, Any], generation: Mapping[str, Any], *, source: str = "config.json"
) -> Gemma3Config:
    """Gemma3Config from the parsed config.json and generation_config.json (may be empty).

    A multimodal layout without `vision_config` is a text model. Raises CheckpointError naming `source`, the
    key, what was expected and what was found.
    """
    kind = data.get("model_type")
    if kind == "gemma3":
        text_data = {"tie_word_embeddings": data.get("tie_word_embeddings", True)}
        text_data |= _mapping(data.get("text_config"), f"{source}: text_config")
    elif kind == "gemma3_text":
        text_data = dict(data)
    else:
        raise CheckpointError(
            f"{source}: expected model_type 'gemma3' or 'gemma3_text', found {kind!r}; "
            "WiCore serves Gemma 3 only"
        )
    text = _validated(_HfText, text_data, source)
    global_rope, rope_scale, local_theta = _rope(text, source)
    generation_source = str(Path(source).with_name("generation_config.json"))
    ends = (_validated(_Ends, generation, generation_source), _validated(_Ends, data, source), text)
    stop_ids = tuple(dict.fromkeys(i for end in ends for i in end.ids())) or (1,)
    return Gemma3Config(
        hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        max_context=text.max_position_embeddings,
        sliding_window=text.sliding_window,
        layer_kinds=_layer_kinds(text, source),
        query_pre_attn_scalar=text.query_pre_attn_scalar,
        rope_scale=rope_scale,
        rope_theta=global_rope,
        rope_local_theta=local_theta,
        rms_norm_eps=text.rms_norm_eps,
        bos_token_id=2 if text.bos_token_id is None else text.bos_token_id,
        eos_token_id=stop_ids[0],
        stop_token_ids=stop_ids,
        vision=_vision(data, text, source) if kind == "gemma3" else None,
    )


def _vision(data: Mapping[str, Any], text: _HfText, source: str) -> VisionConfig | None:
    found = data.get("vision_config")
    if found is None:
        return None
    where = f"{source}: vision_config"
    tower = _validated(_HfVision, _mapping(found, where), where)
    images = _validated(_HfImages, data, source)
    if tower.hidden_size % tower.num_attention_heads:
        raise CheckpointError(
            f"{where}: hidden_size: expected a multiple of num_attention_heads "
            f"({tower.num_attention_heads}), found {tower.hidden_size}"
        )
    if tower.image_size % tower.patch_size:
        raise CheckpointError(
            f"{where}: image_size: expected a multiple of patch_size ({tower.patch_size}), "
            f"found {tower.image_size}"
        )
    across, tokens = tower.image_size // tower.patch_size, images.mm_tokens_per_image
    side = math.isqrt(tokens)
    if side**2 != tokens or across % side or tokens > text.sliding_window:
        raise CheckpointError(
            f"{source}: mm_tokens_per_image: expected the square of a divisor of {across}, the patches "
            f"across an image, and at most sliding_window ({text.sliding_window}), found {tokens}"
        )
    return VisionConfig(
        hidden_size=tower.hidden_size,
        layers=tower.num_hidden_layers,
        heads=tower.num_attention_heads,
        intermediate_size=tower.intermediate_size,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        tokens=tokens,
        layer_norm_eps=tower.layer_norm_eps,
        start_token_id=images.boi_token_index,
        end_token_id=images.eoi_token_index,
        soft_token_id=images.image_token_index,
    )


def _layer_kinds(text: _HfText, source: str) -> tuple[LayerKind, ...]:
    if text.num_attention_heads % text.num_key_value_heads:
        raise CheckpointError(
            f"{source}: num_attention_heads: expected a multiple of num_key_value_heads "
            f"({text.num_key_value_heads}), found {text.num_attention_heads}"
        )
    if text.layer_types is None:
        return alternating_layers(text.num_hidden_layers, text.sliding_window_pattern)
    if len(text.layer_types) != text.num_hidden_layers:
        raise CheckpointError(
            f"{source}: layer_types: expected num_hidden_layers ({text.num_hidden_layers}) entries, "
            f"found {len(text.layer_types)}"
        )
    return tuple("global" if kind == "full_attention" else "window" for kind in text.layer_types)


def _rope(text: _HfText, source: str) -> tuple[float, float, float]:
    """(theta of global layers, their linear factor, theta of window layers)."""
    by_layer = text.rope_parameters or _RopeByLayer()
    full = text.rope_scaling or by_layer.full_attention or _Rope()
    local = by_layer.sliding_attention or _Rope()
    factor = full.linear_factor()
    if factor is None or local.linear_factor() != 1:
        raise CheckpointError(
            f"{source}: RoPE: expected 'default' or 'linear' for full_attention and 'default' for "
            f"sliding_attention, found {full.model_dump(exclude_none=True)} and "
            f"{local.model_dump(exclude_none=True)}"
        )
    full_theta = (by_layer.full_attention or _Rope()).rope_theta
    return full_theta or text.rope_theta, factor, local.rope_theta or text.rope_local_base_freq


def _validated(model: type[Parsed], data: Mapping[str, Any], source: str) -> Parsed:
    try:
        return model.model_validate(data)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{source}: {key}: expected: {first['msg']}; found {first.get('input')!r}"
        ) from None


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: expected a JSON object, found {value!r}")
    return value


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file."""
    try:
        return _mapping(json.loads(path.read_text("utf-8")), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a JSON file, found none") from None
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: expected readable JSON, found: {err}") from None
