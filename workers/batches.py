"""The batch runner as a thread of the tasks process: looks after every open batch, a portion each in turn."""

from __future__ import annotations

import logging
import threading

from wicore.batches.runner import Runner
from wicore.errors import Unavailable, WicoreError

log = logging.getLogger("wicore.batches")

IDLE_S = 0.5
"""Between two looks when there was nothing to do."""
TROUBLE_S = 5.0
"""Between two looks while Redis, or the model, is not there."""


class BatchThread:
    """Runs until `stop`. What a killed one left undone the next one finds in Redis."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._told = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the portion that is being done. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._stopping.wait(self._round())

    def _round(self) -> float:
        """A portion of every open batch; seconds until the next round."""
        wait_s = IDLE_S
        try:
            for batch_id in self._runner.batches.open():
                if self._stopping.is_set():
                    break
                if self._advance(batch_id):
                    wait_s = 0.0
            self._told = ""
        except WicoreError as err:
            if err.message != self._told:
                log.warning("batches wait: %s", err.message)
            self._told = err.message
            return TROUBLE_S if not isinstance(err, Unavailable) else IDLE_S
        return wait_s

    def _advance(self, batch_id: str) -> bool:
        try:
            return self._runner.advance(batch_id)
        except WicoreError:
            raise
        except Exception:
            # One batch that cannot go on must not hold up the others.
            log.exception("batch %s", batch_id)
            return False
