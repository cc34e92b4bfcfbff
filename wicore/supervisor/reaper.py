"""The process that outlives a killed `wicore up`, to stop what it started.

Run as a script with the read end of a pipe as standard input and the seconds a process may take to
stop as its argument. Lines on the pipe are `+PGID` for a process group that started and `-PGID` for
one that ended. The pipe's end means that `wicore up` is gone, however it went: every group left is
terminated, and killed when its time is up.

A pipe, not Linux's parent-death signal: it works on every POSIX system, takes grandchildren with it,
and leaves a worker the time to hand its jobs back. Standard library only, so that it starts at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable


def groups_left(lines: Iterable[bytes]) -> list[int]:
    """The groups that started and did not end, in the order they started."""
    groups: dict[int, None] = {}
    for line in lines:
        sign, group = line[:1], line[1:].strip()
        # The last line is incomplete if its writer was killed.
        if sign == b"+" and group.isdigit() and line.endswith(b"\n"):
            groups[int(group)] = None
        elif sign == b"-" and group.isdigit():
            groups.pop(int(group), None)
    return list(groups)


def send(group: int, signum: int) -> bool:
    """Signal a process group; False when it is gone. Signal 0 only looks."""
    try:
        os.killpg(group, signum)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def main() -> None:
    # Its parent's terminal or service manager may signal everything at once; this one must stay.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    groups = groups_left(sys.stdin.buffer)
    deadline = time.monotonic() + float(sys.argv[1])
    groups = [group for group in groups if send(group, signal.SIGTERM)]
    while groups and time.monotonic() < deadline:
        time.sleep(0.05)
        groups = [group for group in groups if send(group, 0)]
    for group in groups:
        send(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
