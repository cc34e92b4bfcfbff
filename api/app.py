"""The app factory."""

from __future__ import annotations

from flask import Flask

from api import access, dead, docs, http, jobs, metrics, openai, openapi, service, sockets, status
from api.services import EXTENSION, LazyServices, Services
from wicore.config import Settings


def create_app(settings: Settings, services: Services | None = None) -> Flask:
    """Build the app. Does no IO: what the doors need is built on first use, once a process.

    `services` replaces what would be built from the settings, e.g. in tests.
    """
    app = Flask("wicore-api", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.api.max_body_bytes
    app.config["SOCK_SERVER_OPTIONS"] = sockets.server_options(settings.api)
    app.extensions[EXTENSION] = LazyServices(settings, services)
    access.install(app, log_bodies=settings.telemetry.log_prompts)
    http.install(app)
    for door in (
        openai.door,
        jobs.door,
        dead.door,
        service.door,
        status.door,
        metrics.door,
        openapi.door,
        docs.door,
    ):
        app.register_blueprint(door)
    sockets.install(app)
    return app
