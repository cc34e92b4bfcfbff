"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from wicore.config import Settings, load_settings

Function = TypeVar("Function", bound=Callable[..., Any])


def config_option(function: Function) -> Function:
    """`--config FILE`, any number of times, as the parameter `config`: a tuple of paths."""
    return click.option(
        "--config",
        multiple=True,
        metavar="FILE",
        help="YAML settings file; repeat it, later files win. Default: those WICORE_CONFIG names.",
    )(function)


def url_option(function: Function) -> Function:
    """`--url URL` as the parameter `url`: None when not given, see `service_url`."""
    return click.option(
        "--url",
        metavar="URL",
        help="The service; default: where api.host and api.port of the settings say.",
    )(function)


def read_settings(config: tuple[str, ...]) -> Settings:
    """The settings, from the files given or else those of WICORE_CONFIG. Raises ConfigError."""
    return load_settings(config or None)


def service_url(url: str | None) -> str:
    """Where the API is: `url`, or what the settings say."""
    return url or base_url(read_settings(()))


def base_url(settings: Settings) -> str:
    """Where a client on this machine reaches the API; a wildcard address is no place to connect to."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(settings.api.host, settings.api.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.api.port}"
