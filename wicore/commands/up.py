"""`wicore up`: the whole service, as the Procfile lists it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
from honcho.environ import parse_procfile
from redis import ConnectionError, Redis, TimeoutError

from wicore.commands.options import base_url, config_option
from wicore.config import Settings, load_settings
from wicore.errors import ConfigError
from wicore.exit_codes import ExitCode
from wicore.supervisor.children import Reaper
from wicore.supervisor.supervisor import STOP_MARGIN_S, Supervisor

PROCFILE = Path(__file__).parent.parent / "Procfile"

READY = """\
ready at {url}, serving {model}; try:

  curl -N {url}/v1/completions -H 'Content-Type: application/json' -d '{{
    "prompt": "Once upon a time in a small village,",
    "max_tokens": 64, "temperature": 0.7, "top_p": 0.9, "stream": true}}'

Ctrl-C stops the service; accepted jobs are kept and go on at the next start."""


@click.command()
@config_option
@click.option("--port", type=int, help="Port of the API; as WICORE_API__PORT.")
@click.option("--model", metavar="PATH", help="Checkpoint folder, GGUF file or name; as WICORE_MODEL__PATH.")
@click.option(
    "--procfile",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=PROCFILE,
    help="The processes to run, one `name: command` a line, in the order to stop them.",
)
@click.pass_context
def up(
    ctx: click.Context, config: tuple[str, ...], port: int | None, model: str | None, procfile: Path
) -> None:
    """Run the whole service: Redis, API, worker and tasks.

    With redis.url unset, an embedded Valkey keeps the jobs in a private data folder. A process that
    dies is started again. Ctrl-C or SIGTERM stops: the API takes no more requests, the worker finishes
    what it can in queue.drain_s seconds and hands the rest back, then Valkey saves. A second Ctrl-C
    kills at once; even then nothing accepted is lost.

    \b
    Examples:
      wicore up
      wicore up --config configs/gemma-3-27b.yaml --port 9000
      WICORE_REDIS__URL=redis://queue.example:6379/0 wicore up
    """
    overrides = {"api.port": port, "model.path": model}
    settings = load_settings(config or None, overrides=overrides)
    commands = read_procfile(procfile)
    require_free_port(settings)
    signal.signal(signal.SIGTERM, _leave)
    with ExitStack() as stack:
        reaper = stack.enter_context(Reaper(settings.queue.drain_s + STOP_MARGIN_S))
        url, fault = _redis(settings, reaper, stack)
        env = child_environment(os.environ, config, settings, url)
        supervisor = Supervisor(
            commands,
            env,
            reaper,
            sys.stdout,
            settings.queue.drain_s,
            ready=lambda: answers(f"{base_url(settings)}/ready"),
            on_ready=lambda: supervisor.say(ready_text(settings)),
            fault=fault,
        )
        supervisor.say(
            f"starting {', '.join(commands)}; engine {settings.engine.kind}, model {settings.model.path}"
        )
        result = supervisor.run()
    ctx.exit(result)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM before the supervisor runs: unwind, so that what has started is stopped."""
    raise SystemExit(ExitCode.OK)


def _redis(settings: Settings, reaper: Reaper, stack: ExitStack) -> tuple[str, Callable[[], str | None]]:
    """The URL of Redis, and what tells that it failed; an embedded one stops with `stack`."""
    if settings.redis.url is not None:
        return settings.redis.url, lambda: None
    from wicore.queue.embedded import EmbeddedValkey

    folder = data_folder(settings, os.environ)
    valkey = stack.enter_context(EmbeddedValkey(folder))
    assert valkey.pid is not None
    # It leads a group. Told to stop, it stays if it cannot save (a full disk), so it must be known here.
    reaper.watch(valkey.pid)
    client = stack.enter_context(Redis.from_url(valkey.url, socket_timeout=1.0, retry=None))

    def fault() -> str | None:
        try:
            client.ping()
        except TimeoutError:
            return None  # busy, not dead
        except ConnectionError:
            return f"the embedded Valkey died, see valkey.log in {folder}; stopping"
        return None

    return valkey.url, fault


def data_folder(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Where the embedded Valkey keeps the jobs: redis.data_dir, else in the user's data folder."""
    if settings.redis.data_dir is not None:
        return Path(settings.redis.data_dir)
    return Path(environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "wicore" / "valkey"


def read_procfile(path: Path) -> dict[str, str]:
    """Name to command, in the file's order. Raises ConfigError when it lists none, or one twice."""
    try:
        commands: dict[str, str] = dict(parse_procfile(path.read_text()).processes)
    except (AssertionError, OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not a Procfile: {err}") from None
    if not commands:
        raise ConfigError(f"{path}: lists no process; a line is `name: command`")
    return commands


def require_free_port(settings: Settings) -> None:
    """Raises ConfigError when the API could not listen where the settings say."""
    host, port = settings.api.host, settings.api.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as err:
        raise ConfigError(
            f"api.port: cannot listen on {host}:{port}: {err.strerror or err}; stop what uses the port, or "
            f"choose another: wicore up --port {port + 1 if port < 65535 else 8000}, or WICORE_API__PORT",
            param="api.port",
        ) from None


def child_environment(
    environ: Mapping[str, str], config: tuple[str, ...], settings: Settings, redis_url: str
) -> dict[str, str]:
    """What the children see: the same settings as this process, and this Python first in PATH."""
    env = {
        **environ,
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "WICORE_REDIS__URL": redis_url,
        "WICORE_API__PORT": str(settings.api.port),
        "WICORE_MODEL__PATH": settings.model.path,
    }
    if config:
        env["WICORE_CONFIG"] = os.pathsep.join(map(os.path.abspath, config))
    return env


def ready_text(settings: Settings) -> str:
    model = settings.model.name or Path(settings.model.path).name
    return READY.format(url=base_url(settings), model=model)


def answers(url: str) -> bool:
    """Whether a GET of `url` answers 200 within a second; no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=1):
            return True
    except (OSError, ValueError):
        return False
