"""The `wicore` command.

Each subcommand's module is imported when it is run, so that `wicore --help` stays instant.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import click

from wicore import __version__
from wicore.errors import WicoreError
from wicore.exit_codes import ExitCode, exit_code


class _Lazy(NamedTuple):
    where: str
    """module:attribute of the click command."""
    summary: str


COMMANDS = {
    "up": _Lazy("wicore.commands.up:up", "Run the whole service: Redis, API and worker."),
    "worker": _Lazy("wicore.commands.worker:worker", "Run one worker for a service that runs elsewhere."),
    "chat": _Lazy("wicore.commands.chat:chat", "Talk to the model in the terminal."),
    "submit": _Lazy("wicore.commands.jobs:submit", "Put a job on the queue."),
    "watch": _Lazy("wicore.commands.jobs:watch", "Stream a job's text, from its start or any point."),
    "cancel": _Lazy("wicore.commands.jobs:cancel", "Cancel a job."),
    "dead": _Lazy("wicore.commands.dead:dead", "Look at messages given up; try them again or drop them."),
    "keys": _Lazy("wicore.commands.keys:keys", "Make, list and revoke API keys."),
    "doctor": _Lazy("wicore.commands.doctor:doctor", "Check everything the service needs, and say the fix."),
    "config": _Lazy("wicore.commands.config:config", "Show the settings and where each came from."),
    "model": _Lazy("wicore.commands.model:model", "Fetch and inspect checkpoints."),
    "plan": _Lazy("wicore.commands.plan:plan", "Build and list the GPU engine's TensorRT plans."),
    "kv": _Lazy("wicore.commands.kv:kv", "Replay request traces through the KV cache."),
    "bench": _Lazy("wicore.commands.bench:bench", "Measure the engine, the service and the cache."),
}

EPILOG = """\
\b
Examples:
  wicore model fetch gemma-3-270m       download a small model, once
  wicore up                             serve it on http://127.0.0.1:8000
  wicore submit "Once upon a time"      put a job on the queue; prints its id
  wicore watch JOB                      stream its text
  wicore up --config configs/mine.yaml  with settings of your own
  WICORE_API__PORT=9000 wicore up       or from the environment

\b
Exit codes:
""" + "\n".join(f"  {code.value:<4}{code.name.lower()}" for code in ExitCode)


class _Failure(click.ClickException):
    """A WicoreError on its way to the terminal: one line, and its exit code."""

    def __init__(self, err: WicoreError) -> None:
        super().__init__(err.message)
        self.exit_code = exit_code(err)  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].where.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WicoreError as err:
            if ctx.params["debug"]:
                raise
            raise _Failure(err) from None
        except KeyboardInterrupt:
            ctx.exit(ExitCode.INTERRUPTED)


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wicore")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Gemma 3 served from a Redis message queue, with token-level durability."""
