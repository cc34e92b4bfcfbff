"""`wicore config`: what is set, and from where."""

from __future__ import annotations

import click

from wicore.commands.options import config_option
from wicore.config import FIELDS, default_yaml, load_with_sources, scalar, shown


@click.group()
def config() -> None:
    """Show the settings and where each came from."""


@config.command()
@config_option
def show(config: tuple[str, ...]) -> None:
    """Print the settings in force as YAML, each with its source."""
    settings, sources = load_with_sources(config or None)
    values = shown(settings)
    section = ""
    for key in FIELDS:
        if not key.startswith(f"{section}."):
            section = key.split(".")[0]
            click.echo(f"{section}:")
        name = key.split(".")[1]
        click.echo(f"  {name}: {scalar(values[key])}  # {sources[key]}")


@config.command()
def defaults() -> None:
    """Print every setting with its default and meaning: a settings file to start from."""
    click.echo(default_yaml(), nl=False)
