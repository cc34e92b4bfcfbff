"""Hyper-parameters of a Gemma 3 text model.

The architecture is that of the Gemma 3 technical report (Gemma Team, 2025, arXiv:2503.19786); file
forms and defaults are those of Hugging Face transformers' `Gemma3TextConfig`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wicore.errors import CheckpointError

LayerKind = Literal["global", "window"]
Parsed = TypeVar("Parsed", bound=BaseModel)


def alternating_layers(layers: int, pattern: int = 6) -> tuple[LayerKind, ...]:
    """Every `pattern`-th layer is global, the others see a window."""
    return tuple("window" if (i + 1) % pattern else "global" for i in range(layers))


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Shape of a vision tower (SigLIP, arXiv:2303.15343), and how a prompt holds images."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    image_size: int
    """Side of the square image, in pixels."""
    patch_size: int
    tokens: int
    """Tokens that an image takes in a prompt, between the start and the end token."""
    layer_norm_eps: float
    start_token_id: int
    end_token_id: int
    soft_token_id: int
    """What a prompt shows to people at an image's tokens."""

    @property
    def patches(self) -> int:
        """Of an image."""
        return (self.image_size // self.patch_size) ** 2

    def tensor_shapes(self, text_hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of the tower and of the projector to a text model of that hidden size, by canonical
        name; [out, in] for matrices, but [in, out] for the projection."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "vision_tower.embeddings.patch_embedding.weight": (hidden, 3, self.patch_size, self.patch_size),
            "vision_tower.embeddings.patch_embedding.bias": (hidden,),
            "vision_tower.embeddings.position_embedding.weight": (self.patches, hidden),
            "vision_tower.post_layernorm.weight": (hidden,),
            "vision_tower.post_layernorm.bias": (hidden,),
            "multi_modal_projector.mm_soft_emb_norm.weight": (hidden,),
            "multi_modal_projector.mm_input_projection_weight": (hidden, text_hidden),
        }
        weights: dict[str, tuple[int, ...]] = {
            "layer_norm1": (hidden,),
            "layer_norm2": (hidden,),
            **{f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")},
            "mlp.fc1": (inner, hidden),
            "mlp.fc2": (hidden, inner),
        }
        for i in range(self.layers):
            for name, shape in weights.items():
                prefix = f"vision_tower.encoder.layers.{i}.{name}"
                shapes |= {f"{prefix}.weight": shape, f"{prefix}.bias": shape[:1]}
        return shapes


@dataclass(frozen=True, slots=True)
class Gemma3Config:
    """One model's shape. Counts are of elements or tokens, never bytes."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    """Longest sequence the model was made for, in tokens."""
    sliding_window: int
    """A query at position q of a window layer sees positions > q - sliding_window."""
    layer_kinds: tuple[LayerKind, ...]
    query_pre_attn_scalar: float
    """Attention scores are scaled by this to the power -0.5; it need not be head_dim."""
    rope_scale: float = 1.0
    """Linear factor that positions of global layers are divided by; 1 is none."""
    rope_theta: float = 1_000_000.0
    """RoPE base of global layers."""
    rope_local_theta: float = 10_000.0
    """RoPE base of window layers."""
    rms_norm_eps: float = 1e-6
    bos_token_id: int = 2
    eos_token_id: int = 1
    stop_token_ids: tuple[int, ...] = (1,)
    """Ids that end a text: eos and what generation_config.json adds (<end_of_turn> for chat models)."""
    vision: VisionConfig | None = None
    """None: the model takes text alone."""

    @property
    def global_layers(self) -> int:
        return self.layer_kinds.count("global")

    @property
    def window_layers(self) -> int:
        return self.layer_kinds.count("window")

    @property
    def parameters(self) -> int:
        """Weights of the text model; the tied output head counts once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def kv_elements(self, context: int, *, windowed: bool = True) -> int:
        """Elements of K and V together for one sequence of `context` tokens.

        `windowed` keeps only the window on window layers; otherwise every layer keeps all positions.
        """
        seen = min(context, self.sliding_window) if windowed else context
        positions = self.global_layers * context + self.window_layers * seen
        return 2 * self.kv_heads * self.head_dim * positions

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the text model by its canonical (Hugging Face) name; [out, in] for matrices."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "post_attention_layernorm": (hidden,),
            "pre_feedforward_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "post_feedforward_layernorm": (hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        return shapes

    def vision_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the vision tower and its projector by canonical name; empty without a tower."""
        return {} if self.vision is None else self.vision.tensor_shapes(self.hidden_size)

    @classmethod
    def from_hf(cls, folder: Path) -> Gemma3Config:
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

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The config.json of a text-only checkpoint, in the keys that transformers 4 and 5 both read."""
        scaling = None if self.rope_scale == 1 else {"rope_type": "linear", "factor": self.rope_scale}
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "torch_dtype": dtype,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_context,
            "sliding_window": self.sliding_window,
            "layer_types": [
                "full_attention" if kind == "global" else "sliding_attention" for kind in self.layer_kinds
            ],
            # A whole number as such: newer transformers refuse another type.
            "query_pre_attn_scalar": _plain(self.query_pre_attn_scalar),
            "rope_theta": self.rope_theta,
            "rope_local_base_freq": self.rope_local_theta,
            "rope_scaling": scaling,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": 0,
        }


def _plain(value: float) -> float:
    """Whole numbers as int, as JSON files hold them."""
    return int(value) if float(value).is_integer() else value


# --- the published models -----------------------------------------------------------------------


def _published(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, *, head_dim: int = 256,
    query_scalar: float = 256, long: bool = True,
) -> Gemma3Config:  # fmt: skip
    """`long`: the sizes of 4B and up, with images, 128k context and RoPE factor 8 on global layers."""
    return Gemma3Config(
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=262_208 if long else 262_144,
        max_context=131_072 if long else 32_768,
        sliding_window=1024 if long else 512,
        layer_kinds=alternating_layers(layers),
        query_pre_attn_scalar=query_scalar,
        rope_scale=8.0 if long else 1.0,
        stop_token_ids=(1, 106),
        vision=PUBLISHED_VISION if long else None,
    )


PUBLISHED_VISION = VisionConfig(
    hidden_size=1152,
    layers=27,
    heads=16,
    intermediate_size=4304,
    image_size=896,
    patch_size=14,
    tokens=256,
    layer_norm_eps=1e-6,
    start_token_id=255_999,
    end_token_id=256_000,
    soft_token_id=262_144,
)
"""The tower that all published sizes with images have in common."""

PUBLISHED: Mapping[str, Gemma3Config] = {
    "gemma-3-270m": _published(640, 18, 4, 1, 2048, long=False),
    "gemma-3-1b": _published(1152, 26, 4, 1, 6912, long=False),
    "gemma-3-4b": _published(2560, 34, 8, 4, 10_240),
    "gemma-3-12b": _published(3840, 48, 16, 8, 15_360),
    "gemma-3-27b": _published(5376, 62, 32, 16, 21_504, head_dim=128, query_scalar=168),
}
"""Hyper-parameters of the models Google published, pretrained and instruction-tuned alike."""


def published(name: str) -> Gemma3Config | None:
    """The configuration of a published model; `-it` and `-pt` variants share their size's."""
    return PUBLISHED.get(name.removesuffix("-it").removesuffix("-pt"))


# --- config.json --------------------------------------------------------------------------------

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_TokenId = Annotated[int, Field(ge=0)]


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
