"""What a pass works with on the device: activations of its rows, and the logits of those that sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.parts import aligned
from wicore.gemma3.config import Gemma3Config


@dataclass(frozen=True)
class WorkBuffers:
    """Device addresses; row-major, for up to the rows they were allocated for."""

    residual: int
    """float32 [rows, hidden], the residual stream."""
    other_residual: int
    """The same; segments write the stream where they do not read it."""
    normed: int
    """half [rows, hidden]"""
    qkv: int
    """half [rows, (heads + 2 kv_heads) head_dim]"""
    q: int
    """half [rows, heads, head_dim], normed and rotated"""
    attended: int
    """half [rows, heads head_dim]"""
    act: int
    """half [rows, inner]; shares its memory with qkv, q and attended, which are read by then."""
    delta: int
    """[rows, hidden], what a layer's half adds before its norm: float32, or half (`Matmul.delta`)."""
    gathered: int
    """half [samples, hidden], normed rows that sample."""
    last_residual: int
    """float32 [samples, hidden], `residual` of those in the last layer, where a prompt's other rows end."""
    last_attended: int
    """half [samples, heads head_dim], their `attended`."""
    logits: int
    """float32 [samples, vocab]"""

    def of_last_rows(self) -> WorkBuffers:
        """For a body that works on `last_residual` and `last_attended`."""
        return replace(self, residual=self.last_residual, attended=self.last_attended)


def work_bytes(config: Gemma3Config, rows: int, samples: int) -> int:
    """Bytes of the buffers for `rows` rows of which `samples` sample."""
    return max(offset + size for _, offset, size in _places(config, rows, samples))


def allocate_work(device: Device, config: Gemma3Config, rows: int, samples: int) -> WorkBuffers:
    base = device.allocate(work_bytes(config, rows, samples), "the activations of a step").address
    return WorkBuffers(**{name: base + offset for name, offset, _ in _places(config, rows, samples)})


def _places(config: Gemma3Config, rows: int, samples: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes)"""
    wide = config.heads * config.head_dim
    qkv = wide + 2 * config.kv_heads * config.head_dim
    at = 0
    for name, size in (
        ("residual", 4 * rows * config.hidden_size),
        ("other_residual", 4 * rows * config.hidden_size),
        ("normed", 2 * rows * config.hidden_size),
        ("delta", 4 * rows * config.hidden_size),
        ("gathered", 2 * samples * config.hidden_size),
        ("last_residual", 4 * samples * config.hidden_size),
        ("last_attended", 2 * samples * wide),
        ("logits", 4 * samples * config.vocab_size),
    ):
        yield name, at, size
        at = aligned(at + size)
    yield "act", at, 2 * rows * config.intermediate_size
    for name, size in (("qkv", 2 * rows * qkv), ("q", 2 * rows * wide), ("attended", 2 * rows * wide)):
        yield name, at, size
        at = aligned(at + size)
