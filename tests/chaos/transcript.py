"""What a client was told about one job. Pure but for the clock it is given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wicore.request import TERMINAL_TYPES, Event


@dataclass
class Choice:
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None

    def starts(self, whole: Choice) -> bool:
        """Whether this is what `whole` looks like at some moment before its end."""
        return (
            whole.text.startswith(self.text)
            and whole.ids[: len(self.ids)] == self.ids
            and whole.logprobs[: len(self.logprobs)] == self.logprobs
            and self.finish_reason in (None, whole.finish_reason)
        )


@dataclass
class Transcript:
    """Events taken in order. What breaks the order is noted in `faults`, not raised."""

    last: int = 0
    """`seq` of the last event."""
    choices: dict[int, Choice] = field(default_factory=dict)
    ended: str | None = None
    """Type of the terminal event."""
    end: Event = field(default_factory=dict)
    resumed: int = 0
    longest_pause_s: float = 0.0
    faults: list[str] = field(default_factory=list)
    _digest: Any = field(default_factory=hashlib.blake2b)
    _at: float | None = None

    def take(self, event: Event, now: float | None = None) -> None:
        """`now`: when it came, to measure pauses."""
        seq, kind = event["seq"], event["type"]
        if self.ended is not None:
            self.faults.append(f"event {seq} ({kind}) came after the terminal one, {self.last}")
            return
        if seq != self.last + 1:
            self.faults.append(f"event {seq} ({kind}) came after event {self.last}")
        if kind not in TERMINAL_TYPES and (kind == "started") != (seq == 1):
            self.faults.append(f"event {seq} is {kind!r}; the first, and only the first, is 'started'")
        self.last = seq
        self._digest.update(repr(sorted(event.items())).encode())
        if now is not None:
            self.longest_pause_s = max(self.longest_pause_s, now - (self._at or now))
            self._at = now
        if kind == "token":
            self._add(event)
        elif kind in TERMINAL_TYPES:
            self.ended, self.end = kind, event
        self.resumed += kind == "resumed"

    def take_all(self, events: Sequence[Event]) -> Transcript:
        for event in events:
            self.take(event)
        return self

    @property
    def digest(self) -> str:
        """Of everything taken."""
        return str(self._digest.hexdigest())

    def _add(self, event: Event) -> None:
        choice = self.choices.setdefault(event["index"], Choice())
        if choice.finish_reason is not None:
            self.faults.append(f"event {event['seq']} adds to choice {event['index']}, which had ended")
        choice.text += event["text"]
        choice.ids += event["token_ids"]
        choice.logprobs += event.get("logprobs", [])
        choice.finish_reason = event.get("finish_reason")
