"""Ending a worker whose engine hangs: its jobs have gone to others by then, and only a new process serves."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time

from wicore.config import QueueSettings
from wicore.exit_codes import ExitCode
from workers.worker import Worker

log = logging.getLogger("wicore.worker")

_LOOK_S = 1.0


def watch(worker: Worker, settings: QueueSettings) -> None:
    """Start a thread that ends this process with `ExitCode.STALLED` when one step lasts too long.

    Too long is `stall_s`, at which the leases are given up, and two leases more, in which others take the
    jobs over. The stacks of all threads go to standard error first.
    """
    limit_s = settings.stall_s + 2 * settings.lease_s

    def run() -> None:
        while worker.step_lasts_s() < limit_s:
            time.sleep(_LOOK_S)
        log.critical("the engine has been in one step for %.0f s; this process ends", limit_s)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(ExitCode.STALLED)

    threading.Thread(target=run, name="watchdog", daemon=True).start()
