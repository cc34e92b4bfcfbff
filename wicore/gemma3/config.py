"""Hyper-parameters of a Gemma 3 model, and those of the published ones.

The architecture is that of the Gemma 3 technical report (Gemma Team, 2025, arXiv:2503.19786).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["global", "window"]


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
