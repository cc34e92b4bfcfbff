"""Where a step's time goes, kernel by kernel."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wicore.engine.base import KVLayout, SequenceInput
from wicore.engine.tensorrt.cuda_kernels import TimedLaunch
from wicore.engine.tensorrt.matmuls import SKINNY_TO
from wicore.gemma3.config import Gemma3Config


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kind in a step."""

    kernel: str
    calls: int
    ms: float
    """Of all calls together, one after the other."""
    bytes: int
    """That they must move through device memory; 0: not counted."""
    flops: int
    """That they must compute; 0: not counted."""


_PRODUCTS = {"skinny": "rows, n, k", "hopper_matmul": "rows, n, k"}
"""Kernels whose first three int32 arguments are the sizes of a matrix product."""


def summary(
    launches: Iterable[TimedLaunch], replays: Sequence[Sequence[float]], config: Gemma3Config, kv_bytes: int
) -> list[KernelTime]:
    """Kinds of launches by time, the longest first.

    replays: milliseconds by replay and launch; the median of the replays counts. kv_bytes: KV that the step's
    queries see, all layers together.
    """
    names = [_name(launch, config) for launch in launches]
    each = [statistics.median(times) for times in zip(*replays, strict=True)]
    found: dict[str, KernelTime] = {}
    for name, launch, ms in zip(names, launches, each, strict=True):
        moved, flops = _work(launch, name)
        before = found.get(name, KernelTime(name, 0, 0.0, 0, 0))
        found[name] = KernelTime(
            name, before.calls + 1, before.ms + ms, before.bytes + moved, before.flops + flops
        )
    result = []
    for entry in sorted(found.values(), key=lambda entry: -entry.ms):
        reads = entry.kernel == "decode_attention"
        result.append(KernelTime(entry.kernel, entry.calls, entry.ms, kv_bytes, 0) if reads else entry)
    return result


def kv_bytes(sequences: Iterable[SequenceInput], layout: KVLayout, config: Gemma3Config) -> int:
    """KV that one query at the end of each sequence sees, in all layers."""
    a_position = 2 * layout.kv_heads * layout.vector_bytes
    total = 0
    for sequence in sequences:
        seen = sequence.start + len(sequence.tokens)
        total += config.global_layers * seen + config.window_layers * min(seen, layout.window)
    return total * a_position


def _name(launch: TimedLaunch, config: Gemma3Config) -> str:
    if launch.kernel not in _PRODUCTS:
        return launch.kernel
    _, n, k = launch.integers[:3]
    wide = config.heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    role = {
        (wide + 2 * config.kv_heads * config.head_dim, hidden): "qkv",
        (hidden, wide): "out",
        (inner, hidden): "gate_up",
        (hidden, inner): "down",
        (config.vocab_size, hidden): "head",
    }.get((n, k), f"{n} x {k}")
    return f"{launch.kernel} {role}"


def _work(launch: TimedLaunch, name: str) -> tuple[int, int]:
    """(bytes, floating-point operations) of a matrix product: operands read once, the result written once."""
    if launch.kernel not in _PRODUCTS:
        return 0, 0
    rows, n, k = launch.integers[:3]
    matrices = 2 if name.endswith("gate_up") else 1
    half_delta = launch.kernel == "hopper_matmul" and rows > SKINNY_TO and name.endswith(("out", "down"))
    out = 2 if half_delta or name.endswith(("qkv", "gate_up")) else 4
    return 2 * matrices * n * k + 2 * rows * k + out * rows * n, 2 * rows * matrices * n * k
