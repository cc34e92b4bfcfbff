"""`wicore dead`: messages that were given up, from the command line."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import click

from wicore.client import Client
from wicore.commands.options import Function, service_url, url_option
from wicore.errors import InvalidRequest, UnknownDeadLetter
from wicore.exit_codes import ExitCode


def one_or_all(function: Function) -> Function:
    """`[ID]` and `--all` as the parameters `letter` and `every`; see `check_one_or_all`."""
    every = click.option("--all", "every", is_flag=True, help="All of them.")
    return click.argument("letter", metavar="[ID]", required=False)(every(function))


def check_one_or_all(letter: str | None, every: bool) -> None:
    """Raises UsageError unless exactly one of the two was given."""
    if (letter is None) != every:
        raise click.UsageError("give either the ID of a dead letter or --all")


@click.group()
def dead() -> None:
    """Messages that were given up: malformed, or every attempt's worker died.

    \b
    Examples:
      wicore dead list
      wicore dead show 1795484880123-7
      wicore dead retry 1795484880123-7
      wicore dead drop --all
    """


@dead.command("list")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many of the newest.")
@url_option
def list_(limit: int | None, url: str | None) -> None:
    """One line each, newest first: id, time in UTC, level, job, reason."""
    with Client(service_url(url)) as client:
        for letter in client.dead_letters(limit):
            at = datetime.fromtimestamp(letter["at_ms"] / 1000, timezone.utc)
            reason = " ".join(letter["reason"].split())
            what = (letter["id"], f"{at:%Y-%m-%d %H:%M:%S}", letter["priority"], letter["job"] or "-", reason)
            click.echo("  ".join(what))


@dead.command()
@click.argument("letter", metavar="ID")
@url_option
def show(letter: str, url: str | None) -> None:
    """Print one as JSON, with its whole message."""
    with Client(service_url(url)) as client:
        click.echo(json.dumps(client.dead_letter(letter), indent=2, ensure_ascii=False))


@dead.command()
@one_or_all
@url_option
def retry(letter: str | None, every: bool, url: str | None) -> None:
    """Put it on the queue again as a new job, and print that job's id.

    With --all, those of which no job can be made stay, each with a line that says why.
    """
    check_one_or_all(letter, every)
    with Client(service_url(url)) as client:
        if letter is not None:
            click.echo(client.retry(letter).id)
        elif not _retry_all(client):
            raise click.exceptions.Exit(ExitCode.FAILED)


def _retry_all(client: Client) -> bool:
    well = True
    # All ids first: what is retried leaves the list, and may come back to it under a new one.
    for letter in [letter["id"] for letter in client.dead_letters()]:
        try:
            click.echo(client.retry(letter).id)
        except (InvalidRequest, UnknownDeadLetter) as err:
            click.echo(f"error: {err.message}", err=True)
            well = False
    return well


@dead.command()
@one_or_all
@url_option
def drop(letter: str | None, every: bool, url: str | None) -> None:
    """Throw it away for good."""
    check_one_or_all(letter, every)
    with Client(service_url(url)) as client:
        if letter is None:
            click.echo(f"dropped {client.drop_all()}")
        else:
            client.drop(letter)
