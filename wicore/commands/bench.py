"""`wicore bench`: measurements as JSON lines."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from typing import cast

import click

from wicore.commands.options import config_option
from wicore.config import load_settings


@click.group()
def bench() -> None:
    """Measure the engine, the service and the cache: one JSON line a measurement.

    Each line names the hardware and the setting, and the engine's the share of the bandwidth or compute
    ceiling, which is measured in the same run.
    """


@bench.command()
@config_option
@click.option("--engine", "kind", type=click.Choice(["cpu"]), default="cpu", show_default=True)
@click.option("--peer", type=click.Choice(["llama.cpp"]), help="Measure it in the same run.")
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 8, 16), show_default=True
)
@click.option("--context", default=128, show_default=True, help="Prompt tokens before decoding.")
@click.option("--prompt", "prompts", multiple=True, type=click.IntRange(1), default=(512,), show_default=True)
@click.option("--steps", default=32, show_default=True, help="Decode steps a round.")
@click.option("--rounds", default=5, show_default=True)
def engine(
    config: tuple[str, ...],
    kind: str,
    peer: str | None,
    batches: tuple[int, ...],
    context: int,
    prompts: tuple[int, ...],
    steps: int,
    rounds: int,
) -> None:
    """Decode and prefill rates of an engine, sampling included, beside a peer's."""
    import os

    from wicore.bench.engine import Ours, measure
    from wicore.bench.hardware import measure_ceiling
    from wicore.bench.peer_llama import LlamaCpp
    from wicore.engine.factory import create_engine
    from wicore.gemma3.checkpoint import models_folder
    from wicore.model import load_model

    overrides = {"engine.kind": kind, "scheduler.max_batch": max(*batches, 1)}
    settings = load_settings(config or None, overrides=overrides)
    model = load_model(settings)
    threads = settings.engine.threads or os.cpu_count() or 1
    ceiling = measure_ceiling(threads)
    built = create_engine(settings, model)
    ours = Ours(built, settings.scheduler.max_batch, max(settings.scheduler.token_budget, *prompts))
    other = None
    if peer:
        longest = max(context + steps + 8, *prompts)
        models_folder().mkdir(parents=True, exist_ok=True)
        other = LlamaCpp(model.checkpoint, models_folder(), threads, max(batches), longest)
    _print(
        {
            "measurement": "ceiling",
            "read_gb_s": round(ceiling.read_gb_s, 1),
            "int8_gflop_s": round(ceiling.int8_gflop_s),
        }
    )
    for line in measure(
        ours,
        other,
        model.checkpoint.config,
        built.info.layout,
        ceiling,
        batches=batches,
        context=context,
        prompts=prompts,
        steps=steps,
        rounds=rounds,
    ):
        _print({"model": model.name, **line})
    _print(
        {"measurement": "memory", "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    )


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
def service(config: tuple[str, ...], jobs: int, rate: float, seconds: float, port: int) -> None:
    """Throughput, latency and told waits of queue, worker and API around an engine that computes nothing."""
    from wicore.bench.processes import Setting
    from wicore.bench.service import estimates, latency, saturated

    setting = Setting(model=load_settings(config or None).model.path, port=port)
    _print(saturated(setting, jobs))
    _print(latency(setting, rate, seconds))
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
