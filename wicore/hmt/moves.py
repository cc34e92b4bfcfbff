"""Blocks on their way between tiers: what the manager plans, and what became of it.

The manager decides and the mover (wicore.tiers) carries out: it copies between the device pool and host
memory through the engine, and between host memory and the file on threads of its own. While a move is
under way both ends are pinned: its sources are not written, and its targets are neither read nor found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from wicore.engine.base import Pool, Ticket

Tier = Literal["device", "host", "nvme"]
TIERS: tuple[Tier, ...] = ("device", "host", "nvme")


class Fault(Enum):
    """Why a block could not be brought: each is a counted miss, and its content is computed anew."""

    CHECKSUM = "checksum"
    """The bytes are not those that were written."""
    FOREIGN = "foreign"
    """The slot holds another block, or one of another model."""
    TRUNCATED = "truncated"
    """The file ends before the slot does."""
    IO = "io"
    """The system could not read or write: EIO, ENOSPC and the like."""


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks of one pool copied from one tier to the next; the i-th of each field belong together."""

    pool: Pool
    source: Tier
    target: Tier
    sources: tuple[int, ...]
    """Blocks or slots of the source tier."""
    targets: tuple[int, ...]
    contents: tuple[bytes, ...]
    """Content hashes, 16 bytes each."""
    parents: tuple[bytes, ...]
    """The hashes of the blocks that these continue."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A move that has ended."""

    move: Move
    seconds: float
    faults: Mapping[int, Fault] = field(default_factory=dict)
    """By index in the move; every block without one has arrived whole."""


class Mover(Protocol):
    """Carries moves out. Calls come from the engine thread and never wait for a copy."""

    @property
    def by_layer(self) -> bool:
        """Whether steps may read what is still on its way to the device, layer by layer."""

    def start(self, move: Move) -> Ticket | None:
        """Begin a move; `finished` gives its outcome later, exactly once. A failed copy is an outcome too.

        Of a move to the device, where `by_layer`, the ticket that steps name as `arriving`: it fails only
        with the device.
        """

    def finished(self) -> Sequence[Outcome]:
        """The outcomes since the last call."""
