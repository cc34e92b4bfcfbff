"""`wicore worker`: one worker process, in place of this one."""

from __future__ import annotations

import os
import sys

import click

from wicore.commands.options import config_option, read_settings
from wicore.errors import ConfigError


@click.command()
@config_option
def worker(config: tuple[str, ...]) -> None:
    """Run one worker for a service that runs elsewhere.

    It takes jobs from redis.url, so that must be set; `wicore up` starts a worker of its own.

    \b
    Example:
      WICORE_REDIS__URL=redis://queue.example:6379/0 wicore worker
    """
    settings = read_settings(config)
    if settings.redis.url is None:
        raise ConfigError(
            "redis.url: unset, and a worker needs the Redis that the API uses; "
            "set WICORE_REDIS__URL, or run `wicore up` for a whole service",
            param="redis.url",
        )
    environ = dict(os.environ)
    if config:
        environ["WICORE_CONFIG"] = os.pathsep.join(map(os.path.abspath, config))
    # The library does not import the worker; replacing the process also leaves signals to it alone.
    os.execve(sys.executable, [sys.executable, "-m", "workers.gpu"], environ)
