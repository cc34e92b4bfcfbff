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
    """Start a thread that ends this process with `ExitCode.STALLED` when one step or image lasts too long.

    Too long is `stall_s` or `image_stall_s`, at which the leases are given up, and two leases more, in which
    others take the jobs over. The stacks of all threads go to standard error first.
    """
    step_s = settings.stall_s + 2 * settings.lease_s
    image_s = settings.image_stall_s + 2 * settings.lease_s

    def hang() -> str | None:
        if worker.step_lasts_s() >= step_s:
            return f"the engine has been in one step for {step_s:.0f} s"
        if worker.image_lasts_s() >= image_s:
            return f"the encoder has been at one image for {image_s:.0f} s"
        return None

    def run() -> None:
        while (what := hang()) is None:
            time.sleep(_LOOK_S)
        log.critical("%s; this process ends", what)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(ExitCode.STALLED)

    threading.Thread(target=run, name="watchdog", daemon=True).start()
