"""OpenAI's own client, and apps for it to speak to over a real socket, in this process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import openai
from werkzeug.serving import make_server

from api.app import create_app
from api.services import build
from wicore.config import Settings
from wicore.model import Model


@contextmanager
def serving(settings: Settings, model: Model | None = None) -> Iterator[str]:
    """The base URL of an API with these settings; `model` is theirs unless given."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
    services = build(settings)
    services = replace(services, model=model or services.model)
    server = make_server("127.0.0.1", 0, create_app(settings, services), threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        services.relay.close()
        services.redis.close()


@contextmanager
def official(url: str, key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=20) as client:
        yield client
