"""`wicore keys`: API keys, made and revoked in the service's Redis."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from typing import Any

import click
from redis import ConnectionError, Redis

from wicore.access.keys import ApiKey, Limits
from wicore.access.store import KeyStore
from wicore.commands.jobs import PRIORITIES, given
from wicore.commands.options import config_option, read_settings
from wicore.commands.up import data_folder
from wicore.config import Settings
from wicore.queue.connection import connect
from wicore.queue.embedded import EmbeddedValkey

POSITIVE = click.IntRange(min=1)


@click.group()
def keys() -> None:
    """Make, list and revoke API keys. Changes are in force within two seconds.

    Once there is a key nobody is served without one. The keys are in the service's Redis; with redis.url
    unset in that of `wicore up`, whether it runs or not.

    \b
    Examples:
      wicore keys create me --admin
      wicore keys create website --requests-per-minute 60 --tokens-per-minute 20000 --priority normal
      wicore keys list
      wicore keys revoke website
    """


@keys.command()
@click.argument("name")
@click.option("--admin", is_flag=True, help="An operator's: sees all jobs, /status, /metrics, /v1/dead.")
@click.option("--requests-per-minute", type=POSITIVE, help="Requests that make work, on average.")
@click.option("--burst", type=POSITIVE, help="Requests at once after a pause; default: those of a minute.")
@click.option("--tokens-per-minute", type=POSITIVE, help="Tokens of prompts and output, on average.")
@click.option("--parallel", type=POSITIVE, help="Jobs that wait or run.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="The highest level that its jobs may have.")
@click.option("--model", "models", multiple=True, help="A model that it may use; may be repeated.")
@config_option
def create(name: str, admin: bool, config: tuple[str, ...], **limits: Any) -> None:
    """Make a key and print it: the only time that it is shown. Limits left out do not limit."""
    if limits["burst"] and not limits["requests_per_minute"]:
        raise click.UsageError("--burst needs --requests-per-minute")
    try:
        allowed = Limits(**given(limits))
        with _store(read_settings(config)) as store:
            key, secret = store.create(name, allowed, admin=admin)
    except ValueError:  # what the options let through is the name alone
        raise click.UsageError(
            f"NAME: up to 64 letters, digits or _.-, the first a letter or digit (got {name!r})"
        ) from None
    click.echo(f"{key.id}, sha256 {key.digest}", err=True)
    click.echo(secret)


@keys.command("list")
@config_option
def list_(config: tuple[str, ...]) -> None:
    """One line each, the oldest first: name, id, time in UTC, and what it may do. No secrets are kept."""
    settings = read_settings(config)
    configured = [key.api_key() for key in settings.api.keys or ()]
    with _store(settings) as store:
        for key in (*configured, *store.all()):
            click.echo("  ".join(_row(key)))


@keys.command()
@click.argument("key", metavar="NAME|ID")
@config_option
def revoke(key: str, config: tuple[str, ...]) -> None:
    """End a key for good. Its jobs go on; nobody but operators sees them any more."""
    with _store(read_settings(config)) as store:
        revoked = store.revoke(key)
    click.echo(f"revoked {revoked.name} ({revoked.id})")


def _row(key: ApiKey) -> Iterator[str]:
    yield f"{key.name:<16}"
    yield key.id
    yield "in the settings    " if key.created_ms is None else _time(key.created_ms)
    if key.revoked_ms is not None:
        yield f"revoked {_time(key.revoked_ms)}"
        return
    yield "admin" if key.admin else "client"
    for name in Limits.model_fields:
        if (value := getattr(key, name)) is not None:
            yield f"{name} {','.join(value) if isinstance(value, tuple) else value}"


def _time(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, timezone.utc):%Y-%m-%d %H:%M:%S}"


@contextmanager
def _store(settings: Settings) -> Iterator[KeyStore]:
    """The keys of the service that these settings describe. Raises as `connect` and EmbeddedValkey do."""
    with ExitStack() as stack:
        url = settings.redis.url or _embedded(settings, stack)
        yield KeyStore(stack.enter_context(connect(url)), settings.redis.prefix)


def _embedded(settings: Settings, stack: ExitStack) -> str:
    """The Valkey of a `wicore up` that runs; or else one that is started on its data until `stack` ends."""
    valkey = EmbeddedValkey(data_folder(settings, os.environ))
    try:
        with Redis.from_url(valkey.url, retry=None) as client:
            client.ping()
    except ConnectionError:
        stack.enter_context(valkey)
    return valkey.url
