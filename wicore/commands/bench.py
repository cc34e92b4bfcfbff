"""`wicore bench`: measurements as JSON lines."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click

from wicore.commands.options import config_option
from wicore.config import load_settings


@click.group()
def bench() -> None:
    """Measure the engine, the service and the cache: one JSON line a measurement.

    Each line names the hardware and the setting, and the engine's the share of the bandwidth or compute
    ceiling, which is measured in the same run.
    """


_MEASUREMENTS = ("decode", "prefill", "ready", "stream", "first-token", "throughput", "restore")
_USUAL = {"cpu": _MEASUREMENTS[:2], "tensorrt": _MEASUREMENTS[2:], "null": _MEASUREMENTS[2:]}
"""What is measured of an engine unless it is said."""


@bench.command()
@config_option
@click.option("--engine", "kind", type=click.Choice(list(_USUAL)), default="cpu", show_default=True)
@click.option("--random", metavar="NAME", help="Made-up weights in the shape of this published model.")
@click.option(
    "--measure", "wanted", multiple=True, type=click.Choice(_MEASUREMENTS), help="[default: by engine]"
)
@click.option(
    "--peer", type=click.Choice(["llama.cpp"]), help="Measure it in the same run (decode, prefill)."
)
@click.option(
    "--peer-results",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Figures of a peer on the same card, to be printed beside ours (ready to throughput).",
)
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 8, 16), show_default=True
)
@click.option("--context", default=None, type=click.IntRange(1), help="Prompt tokens before decoding.")
@click.option(
    "--prompt", "prompts", multiple=True, type=click.IntRange(1), help="Tokens, of prefill, first-token."
)
@click.option(
    "--streams",
    multiple=True,
    type=click.IntRange(1),
    default=(16, 64),
    show_default=True,
    help="Of throughput, each 512 tokens in.",
)
@click.option(
    "--output", default=256, show_default=True, type=click.IntRange(2), help="Tokens, of stream, throughput."
)
@click.option(
    "--restored", default=32_000, show_default=True, type=click.IntRange(64), help="Tokens, of restore."
)
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Of restore's file.")
@click.option("--sampling", type=click.Choice(["greedy", "warm", "both"]), default="both", show_default=True)
@click.option("--steps", default=32, show_default=True, help="Decode steps a round.")
@click.option("--rounds", default=None, type=click.IntRange(1), help="[default: 5; 3 from ready to restore]")
@click.option("--profile", is_flag=True, help="Also where the time of a step goes, kernel by kernel.")
def engine(config: tuple[str, ...], **given: Any) -> None:
    """Decode and prefill rates of an engine, sampling included, beside a peer's.

    \b
    decode       a step of --batch sequences of --context tokens (128)
    prefill      the first token of one prompt (--prompt 512)
    ready        from nothing to an engine that can step
    stream       one sequence's rate after its first token (--context 1024, --output)
    first-token  of one prompt (--prompt 1024 and 8192)
    throughput   --streams sequences at once, 512 tokens in and --output out, from first to last
    restore      the first token of --restored tokens, computed, from host memory and from a file

    Prompts are random tokens; warm sampling is temperature 0.7, top-k 40, top-p 0.9.
    """
    from wicore.bench.run import EngineRun

    def progress(text: str) -> None:
        click.echo(text, err=True)

    if given["random"] and given["kind"] != "tensorrt":
        raise click.UsageError("--random: made-up weights are for --engine tensorrt")
    wanted = given.pop("wanted") or _USUAL[given["kind"]]
    if given["peer"] and not {"decode", "prefill"} & set(wanted):
        raise click.UsageError("--peer: is measured beside decode and prefill, and neither is wanted")
    with EngineRun(config, wanted=frozenset(wanted), progress=progress, **given) as run:
        for line in run.lines():
            _print(line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    _print({"measurement": "memory", "peak_rss_mb": peak})


@bench.command()
@config_option
@click.option("--windows", default=4, show_default=True, help="Texts of 384 tokens scored of each kind.")
@click.option("--of", "subject", type=click.Choice(["weights", "kv"]), default="weights", show_default=True)
def accuracy(config: tuple[str, ...], windows: int, subject: str) -> None:
    """How far 8-bit weights or 8-bit KV are from float32: agreement of the likeliest token, KL divergence.

    KV is compared with the weights that engine.weights names, also at the end of a text of 4,000 tokens.
    """
    from wicore.bench.accuracy import measure, measure_kv
    from wicore.engine.cpu.weights import WeightFormat
    from wicore.engine.sizing import weight_format
    from wicore.model import load_model

    settings = load_settings(config or None, overrides={"engine.kind": "cpu"})
    model, weights = load_model(settings), cast(WeightFormat, weight_format(settings.engine))
    kv = subject == "kv"
    for line in measure_kv(model, windows, weights) if kv else measure(model, windows):
        _print({"model": model.name, **line})


@bench.command()
@config_option
@click.option("--jobs", default=3000, show_default=True, help="Jobs of the saturated run.")
@click.option("--rate", default=100.0, show_default=True, help="Requests a second of the latency run.")
@click.option("--seconds", default=20.0, show_default=True, help="Length of the latency run.")
@click.option("--port", default=8099, show_default=True, help="Port of the API under test.")
@click.option("--slots", default=16, show_default=True, type=click.IntRange(1), help="Of the engine.")
@click.option("--step-ms", default=5.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--tokens", default=10, show_default=True, type=click.IntRange(1), help="Output of a job.")
@click.option("--only", type=click.Choice(["saturated", "latency", "estimates"]), help="[default: all three]")
def service(config: tuple[str, ...], jobs: int, rate: float, seconds: float, **given: Any) -> None:
    """Throughput, latency and told waits of queue, worker and API around an engine that computes nothing."""
    from wicore.bench.processes import Setting
    from wicore.bench.service import estimates, latency, saturated

    only = given.pop("only")
    setting = Setting(model=load_settings(config or None).model.path, **given)
    if only in (None, "saturated"):
        _print(saturated(setting, jobs))
    if only in (None, "latency"):
        _print(latency(setting, rate, seconds))
    if only in (None, "estimates"):
        _print(estimates(setting, jobs // 2))


@bench.command()
@click.option("--blocks", default=1_000_000, show_default=True, type=click.IntRange(1), help="Of the pool.")
@click.option(
    "--operations", default=10_000_000, show_default=True, type=click.IntRange(1), help="On the pool."
)
@click.option(
    "--sequences", default=200, show_default=True, type=click.IntRange(1), help="Of 32K tokens, managed."
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(["a2cr", "lru", "lfu", "arc", "slru"]),
    help="[default: all]",
)
def kv(blocks: int, operations: int, sequences: int, policies: tuple[str, ...]) -> None:
    """What the KV cache's bookkeeping costs: of one large pool, and of long sequences over three tiers."""
    from wicore.bench.kv import measure
    from wicore.hmt.policy import POLICIES

    def progress(text: str) -> None:
        click.echo(text, err=True)

    try:
        for line in measure(blocks, operations, sequences, policies or tuple(POLICIES), progress):
            _print(line)
    except ValueError as err:
        raise click.UsageError(str(err)) from None


def _print(line: Mapping[str, object]) -> None:
    click.echo(json.dumps(line))
