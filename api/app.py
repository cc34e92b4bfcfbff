"""The app factory."""

from __future__ import annotations

from flask import Flask

from api import batches, dead, files, http, jobs, metrics, openai, responses, service, sockets, status
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
    http.install(app)
    for module in (openai, responses, files, batches, jobs, dead, service, status, metrics):
        app.register_blueprint(module.door)
    sockets.install(app)
    return app
