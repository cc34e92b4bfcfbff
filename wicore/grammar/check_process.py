"""The child of `check.py`: a grammar a line on standard input, a verdict a line on standard output.

A verdict is JSON: null, or why the grammar cannot be honoured. The first line says that it is ready.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from wicore.errors import InvalidRequest
from wicore.grammar.grammar import Grammar
from wicore.grammar.library import matcher_of, reason

_MEMORY = 2 * 2**30
"""Address space of the child, in bytes; it uses some tens of megabytes."""
_STEPS = 64
_CLOSERS = b'"}]'


def verdict(grammar: Grammar, tokenizer: LLTokenizer) -> str | None:
    """Why it cannot be honoured; None: it can, as far as its first steps show."""
    try:
        matcher = matcher_of(grammar, tokenizer)
    except InvalidRequest as err:
        return err.message.removeprefix(f"{grammar.param}: ")
    return _trial(matcher, tokenizer)


def _trial(matcher: LLMatcher, tokenizer: LLTokenizer) -> str | None:
    """Write a short beginning of what is allowed: what closes something where that is allowed."""
    for _ in range(_STEPS):
        if matcher.is_stopped():
            break
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        if not allowed or tokenizer.eos_token in allowed:
            break
        closing = [byte for byte in _CLOSERS if byte in allowed]
        matcher.consume_token((closing or allowed)[0])
    return reason(matcher.get_error()) if matcher.is_error() else None


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to act on
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    tokenizer = LLTokenizer("byte")
    print("null", flush=True)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        print(json.dumps(verdict(Grammar(asked["kind"], asked["text"]), tokenizer)), flush=True)


if __name__ == "__main__":
    main()
