"""Whether a grammar can be honoured, found out in bounded time.

Strangers write schemas, and a library's compiler may take minutes over a bad one: intersecting twenty
patterns does. Nothing ends a thread that does so, so a child process compiles each grammar first, over bytes
instead of tokens, and is killed when it takes too long. It tries a few steps, too: some grammars are found
out only there. Verdicts are remembered, and the child stays, so that most checks cost no more than a look;
that one took too long is remembered for a while only, as it may have been the machine that was slow.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from typing import NamedTuple

from wicore.errors import InvalidRequest, Unavailable
from wicore.grammar.grammar import Grammar

MAX_COMPILE_S = 2.0
"""How long a child may take over one grammar. Those of ordinary requests take some milliseconds."""
_START_S = 30.0
_REMEMBERED = 512
_SLOW_FOR_S = 60.0
"""How long it is remembered of a grammar that it took too long."""
_COMMAND = (sys.executable, "-m", "wicore.grammar.check_process")


class _Verdict(NamedTuple):
    why: str | None
    """Why the grammar cannot be honoured; None: it can."""
    until: float = math.inf
    """When it is forgotten, by `time.monotonic`."""


class GrammarChecker:
    """Checks grammars, one at a time, in a child process that is started when it is first needed.

    Thread-safe, and cooperative under gevent. The child ends when this process does.
    """

    def __init__(self, compile_s: float = MAX_COMPILE_S) -> None:
        self._compile_s = compile_s
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[Grammar, _Verdict] = OrderedDict()
        self._child: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequest, naming the field, for a grammar that cannot be honoured or takes too long to
        compile, and Unavailable when no child can be started."""
        with self._lock:
            verdict = self._verdicts.get(grammar)
            if verdict is None or verdict.until <= time.monotonic():
                verdict = self._verdicts[grammar] = self._ask(grammar)
            self._verdicts.move_to_end(grammar)
            if len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
        if verdict.why is not None:
            raise InvalidRequest(f"{grammar.param}: {verdict.why}", param=grammar.param)

    def close(self) -> None:
        """End the child; another check starts a new one."""
        with self._lock:
            self._kill()

    def _ask(self, grammar: Grammar) -> _Verdict:
        child = self._running()
        assert child.stdin is not None
        question = json.dumps({"kind": grammar.kind, "text": grammar.text}).encode()
        try:
            child.stdin.write(question + b"\n")
            child.stdin.flush()
            answer = self._answer(child, self._compile_s)
        except OSError:
            answer = b""
        if answer is None:
            self._kill()
            why = f"takes more than {self._compile_s:g} s to compile; make it simpler"
            return _Verdict(why, time.monotonic() + _SLOW_FOR_S)
        if not answer:
            self._kill()
            return _Verdict("cannot be compiled: it needs too much memory")
        found = json.loads(answer)
        return _Verdict(None if found is None else str(found))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._pid == os.getpid() and self._child.poll() is None:
            return self._child
        self._kill()
        try:
            child = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as err:
            raise Unavailable(f"no process can be started to check a grammar: {err}") from None
        self._child, self._pid = child, os.getpid()
        if self._answer(child, _START_S) != b"null\n":
            self._kill()
            raise Unavailable("the process that checks grammars did not start")
        return child

    def _answer(self, child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """A line of the child's; empty when it has ended, None when it takes longer."""
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], seconds)
        return child.stdout.readline() if ready else None

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None or self._pid != os.getpid():  # a fork's: the parent has it
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


_checker = GrammarChecker()
atexit.register(_checker.close)
check_grammar = _checker.check
"""`GrammarChecker.check` of this process."""
