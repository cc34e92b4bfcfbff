"""`wicore chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from wicore.client import Client
from wicore.commands.images import image_part, question
from wicore.commands.jobs import given, sampling_options
from wicore.commands.options import service_url, url_option
from wicore.errors import WicoreError

HELP = (
    "/image FILE shows an image with the next question, /reset forgets the conversation, /quit ends it, "
    "Ctrl-C stops an answer."
)


@click.command()
@click.option("--system", help="Instructions for the whole conversation.")
@sampling_options
@url_option
def chat(system: str | None, url: str | None, **fields: Any) -> None:
    """Talk to the model in the terminal.

    Each question is sent with the conversation before it. /image FILE shows an image with the next
    question, /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer; what was
    said until then is kept.

    \b
    Examples:
      wicore chat
      wicore chat --system "Answer in one sentence." --temperature 0.7
    """
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages = list(opening)
    images: list[dict[str, Any]] = []
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() editing and history)

        click.echo(HELP)
    with Client(service_url(url)) as client:
        while (line := _question()) is not None:
            if line == "/quit":
                return
            if line == "/reset":
                messages = list(opening)
                images.clear()
                click.echo("The conversation starts anew.")
            elif line.startswith("/image "):
                _attach(images, line.removeprefix("/image ").strip())
            elif line.startswith("/"):
                click.echo(HELP)
            elif line:
                _turn(client, messages, question(line, images), given(fields))
                images.clear()


def _attach(images: list[dict[str, Any]], name: str) -> None:
    """Have the next question show a file."""
    try:
        images.append(image_part(Path(name).expanduser()))
    except OSError as err:
        click.echo(f"{name}: {err.strerror}", err=True)
        return
    click.echo(f"{name} goes with the next question.")


def _question() -> str | None:
    """The next line; None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            click.echo(f"\n{HELP}")


def _turn(
    client: Client, messages: list[dict[str, Any]], asked: dict[str, Any], fields: dict[str, Any]
) -> None:
    """Ask, stream the answer, and add both to the conversation, unless there was no answer."""
    answer = ""
    try:
        job = client.submit(
            {"kind": "chat", "messages": [*messages, asked], "priority": "interactive", **fields}
        )
        try:
            for text in job.stream():
                answer += text
                click.echo(text, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            job.cancel()
            click.echo(" [stopped]", nl=False)
        click.echo()
    except WicoreError as err:
        click.echo(f"\nerror: {err.message}", err=True)
    if answer:
        messages += [asked, {"role": "assistant", "content": answer}]
