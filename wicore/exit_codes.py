"""Exit codes of every WiCore process; the numbers from 64 on are those of BSD's sysexits.h."""

from __future__ import annotations

from enum import IntEnum

from wicore.errors import CheckpointError, ConfigError, WicoreError


class ExitCode(IntEnum):
    OK = 0
    FAILED = 1
    """A job, or a check of `wicore doctor`, failed."""
    USAGE = 2
    """The command line itself is wrong."""
    REFUSED = 65
    """The service refused the request, and would again."""
    UNAVAILABLE = 69
    """The service, Redis or a worker is away or busy; trying again may help."""
    INTERNAL = 70
    """A fault inside WiCore."""
    DEVICE = 71
    """A worker whose engine failed in a step; a new process may do better."""
    STALLED = 75
    """A worker whose engine hung; a new process may do better."""
    CONFIG = 78
    """A setting or the checkpoint is bad. `wicore up` does not restart a process that ends so."""
    INTERRUPTED = 130
    """Stopped by Ctrl-C."""


def exit_code(err: WicoreError) -> ExitCode:
    """How a process that ends with `err` exits."""
    if isinstance(err, ConfigError | CheckpointError):
        return ExitCode.CONFIG
    if err.retryable:
        return ExitCode.UNAVAILABLE
    if 400 <= err.status < 500:
        return ExitCode.REFUSED
    return ExitCode.INTERNAL
