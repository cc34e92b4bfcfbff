"""`wicore plan`: build TensorRT plans, look at those there are."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from wicore.commands.options import config_option, read_settings
from wicore.errors import CheckpointError, ConfigError, EngineError
from wicore.gemma3.checkpoint import open_checkpoint, resolve_model
from wicore.gemma3.config import Gemma3Config, published

if TYPE_CHECKING:
    from wicore.engine.tensorrt.networks import HalfType
    from wicore.engine.tensorrt.plans import BuiltPlan, PlanEntry
    from wicore.engine.tensorrt.trt_api import Backend, BackendName, Card

BACKENDS: tuple[BackendName, ...] = ("tensorrt", "tensorrt_rtx")


@click.group()
def plan() -> None:
    """Build and list the TensorRT plans of the GPU engine.

    A plan holds no weights: a few hundred kilobytes serve every layer of every model of one shape.
    """


@plan.command("build")
@config_option
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="Default: tensorrt where it is installed, else tensorrt_rtx.",
)
@click.option(
    "--compute-capability",
    metavar="X.Y",
    help="Of the card to build for; default: this machine's. tensorrt builds for no other.",
)
@click.option(
    "--jobs",
    type=click.IntRange(0),
    default=0,
    help="Plans built at a time; default: one a core, or one where building measures on the card.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16"]),
    default="float16",
    show_default=True,
    help="16-bit type of weights and activations.",
)
@click.option("--rows", metavar="N,N,...", help="Instead of engine.plan_rows, all of them.")
@click.option("--rebuild", is_flag=True, help="Build those that are there, too.")
def build_command(
    config: tuple[str, ...],
    backend: str | None,
    compute_capability: str | None,
    jobs: int,
    dtype: str,
    rows: str | None,
    rebuild: bool,
) -> None:
    """Build the plans of the configured model that are not there yet.

    \b
    Examples:
      wicore plan build --config configs/gemma-3-27b.yaml
      wicore plan build --config configs/gemma-3-27b.yaml --backend tensorrt_rtx --compute-capability 8.9
    """
    from wicore.engine.tensorrt.networks import SegmentShape
    from wicore.engine.tensorrt.plans import (
        PlanCache,
        build_missing,
        parse_buckets,
        plan_keys,
        plans_folder,
        useful_buckets,
    )
    from wicore.engine.tensorrt.vision_kernels import vision_kinds
    from wicore.engine.tensorrt.vision_networks import VisionShape

    settings = read_settings(config)
    if rows is not None:
        try:
            buckets = parse_buckets(rows)
        except ValueError as err:
            raise click.UsageError(f"--rows: {err}") from None
    else:
        scheduler = settings.scheduler
        most = max(scheduler.token_budget, scheduler.max_batch)
        buckets = useful_buckets(parse_buckets(settings.engine.plan_rows), most)
    model = _model_config(settings.model.path)
    chosen = _backend(backend)
    capability = compute_capability or _capability_here(chosen)
    half: HalfType = "bfloat16" if dtype == "bfloat16" else "float16"
    keys = plan_keys(chosen, capability, SegmentShape.of(model), buckets, half=half)
    if model.vision is not None:
        major, minor = map(int, capability.split("."))
        shape = VisionShape.of(model)
        kinds = vision_kinds((major, minor), shape)
        keys += plan_keys(chosen, capability, shape, (), half=half, kinds=kinds)
    cache = PlanCache(plans_folder())
    if rebuild:
        cache.remove(keys)
    started = time.monotonic()
    built = build_missing(
        cache,
        keys,
        jobs=jobs,
        on_built=_tell,
    )
    click.echo(
        f"{len(keys)} plans of {chosen.name} {chosen.version} for compute capability {capability} in "
        f"{cache.folder}; {len(built)} built in {time.monotonic() - started:.1f} s"
    )


@plan.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
def list_command(as_json: bool) -> None:
    """Show every plan: what it is for, its size and age, and whether it fits this machine."""
    from wicore.engine.tensorrt.plans import PlanCache, plans_folder
    from wicore.engine.tensorrt.trt_api import find_card, installed_backends

    cache = PlanCache(plans_folder())
    card = find_card()
    versions = {backend.name: backend.version for backend in installed_backends()}
    now = time.time()
    lines = []
    for entry in cache.entries():
        misfit = _misfit(entry, card, versions)
        lines.append(
            {
                "path": str(entry.path),
                "key": dataclasses.asdict(entry.key) if entry.key else None,
                "bytes": entry.nbytes,
                "age_s": round(max(0.0, now - entry.modified), 1),
                "fits": misfit is None,
                "reason": misfit,
            }
        )
        if not as_json:
            click.echo(_row(entry, now, misfit))
    if as_json:
        click.echo(json.dumps(lines))
    elif not lines:
        click.echo(f"no plans in {cache.folder}; `wicore plan build` makes them", err=True)


def _tell(built: BuiltPlan) -> None:
    if not sys.stderr.isatty():  # there the bar tells
        click.echo(f"{built.key.label}: {built.nbytes / 1000:,.0f} kB in {built.seconds:.1f} s", err=True)


def _model_config(name_or_path: str) -> Gemma3Config:
    """Of the checkpoint; a published model's name is enough, since plans hold no weights."""
    try:
        return open_checkpoint(resolve_model(name_or_path)).config
    except CheckpointError:
        known = published(name_or_path)
        if known is None:
            raise
        return known


def _backend(name: str | None) -> Backend:
    from wicore.engine.tensorrt.trt_api import installed_backends, load_backend

    for known in BACKENDS:
        if name == known:
            return load_backend(known)
    found = installed_backends()
    if not found:
        raise EngineError(
            "no TensorRT is installed; install it with pip install 'wicore[gpu]', or 'wicore[rtx]' to build "
            "for an RTX card that need not be here"
        )
    return found[0]


def _capability_here(backend: Backend) -> str:
    from wicore.engine.tensorrt.trt_api import find_card

    card = find_card()
    if card is None:
        fix = "say which with --compute-capability, e.g. 8.9"
        if not backend.ahead_of_time:
            fix = "run this where the card is, or build with --backend tensorrt_rtx --compute-capability 8.9"
        raise ConfigError(f"there is no GPU here to build for; {fix}", param="--compute-capability")
    return card.capability


def _misfit(entry: PlanEntry, card: Card | None, versions: Mapping[BackendName, str]) -> str | None:
    """Why a plan cannot be used here; None when it can."""
    key = entry.key
    if entry.problem is not None or key is None:
        return entry.problem
    if key.backend not in versions:
        return f"{key.backend} is not installed"
    if versions[key.backend] != key.version:
        return f"{key.backend} {versions[key.backend]} is installed"
    if card is None:
        return "no GPU here"
    if card.capability != key.capability:
        return f"the GPU here is {card.capability}"
    return None


def _row(entry: PlanEntry, now: float, misfit: str | None) -> str:
    shown = _age(now - entry.modified)
    size = f"{entry.nbytes / 1000:,.0f} kB"
    fits = "fits" if misfit is None else f"does not fit: {misfit}"
    if entry.key is None:
        return f"{entry.path.name:<60}  {size:>9}  {shown:>7}  {fits}"
    key = entry.key
    what = (
        f"{key.kind:<16} {key.rows:>5} rows  {key.half}  hidden {key.shape.hidden}, inner {key.shape.inner}"
    )
    where = f"{key.backend} {key.version} on {key.capability}"
    return f"{what:<60}  {where}  {size:>9}  {shown:>7}  {fits}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds) / 60:.0f} min"
