"""What a model is made of and what it needs: a report for people and scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from wicore.gemma3.config import Gemma3Config

WEIGHT_BITS: Mapping[str, float] = {
    "float32": 32,
    "bfloat16": 16,
    # Symmetric blocks of 32 weights with one float32 scale each, as MatMulNBits stores them.
    "int8": 8 + 32 / 32,
    "int4": 4 + 32 / 32,
}
"""Bits a weight in each format, scales included."""

KV_ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
CONTEXTS = (1024, 8192, 32_768, 131_072)


@dataclass(frozen=True, slots=True)
class KVMemory:
    """Bytes of K and V of one sequence."""

    context: int
    dtype: str
    windowed: int
    """Window layers keep their window only."""
    all_positions: int
    """Every layer keeps every position."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `inspect` found. Bytes throughout."""

    name: str
    config: Gemma3Config
    stored_as: str | None
    """Element type of the checkpoint's weights; None when only the hyper-parameters are known."""
    fingerprint: str | None
    parameters: int
    embedding_parameters: int
    weights: Mapping[str, int]
    """Of the text model, by format of WEIGHT_BITS; norms and the like count as if quantised too."""
    vision_parameters: int
    """Of the vision tower and its projector; 0 where the model takes text alone."""
    kv: tuple[KVMemory, ...]


def inspect(
    name: str, config: Gemma3Config, *, stored_as: str | None = None, fingerprint: str | None = None
) -> Report:
    """The report of a model. Contexts beyond the model's own are left out. Pure."""
    contexts = [context for context in CONTEXTS if context < config.max_context] + [config.max_context]
    return Report(
        name=name,
        config=config,
        stored_as=stored_as,
        fingerprint=fingerprint,
        parameters=config.parameters,
        embedding_parameters=config.vocab_size * config.hidden_size,
        weights={dtype: round(config.parameters * bits / 8) for dtype, bits in WEIGHT_BITS.items()},
        vision_parameters=sum(map(math.prod, config.vision_shapes().values())),
        kv=tuple(
            KVMemory(
                context=context,
                dtype=dtype,
                windowed=config.kv_elements(context) * item_bytes,
                all_positions=config.kv_elements(context, windowed=False) * item_bytes,
            )
            for context in contexts
            for dtype, item_bytes in KV_ITEM_BYTES.items()
        ),
    )


def render(report: Report) -> str:
    """The report as text, lines of at most 100 columns but for the name."""
    c = report.config
    rope = f"theta {c.rope_theta:g}" + (f", linear factor {c.rope_scale:g}" if c.rope_scale != 1 else "")
    head = [
        ("model", report.name),
        ("parameters", f"{report.parameters:,} ({report.embedding_parameters:,} of them the embedding)"),
        ("layers", f"{c.layers}: {c.global_layers} global, {c.window_layers} window of {c.sliding_window}"),
        ("attention", f"{c.heads} query heads on {c.kv_heads} KV heads of {c.head_dim}"),
        ("widths", f"hidden {c.hidden_size:,}, MLP {c.intermediate_size:,}, vocabulary {c.vocab_size:,}"),
        ("RoPE", f"global {rope}; window theta {c.rope_local_theta:g}"),
        ("context", f"{c.max_context:,} tokens"),
        ("stop tokens", ", ".join(map(str, c.stop_token_ids))),
    ]
    if (v := c.vision) is not None:
        tower = f"{report.vision_parameters:,} parameters, {v.layers} layers of {v.hidden_size:,}"
        size = f"{v.image_size} x {v.image_size} pixels in {v.patches:,} patches"
        head += [("vision", tower), ("image", f"{size}, {v.tokens} tokens")]
    if report.stored_as is not None:
        head.append(("stored as", report.stored_as))
    if report.fingerprint is not None:
        head.append(("fingerprint", report.fingerprint[:16]))
    lines = [f"{label:<12}{value}" for label, value in head]
    lines += ["", "weights in memory"]
    lines += [f"  {dtype:<10}{human_bytes(size):>12}" for dtype, size in report.weights.items()]
    lines += ["", f"{'KV of one sequence':<22}{'windowed':>12}{'all positions':>16}"]
    lines += [
        f"  {kv.context:>9,} {kv.dtype:<9} {human_bytes(kv.windowed):>12}{human_bytes(kv.all_positions):>16}"
        for kv in report.kv
    ]
    return "\n".join(lines)


def human_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least one, e.g. "12.3 MiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
