"""States of the queue, and when two are one."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Any

import redis

from wicore.queue.consumer import Delivery
from wicore.queue.schema import Keys
from wicore.request import STATUS_OF_TERMINAL, Priority

KEYS = Keys()
WORKERS = ("wA", "wB")
PAST = b"1"
"""The time at which something ran out that the model let run out."""
_ESTIMATES = {KEYS.capacity, KEYS.pace, KEYS.turns, KEYS.counts}
"""Keys that hold measurements, or that only their differences matter of."""
_TURNS = {KEYS.clients(str(int(level))) for level in Priority}
_TIMES = re.compile(rb"\b1[5-9]\d{11}\b|\b\d{4}-\d\d-\d\dT[\d:.]+\+00:00")


@dataclass(frozen=True)
class Sent:
    """A job of a world: through `submit`, or pushed by a foreign client, perhaps more than once."""

    id: str
    level: Priority = Priority.NORMAL
    foreign: bool = False
    copies: int = 1
    late: bool = False
    """Whether its deadline may pass."""


@dataclass(frozen=True)
class World:
    """What there is to happen."""

    jobs: tuple[Sent, ...]
    batches: tuple[int, ...] = (1,)
    """How many messages a pop may ask for."""
    opening: tuple[str, ...] = ()
    """Steps, by name, that have been taken when the search begins."""


WORLDS = {
    "one": World((Sent("j1"),)),
    "late": World((Sent("j1", late=True),)),
    "foreign": World((Sent("f1", Priority.BATCH, foreign=True, copies=2),)),
    "two": World((Sent("j1"), Sent("f1", Priority.INTERACTIVE, foreign=True)), batches=(1, 2)),
    "suspect": World(
        (Sent("j1"), Sent("j2")),
        batches=(1, 2),
        opening=(
            *("send j1", "wA pops 1", "the lease of j1 (wA:1) runs out", "reap"),
            *("send j2", "wB pops 2"),  # a suspect, and one beside it
        ),
    ),
}


@dataclass(frozen=True)
class Hold:
    """A delivery, as its worker has it."""

    delivery: Delivery
    written: int = 0
    """Events."""
    acquitted: bool = False

    @property
    def next_seq(self) -> int:
        return self.delivery.seq + self.written + 1

    def belief(self) -> tuple[Any, ...]:
        d = self.delivery
        return d.job_id, d.fence, d.seq, self.on_trial, d.deadline_ms is None, self.written

    @property
    def on_trial(self) -> bool:
        return self.delivery.suspect and not self.acquitted


@dataclass(frozen=True)
class View:
    """What is not in the database: how often each job was sent, and what the workers believe."""

    sent: tuple[int, ...]
    holds: tuple[tuple[Hold, ...], ...] = ((), ())
    uncertain: tuple[bool, ...] = (False, False)
    """Whether the answer to a worker's last pop was lost."""

    def sending(self, job: int) -> View:
        return replace(self, sent=_put(self.sent, job, self.sent[job] + 1))

    def popped(self, worker: int, got: list[Delivery], *, lost: bool) -> View:
        holds = _put(self.holds, worker, (*self.holds[worker], *map(Hold, got)))
        return replace(self, holds=holds, uncertain=_put(self.uncertain, worker, lost))

    def exchange(self, worker: int, old: Hold, new: Hold | None) -> View:
        """`old` of a worker replaced, or let go."""
        kept = tuple(hold if hold is not old else new for hold in self.holds[worker])
        return replace(self, holds=_put(self.holds, worker, tuple(hold for hold in kept if hold is not None)))


def _put(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


@dataclass(frozen=True)
class Value:
    """What a key holds."""

    kind: bytes
    ttl_ms: int
    dump: bytes
    content: Any

    def comparable(self) -> Any:
        """Without the order that Redis does not promise, or that is of times alone."""
        return sorted(_pairs(self.content).items()) if self.kind in (b"hash", b"zset") else self.content


@dataclass(frozen=True)
class State:
    keys: dict[str, Value]
    view: View
    trace: tuple[str, ...]
    """The steps that lead here."""

    def pairs(self, key: str) -> dict[bytes, bytes]:
        """A hash by field, or a zset by member; empty if there is none."""
        return _pairs(self.keys[key].content) if key in self.keys else {}

    def record(self, job: str) -> dict[bytes, bytes]:
        return self.pairs(KEYS.job(job))

    def ended(self, job: str) -> bool:
        return self.record(job).get(b"status", b"").decode() in STATUS_OF_TERMINAL.values()

    def log(self, job: str) -> list[Any]:
        key = KEYS.log(job)
        return list(self.keys[key].content) if key in self.keys else []

    def identity(self, world: World) -> bytes:
        """Equal for states that differ in nothing that matters."""
        values = [
            (key, value.ttl_ms > 0, sorted(self.pairs(key)) if key in _TURNS else value.comparable())
            for key, value in self.keys.items()
            if key not in _ESTIMATES
        ]
        data = _TIMES.sub(b"T", repr(values).encode())
        for job in world.jobs:
            if tag := self.record(job.id).get(b"tag"):
                data = data.replace(tag, b"tag-" + job.id.encode())
        data += repr(self.view.sent).encode()
        beliefs = [
            repr((sorted(hold.belief() for hold in holds), lost)).encode()
            for holds, lost in zip(self.view.holds, self.view.uncertain, strict=True)
        ]
        return min(
            hashlib.sha256(data + b"".join(beliefs)).digest(),
            hashlib.sha256(_swap(data + b"".join(reversed(beliefs)))).digest(),
        )

    def difference(self, other: State) -> str:
        """The keys that differ, for a person."""
        before, after = (
            {key: value.comparable() for key, value in state.keys.items()} for state in (self, other)
        )
        changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
        return "; ".join(f"{key}: {before.get(key)} became {after.get(key)}" for key in changed)


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _swap(data: bytes) -> bytes:
    first, second = (name.encode() for name in WORKERS)
    return data.replace(first, b"\0").replace(second, first).replace(b"\0", second)


_READ = """
local keys, all = redis.call('KEYS', '*'), {}
table.sort(keys)
local read = {
  string = function(key) return {redis.call('GET', key)} end,
  hash = function(key) return redis.call('HGETALL', key) end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  stream = function(key) return redis.call('XRANGE', key, '-', '+') end,
}
for i, key in ipairs(keys) do
  local kind = redis.call('TYPE', key).ok
  all[i] = {key, kind, redis.call('PTTL', key), redis.call('DUMP', key), read[kind](key)}
end
return all
"""
_WRITE = """
redis.call('FLUSHDB')
for i = 1, #ARGV, 3 do
  redis.call('RESTORE', ARGV[i], math.max(0, tonumber(ARGV[i + 1])), ARGV[i + 2])
end
"""


class Database:
    """One that can be put back into any state it was in."""

    def __init__(self, client: redis.Redis) -> None:
        self._read = client.register_script(_READ)
        self._write = client.register_script(_WRITE)

    def read(self) -> dict[str, Value]:
        return {key.decode(): Value(*rest) for key, *rest in self._read()}

    def write(self, keys: dict[str, Value]) -> None:
        self._write(args=[part for key, value in keys.items() for part in (key, value.ttl_ms, value.dump)])
