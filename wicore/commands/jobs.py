"""`wicore submit`, `watch` and `cancel`: jobs from the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from wicore.client import Client
from wicore.client.wire import failure_of
from wicore.commands.images import image_part, question
from wicore.commands.options import Function, service_url, url_option
from wicore.exit_codes import ExitCode
from wicore.request import TERMINAL_TYPES, Event, Priority

PRIORITIES = [level.name.lower() for level in Priority]
SAMPLING = (
    click.option("--max-tokens", type=int, help="Longest answer, in tokens."),
    click.option("--temperature", type=float, help="0 always takes the likeliest token."),
    click.option("--top-p", type=float, help="Draw from the smallest set with this probability."),
    click.option("--top-k", type=int, help="Draw from this many likeliest tokens; 0 is off."),
    click.option("--min-p", type=float, help="Drop tokens less likely than this share of the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1 makes what was said less likely."),
    click.option("--presence-penalty", type=float, help="As in OpenAI's API."),
    click.option("--frequency-penalty", type=float, help="As in OpenAI's API."),
    click.option("--seed", type=int, help="The same seed and prompt give the same text."),
    click.option("--stop", multiple=True, help="End before this text; may be repeated."),
)


def sampling_options(function: Function) -> Function:
    """The fields of a job that say how tokens are drawn, as parameters of the same names."""
    for option in reversed(SAMPLING):
        function = option(function)
    return function


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that were set on the command line; the service has the defaults, and checks them."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
        if value is not None and value != ()
    }


@click.command()
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Send PROMPT as a chat message, not as text to continue.")
@click.option("--system", help="Instructions before the chat message; implies --chat.")
@click.option(
    "--image",
    "images",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Show this file before the chat message; may be repeated; implies --chat.",
)
@sampling_options
@click.option("--priority", type=click.Choice(PRIORITIES), help="Which jobs it goes before.")
@click.option("--timeout", "timeout_s", type=float, help="Seconds until the job expires.")
@click.option("--wait/--no-wait", default=False, help="Stream the text until the job ends.")
@url_option
def submit(
    prompt: str,
    chat: bool,
    system: str | None,
    images: Sequence[Path],
    wait: bool,
    url: str | None,
    **fields: Any,
) -> None:
    """Put a job on the queue and print its id. PROMPT - is read from standard input.

    \b
    Examples:
      wicore submit "Once upon a time in a small village," --max-tokens 64
      wicore submit --wait --temperature 0.7 --top-p 0.9 "The sea was calm"
      wicore submit --chat --priority batch - < question.txt
      wicore submit --wait --image cat.jpg "What is this?"
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    body = given(fields)
    if chat or images or system is not None:
        messages = [{"role": "system", "content": system}] if system is not None else []
        body |= {"kind": "chat", "messages": [*messages, question(text, map(image_part, images))]}
    else:
        body |= {"kind": "completion", "prompt": text}
    with Client(service_url(url)) as client:
        job = client.submit(body)
        # With --wait standard output is the text alone, so that it can be piped on.
        click.echo(job.id, err=wait)
        if wait:
            show(job.events())


@click.command()
@click.argument("job")
@click.option("--from", "start", type=click.IntRange(min=1), default=1, help="First event to show.")
@url_option
def watch(job: str, start: int, url: str | None) -> None:
    """Stream the text of JOB, whether it waits, runs or has ended.

    A dropped connection is taken up again where it broke, with no gap and no repeat.

    \b
    Examples:
      wicore watch 6f0c1b0e-...
      wicore watch 6f0c1b0e-... --from 120
    """
    with Client(service_url(url)) as client:
        show(client.job(job).events(start))


@click.command()
@click.argument("job")
@url_option
def cancel(job: str, url: str | None) -> None:
    """Cancel JOB. A job that has ended stays as it ended; that is no error.

    \b
    Example:
      wicore cancel 6f0c1b0e-...
    """
    with Client(service_url(url)) as client:
        record = client.job(job).cancel()
    status = record["status"]
    click.echo(f"{job} {'is being cancelled' if status in ('queued', 'running') else status}")


def show(events: Iterable[Event]) -> None:
    """Print a job's text as it comes. Exits with FAILED when the job did not end well.

    The first choice streams; the others, which run beside it, follow once all have ended.
    """
    others: dict[int, list[str]] = {}
    for event in events:
        if event["type"] == "token" and event["index"] == 0:
            click.echo(event["text"], nl=False)
            sys.stdout.flush()
        elif event["type"] == "token":
            others.setdefault(event["index"], []).append(event["text"])
        elif event["type"] in TERMINAL_TYPES:
            click.echo()
            for index, texts in sorted(others.items()):
                click.echo(f"--- choice {index} ---\n{''.join(texts)}")
            if (err := failure_of(event)) is not None:
                click.echo(f"error: {err.message}", err=True)
                raise click.exceptions.Exit(ExitCode.FAILED)
