"""The app factory."""

from __future__ import annotations

from flask import Flask

from api import (
    access_log,
    batches,
    browsers,
    callers,
    dead,
    docs,
    files,
    http,
    jobs,
    metrics,
    openai,
    openapi,
    page,
    rates,
    responses,
    service,
    sockets,
    status,
)
from api.services import EXTENSION, LazyServices, Services
from wicore.config import Settings

DOORS = (
    openai.door,
    responses.door,
    files.door,
    batches.door,
    jobs.door,
    dead.door,
    service.door,
    status.door,
    metrics.door,
    page.door,
    openapi.door,
    docs.door,
)


def create_app(settings: Settings, services: Services | None = None) -> Flask:
    """Build the app. Does no IO: what the doors need is built on first use, once a process.

    `services` replaces what would be built from the settings, e.g. in tests.
    """
    app = Flask("wicore-api", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.api.max_body_bytes
    app.config["SOCK_SERVER_OPTIONS"] = sockets.server_options(settings.api)
    app.extensions[EXTENSION] = LazyServices(settings, services)
    access_log.install(app, log_bodies=settings.telemetry.log_prompts)
    http.install(app)
    callers.install(app)
    rates.install(app)
    browsers.install(app, settings.api)
    for door in DOORS:
        app.register_blueprint(door)
    sockets.install(app)
    return app
