"""The worker process: `python -m workers.gpu`. One process a device; the engine is a setting.

SIGTERM or SIGINT: stop taking jobs, finish for `queue.drain_s`, hand back the rest, exit 0.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import uuid

from wicore.config import load_settings
from wicore.engine.factory import create_engine
from wicore.errors import ConfigError, WicoreError
from wicore.exit_codes import exit_code
from wicore.model import load_model
from wicore.queue.connection import connect
from workers.worker import Worker

log = logging.getLogger("wicore.worker")


def main() -> int:
    try:
        settings = load_settings()
        logging.basicConfig(
            level=settings.telemetry.log_level.upper(),
            format="%(asctime)s %(name)s %(levelname)s %(message)s",
        )
        if settings.redis.url is None:
            raise ConfigError(
                "redis.url: not set; set WICORE_REDIS__URL, or run the whole service by `wicore up`",
                param="redis.url",
            )
        model = load_model(settings)
        redis = connect(settings.redis.url)
        engine = create_engine(settings, model)
    except WicoreError as err:
        print(f"error: {err.message}", file=sys.stderr)
        return exit_code(err)
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    worker = Worker(settings, model, engine, redis, owner)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
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
    worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
