"""`wicore model`: fetch a model, look at one."""

from __future__ import annotations

import dataclasses
import json

import click

from wicore.commands.bars import Bars
from wicore.errors import CheckpointError
from wicore.gemma3.checkpoint import models_folder, open_checkpoint, resolve_model
from wicore.gemma3.config import published
from wicore.gemma3.fetch import REGISTRY, fetch
from wicore.gemma3.inspect import inspect, render


@click.group()
def model() -> None:
    """Fetch and inspect Gemma 3 checkpoints."""


@model.command("fetch")
@click.argument("name", default="gemma-3-270m")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def fetch_command(name: str, quiet: bool) -> None:
    """Download a model into the cache folder, once, and print where it is.

    \b
    Example:
      wicore model fetch gemma-3-270m
    """
    there = (models_folder() / name).is_dir()
    with Bars(disabled=quiet or there) as bars:
        path = fetch(name, bars.update)
    if not there:
        click.echo(REGISTRY[name].licence, err=True)
    click.echo(path)


@model.command("inspect")
@click.argument("name_or_path", default="gemma-3-270m")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def inspect_command(name_or_path: str, as_json: bool) -> None:
    """Print layers, parameters, and memory of weights and KV of a checkpoint.

    A published model's name works without its checkpoint: only the hyper-parameters are shown then.

    \b
    Examples:
      wicore model inspect ~/models/gemma-3-4b-it
      wicore model inspect gemma-3-27b
    """
    known = published(name_or_path)
    try:
        path = resolve_model(name_or_path)
    except CheckpointError:
        if known is None:
            raise
        report = inspect(name_or_path, known)
    else:
        checkpoint = open_checkpoint(path)
        report = inspect(
            str(checkpoint.path),
            checkpoint.config,
            stored_as=checkpoint.dtype,
            fingerprint=checkpoint.fingerprint,
        )
    click.echo(json.dumps(dataclasses.asdict(report)) if as_json else render(report))
