"""`wicore kv`: what the tiers of the KV cache would do."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import click

from wicore.exit_codes import ExitCode

POSITIVE = click.FloatRange(0, min_open=True)
PLOTS = (".png", ".svg", ".pdf")


@click.group()
def kv() -> None:
    """Study the KV cache."""


@kv.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", default="gemma-3-27b", show_default=True, help="Whose KV; a published size.")
@click.option(
    "--device-gb",
    "devices",
    multiple=True,
    type=POSITIVE,
    default=(10, 20, 40, 80),
    show_default=True,
    help="KV memory of the device; several draw a curve.",
)
@click.option("--host-gb", default=200.0, show_default=True, type=click.FloatRange(0), help="0: none.")
@click.option("--nvme-gb", default=2000.0, show_default=True, type=click.FloatRange(0), help="0: none.")
@click.option(
    "--host-gbps", default=50.0, show_default=True, type=POSITIVE, help="GB/s between device and host."
)
@click.option(
    "--nvme-gbps", default=6.0, show_default=True, type=POSITIVE, help="GB/s between host and file."
)
@click.option("--prefill", default=12_000.0, show_default=True, type=POSITIVE, help="Prompt tokens a second.")
@click.option(
    "--decode-ms", default=20.0, show_default=True, type=click.FloatRange(0), help="Time an output token."
)
@click.option(
    "--pace",
    default=0.1,
    show_default=True,
    type=POSITIVE,
    help="Speed of the trace's clock: 0.1 is ten times slower.",
)
@click.option(
    "--window-share", default=0.5, show_default=True, type=click.FloatRange(0, 1), help="As hmt.window_share."
)
@click.option(
    "--checkpoint-tokens",
    default=8192,
    show_default=True,
    type=click.IntRange(0),
    help="As hmt.checkpoint_tokens.",
)
@click.option("--limit", type=click.IntRange(1), help="Replay so many requests only.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(["a2cr", "lru", "lfu", "arc", "slru", "opt"]),
    help="[default: all; opt knows the future]",
)
@click.option(
    "--attention",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Attention recorded from a model, for requests of the trace that have none.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves: .png, .svg, .pdf."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line a replay instead of a table.")
def simulate(plot: Path | None, as_json: bool, **options: object) -> None:
    """Replay a request trace through the real cache manager.

    TRACE has one JSON object a line: timestamp (ms), input_length, output_length, hash_ids (of the prompt's
    blocks of 512 tokens, or of `block_tokens` where the first line says so), and, if recorded, attention
    (of each block, 1 being an even spread).
    """
    from wicore.bench.traces import Study, curves, read_trace

    if plot is not None:
        _require_plot(plot)
    try:
        study = Study.of(**options)
        requests = read_trace(study.trace, study.pace, study.limit, study.attention)
        study.check()
    except ValueError as err:
        raise click.UsageError(str(err)) from None
    lines = []
    for line in study.run(requests, progress=lambda text: click.echo(text, err=True)):
        lines.append(line)
        click.echo(json.dumps(line) if as_json else study.row(line, first=len(lines) == 1))
    if plot is not None:
        curves(lines, plot)


def _require_plot(path: Path) -> None:
    """What a replay of minutes must not end with."""
    if path.suffix not in PLOTS:
        raise click.UsageError(f"--plot: {path} must end in one of {', '.join(PLOTS)}")
    if find_spec("matplotlib") is None:
        click.echo("error: --plot needs matplotlib: pip install 'wicore[bench]'", err=True)
        raise SystemExit(ExitCode.CONFIG)
