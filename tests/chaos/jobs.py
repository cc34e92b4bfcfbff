"""What clients ask for. Pure."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.chaos.transcript import Transcript
from tests.messages import pushed, raw

Door = Literal["socket", "events", "answer", "redis", "shared"]
"""How a job is sent and followed: see doors.py."""
Fate = Literal["plain", "cancel", "timeout", "poison"]

POISON_SEED = 0xDEAD
"""Marks a job whose sequence kills the worker that runs it."""
POISON_TOKENS = 3
"""How far it gets in its first attempt."""
PRIORITIES = ("interactive", "normal", "normal", "batch", "background")
_DOORS: tuple[Door, ...] = (*["socket"] * 4, *["events"] * 3, *["answer"] * 2, *["redis"] * 3, "shared")
_SHARED = 3
"""Jobs on one socket of the door `shared`."""
_PROMPTS = ("Once upon a time", "Hello there, my friend", "Number 7 says", "In the end it was the rain that")
_LENGTHS = (8, 14, 22, 34, 50, 80, 120)
_SAMPLING: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.95, "seed": 11},
    {"temperature": 1.1, "top_k": 20, "seed": 12},
    {"temperature": 1.0, "min_p": 0.05, "seed": 13},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.8, "presence_penalty": 0.8, "frequency_penalty": 0.5, "seed": 14},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.7, "logprobs": 0, "seed": 15},
    {"temperature": 0.8, "n": 2, "seed": 16},
    {"temperature": 1.0, "stop": ["e", "qu"], "seed": 17},
)


@dataclass(frozen=True)
class Kind:
    """A request whose text is always the same."""

    name: str
    fields: Mapping[str, Any]
    """Of `POST /v1/jobs`, without priority, deadline and metadata."""

    @property
    def openai_path(self) -> str | None:
        """The door of OpenAI's API that takes these fields as they are, but for `kind`."""
        if self.fields["kind"] == "completion":
            return "/v1/completions"
        return None if "logprobs" in self.fields else "/v1/chat/completions"


def kinds() -> list[Kind]:
    """Forty: each way of sampling, with four prompts and lengths, as chats and as completions."""
    made = []
    for i, sampling in enumerate(_SAMPLING):
        for j, prompt in enumerate(_PROMPTS):
            fields = {"max_tokens": _LENGTHS[(3 * i + 2 * j) % len(_LENGTHS)], **sampling}
            if j == 3:
                fields |= {"kind": "chat", "messages": [{"role": "user", "content": prompt}]}
            else:
                fields |= {"kind": "completion", "prompt": prompt}
            if j % 2:
                fields["ignore_eos"] = True
            made.append(Kind(f"{i}.{j}", fields))
    return made


def poison() -> Kind:
    fields = {
        "kind": "completion",
        "prompt": "Now",
        "max_tokens": 40,
        "temperature": 0.5,
        "seed": POISON_SEED,
    }
    return Kind("poison", {**fields, "ignore_eos": True})


@dataclass
class Ticket:
    """One job as a client wants it, and what came of it."""

    number: int
    kind: Kind
    door: Door
    priority: str
    fate: Fate = "plain"
    timeout_s: float | None = None
    cancel_at: int | None = None
    """Cancel once this many events have come."""
    leave_at: set[int] = field(default_factory=set)
    """Drop the connection after these events."""
    copies: int = 1
    """How often the message is pushed, for the door `redis`."""
    job: str | None = None
    """Its id, once the client knows it."""
    sends: int = 0
    """Submits or pushes that may have taken effect."""
    heard: Transcript = field(default_factory=Transcript)
    answer: dict[str, Any] | None = None
    """What the door `answer` gave: the result, or an error's body."""

    @property
    def body(self) -> dict[str, Any]:
        """The body of `POST /v1/jobs`; its metadata lead from a record back to the ticket."""
        body = {**self.kind.fields, "priority": self.priority, "metadata": {"ticket": str(self.number)}}
        return body if self.timeout_s is None else {**body, "timeout_s": self.timeout_s}

    def endings(self) -> set[str]:
        """The terminal events that are right for it."""
        if self.fate == "timeout" and self.door == "answer":
            # The door stops waiting, and calls the job off, if nobody ends it within seconds of its deadline.
            return {"done", "expired", "cancelled"}
        return {
            "plain": {"done"},
            "cancel": {"done", "cancelled"},
            "timeout": {"done", "expired"},
            "poison": {"failed"},
        }[self.fate]


class Tickets:
    """Makes tickets, all different, those of `make` the same ones for the same seed. Keeps all it made."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"tickets {seed}")
        self._spare_rng = random.Random(f"spare {seed}")
        self._kinds = kinds()
        self.made: list[Ticket] = []

    def make(self) -> list[Ticket]:
        """What one client takes on next: a ticket, or those that share a socket."""
        door = self._rng.choice(_DOORS)
        return [self._make(door) for _ in range(_SHARED if door == "shared" else 1)]

    def _make(self, door: Door) -> Ticket:
        rng = self._rng
        ticket = Ticket(len(self.made), rng.choice(self._kinds), door, rng.choice(PRIORITIES))
        if door == "answer":
            ticket.kind = rng.choice([kind for kind in self._kinds if kind.openai_path])
        else:
            ticket.leave_at = {rng.randrange(1, 60) for _ in range(rng.choice((0, 0, 1, 2)))}
        luck = rng.random()
        if luck < 0.05:
            ticket.fate, ticket.timeout_s = "timeout", round(rng.uniform(0.05, 2.0), 2)
        elif luck < 0.12 and door != "answer":
            ticket.fate, ticket.cancel_at = "cancel", rng.choice((0, rng.randrange(1, 40)))
        return self._keep(ticket)

    def make_poison(self) -> Ticket:
        return self._keep(Ticket(len(self.made), poison(), "events", "interactive", fate="poison"))

    def make_duplicated(self) -> Ticket:
        kind, copies = self._spare_rng.choice(self._kinds), self._spare_rng.choice((2, 2, 3))
        return self._keep(Ticket(len(self.made), kind, "redis", "normal", copies=copies))

    def _keep(self, ticket: Ticket) -> Ticket:
        self.made.append(ticket)
        return ticket


# --- messages that are no jobs ------------------------------------------------------------------

_MALFORMED: tuple[Callable[[str], bytes], ...] = (
    lambda mark: b"\xff\xfe\x00 garbage " + mark.encode(),
    lambda mark: json.dumps([mark]).encode(),
    lambda mark: b"[" * 2000 + mark.encode(),
    lambda mark: json.dumps({"body": mark}).encode(),
    lambda mark: raw(headers__id=f"{mark} with blanks"),
    lambda mark: raw(headers__id=mark, properties={"delivery_tag": 5}),
    lambda mark: pushed(mark, top_p=9),
    lambda mark: pushed(mark, no_such_field=1),
    lambda mark: pushed(mark, messages=[]),
    lambda mark: raw(headers__id=mark, properties__delivery_tag=mark, body="!!!"),
    lambda mark: raw(headers__id=mark, properties__delivery_tag=mark, body="bm90IGpzb24="),
    lambda mark: raw(headers__id=mark, properties__delivery_tag=mark, headers__task="other.task"),
    lambda mark: raw(headers__id=mark, properties__delivery_tag=mark, content_type="application/x-python"),
    lambda mark: raw(headers__id=mark, properties__delivery_tag=mark, headers__expires="soon"),
)


def malformed(number: int) -> tuple[str, bytes]:
    """A mark that is found again in the dead list, and a message that no job can be made of."""
    mark = f"malformed-{number}."
    return mark, _MALFORMED[number % len(_MALFORMED)](mark)
