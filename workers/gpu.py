"""The worker process: `python -m workers.gpu`. One process a device; the engine is a setting.

SIGTERM or SIGINT: stop taking jobs, finish for `queue.drain_s`, hand back the rest, exit 0.
A failing engine: give the jobs up, exit with ExitCode.DEVICE. A hanging one: ExitCode.STALLED (watchdog.py).
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading

from wicore.config import Settings, load_settings
from wicore.engine.factory import create_engine, create_vision
from wicore.errors import ConfigError, EngineError, WicoreError
from wicore.exit_codes import ExitCode, exit_code
from wicore.model import load_model
from wicore.queue.connection import connect
from wicore.queue.consumer import new_owner
from workers.watchdog import watch
from workers.worker import Worker

log = logging.getLogger("wicore.worker")

_SWITCH_S = 0.0005
"""How long a thread may keep the interpreter from others. When a step ends the engine thread wants it, and
until then the device idles."""


def main() -> int:
    serving: list[Worker] = []
    _watch_signals(serving)
    try:
        settings = load_settings()
        worker = _build(settings)
    except WicoreError as err:
        print(f"error: {err.message}", file=sys.stderr)
        return exit_code(err)
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()  # model and tokenizer stay: walking them takes longer than a step
    serving.append(worker)
    watch(worker, settings.queue)
    try:
        worker.run()
    except EngineError as err:
        log.critical("the engine failed, and this process ends: %s", err.message)
        logging.shutdown()
        os._exit(ExitCode.DEVICE)  # an orderly end might wait for the device
    return 0


def _watch_signals(serving: list[Worker]) -> None:
    """On SIGTERM or SIGINT stop `serving[0]`, or end at once while there is none.

    A thread reads the wake-up descriptor: Python's own handlers run between two instructions of the main
    thread, and a signal that comes just before that thread blocks on its inbox would not wake it.
    """
    heard, rung = socket.socketpair()
    rung.setblocking(False)
    signal.set_wakeup_fd(rung.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        with rung:
            while heard.recv(1):
                if not serving:
                    os._exit(ExitCode.OK)  # still loading: nothing is held
                serving[0].stop()

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _build(settings: Settings) -> Worker:
    logging.basicConfig(
        level=settings.telemetry.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    if settings.redis.url is None:
        raise ConfigError(
            "redis.url: not set; set WICORE_REDIS__URL, or run the whole service by `wicore up`",
            param="redis.url",
        )
    model = load_model(settings)
    redis = connect(settings.redis.url)
    engine = create_engine(settings, model)
    encoder = create_vision(settings, model, engine)
    owner = new_owner()
    info = engine.info
    log.info(
        "%s serves %s on %s (%s, %s weights), %d slots, context %d",
        owner,
        model.name,
        info.name,
        info.device,
        info.weights,
        settings.scheduler.max_batch,
        model.context,
    )
    return Worker(settings, model, engine, redis, owner, encoder)


if __name__ == "__main__":
    sys.exit(main())
