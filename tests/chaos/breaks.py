"""The product with one guarantee taken out, for a run that must fail.

fence     appending, finishing and renewing skip the fence: who lost a job writes on
resume    an attempt does not look at what the ones before it wrote
suspects  jobs whose worker died go back to their own queues, and run together again
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from wicore import generation
from wicore.queue import scripts
from wicore.request import Event

_EDITS = {
    "fence": {
        "append": [("if record.fence ~= fence then", "if false then")],
        "finish": [("if record.fence ~= fence then", "if false then")],
        "renew": [("if record.fence == fence then", "if true then")],
    },
    "suspects": {"reap": [("join_suspects(id, raw)", "join_line(id, raw, true)")]},
}
NAMES = ("resume", *_EDITS)


def apply(name: str) -> None:
    """Break this process. A script that no longer has what is to be taken out raises ValueError."""
    if name == "resume":
        from workers import preparation

        preparation.Generation = _Forgetful  # type: ignore[misc]
        return
    edits, text_of = _EDITS[name], scripts._text

    @cache
    def altered(header: str, script: str) -> tuple[str, str]:
        text, _ = text_of(header, script)
        for old, new in edits.get(script, ()):
            if old not in text:
                raise ValueError(f"{script}.lua has no {old!r} any more: mend tests/chaos/breaks.py")
            text = text.replace(old, new)
        return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    scripts._text = altered


class _Forgetful(generation.Generation):
    def __init__(self, *args: Any, log: Sequence[Event] = (), **more: Any) -> None:
        # The numbers go on, or the first append would be refused.
        numbers = [{"seq": event["seq"], "type": "forgotten"} for event in log]
        super().__init__(*args, log=numbers, **more)
