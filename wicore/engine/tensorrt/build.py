"""From the settings to the engine: what fits in the card's memory, then weights, plans and measurements.

All that can be too large is weighed before the weights are read, which takes a while.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

from tqdm import tqdm

from wicore.config import Settings
from wicore.engine.base import KVLayout, Pool
from wicore.engine.sizing import (
    device_blocks,
    fitting_blocks,
    kv_format,
    kv_layout,
    pool_bytes,
    tier_sizes,
    weight_format,
)
from wicore.engine.tensorrt.autotune import Choices, tuning_key
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.engine import TensorrtEngine
from wicore.engine.tensorrt.limits import Limits
from wicore.engine.tensorrt.plans import Tuning
from wicore.engine.tensorrt.segments import Segments
from wicore.engine.tensorrt.vision import (
    TensorrtVision,
    TowerNetworks,
    open_vision_networks,
    vision_bytes,
)
from wicore.engine.tensorrt.vision_weights import load_vision
from wicore.engine.tensorrt.weights import RandomWeights, load_weights
from wicore.engine.tensorrt.workspace import Workspace
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import Checkpoint
from wicore.gemma3.config import Gemma3Config, published
from wicore.hmt.tiers import longest_sequence

if TYPE_CHECKING:
    from wicore.model import Model

log = logging.getLogger("wicore.engine")

_SHARE_OF_FREE = 0.92
"""Of the card's free memory, unless a setting says how much; graphs and the driver need some, too."""


def create_tensorrt_engine(settings: Settings, model: Model) -> TensorrtEngine:
    """The engine for a checkpoint, ready to step.

    Raises EngineError, with what to install, set or free, where it cannot run; CheckpointError for bad
    weights.
    """
    checkpoint = model.checkpoint
    source = _Source(checkpoint.config, checkpoint, model.context, lambda: checkpoint.content_digest)
    engine = _on_card(settings, source)
    if settings.hmt.host_bytes == 0:
        engine.prepare()
    else:
        engine.prepare_when_used()
    return engine


def create_random_engine(name: str, settings: Settings) -> TensorrtEngine:
    """An engine with made-up weights in the shape of a published model, for text, to measure speed.

    Raises EngineError for an unknown name, and as `create_tensorrt_engine` does.
    """
    config = published(name)
    if config is None:
        raise EngineError(f"{name}: no published model; known are gemma-3-270m, 1b, 4b, 12b and 27b")
    config = replace(config, vision=None)
    context = min(config.max_context, settings.model.max_context or config.max_context)
    engine = _on_card(settings, _Source(config, RandomWeights(config), context, lambda: f"random {name}"))
    engine.prepare()
    return engine


@dataclass(frozen=True)
class _Source:
    """What weights there are to be."""

    config: Gemma3Config
    weights: Checkpoint | RandomWeights
    context: int
    """Longest sequence to serve."""
    content: Callable[[], str]
    """A digest of the weights; may take a while."""


def _on_card(settings: Settings, source: _Source) -> TensorrtEngine:
    from wicore.engine.tensorrt.cuda import CudaDevice

    device = CudaDevice(settings.engine.device_index)
    try:
        return build_engine(
            settings,
            source.config,
            device,
            source.weights,
            context=source.context,
            content=source.content,
            open_segments=lambda limits: open_segments(settings, source.config, device, limits),
            open_vision=lambda: open_vision_networks(source.config, device),
            tune=lambda limits, measure: tuned(device, source.config, limits, measure),
        )
    except BaseException:
        device.close()
        raise


def build_engine(
    settings: Settings,
    config: Gemma3Config,
    device: Device,
    weights: Checkpoint | RandomWeights,
    *,
    context: int,
    content: Callable[[], str],
    open_segments: Callable[[Limits], Segments | None] = lambda limits: None,
    open_vision: Callable[[], TowerNetworks | None] = lambda: None,
    tune: Callable[[Limits, Callable[[], Choices]], Choices] | None = None,
) -> TensorrtEngine:
    """An engine on this device, within its budget of memory. Raises EngineError when that is too small.

    `content` gives a digest of the weights, on a thread of its own: it reads all of them. `open_vision` gives
    what runs the tower of a model that has one.
    """
    weight_format(settings.engine)  # another than ours is an error
    started = time.monotonic()
    kv = cast(Literal["float16", "int8"], kv_format(settings.engine))
    layout = kv_layout(settings, config)
    scheduler, invariant = settings.scheduler, settings.engine.invariant
    limits = Limits.of(
        layout,
        max_batch=scheduler.max_batch,
        token_budget=scheduler.token_budget,
        max_context=context,
        invariant=invariant,
        image_tokens=config.vision.tokens if config.vision else 0,
    )
    budget = Budget.of(settings, device)
    workspace = Workspace(device, config, layout, limits, invariant=invariant)
    segments = None if invariant else open_segments(limits)
    networks = open_vision() if settings.model.tower(config) else None
    tower = vision_bytes(config, device) if networks else 0
    budget.blocks(settings, layout, weight_bytes(config) + tower, context, tower)
    with ThreadPoolExecutor(1, "digest") as other:
        digest = other.submit(content)
        loaded = load_weights(device, weights, int8_kv=kv == "int8", on_progress=WeightsProgress())
    vision = None
    if networks is not None:
        vision = TensorrtVision(device, config, load_vision(device, weights), networks)
    engine = TensorrtEngine(
        loaded,
        config,
        device,
        block_tokens=layout.block_tokens,
        fit_blocks=lambda: budget.blocks(settings, layout, 0, context),
        max_context=context,
        kv=kv,
        max_batch=scheduler.max_batch,
        token_budget=scheduler.token_budget,
        invariant=invariant,
        segments=segments,
        tune=None if invariant or tune is None else partial(tune, limits),
        workspace=workspace,
        vision=vision,
        content=digest.result(),
    )
    info = engine.info
    pools = pool_bytes(layout, {"global": info.global_blocks, "window": info.window_blocks})
    log.info(
        "%s: weights %.1f GB, KV %.1f GB (%d positions of all layers, %d of windows), else %.1f GB; %.1f s",
        device.name,
        loaded.total_bytes / 1e9,
        pools / 1e9,
        info.global_blocks * layout.block_tokens,
        info.window_blocks * layout.block_tokens,
        (budget.used(device) - loaded.total_bytes - pools) / 1e9,
        time.monotonic() - started,
    )
    return engine


# --- memory -----------------------------------------------------------------------------------------


def weight_bytes(config: Gemma3Config) -> int:
    """Bytes of a model's weights on the device: half matrices, float32 norms."""
    shapes = config.tensor_shapes().values()
    return sum(math.prod(shape) * (2 if len(shape) == 2 else 4) for shape in shapes)


@dataclass(frozen=True)
class Budget:
    """How much of a device's memory weights, working memory and KV may take, together."""

    device: Device
    size: int
    source: str
    """Where the size comes from, in words."""

    @classmethod
    def of(cls, settings: Settings, device: Device) -> Budget:
        free, wanted = device.memory_free, settings.engine.device_memory_bytes
        if wanted is None:
            return cls(
                device, int(free * _SHARE_OF_FREE), f"{_SHARE_OF_FREE:.0%} of {_gb(free)} that are free"
            )
        if wanted > free:
            raise EngineError(
                f"engine.device_memory_bytes: {_gb(wanted)}, and {device.name} has {_gb(free)} free of "
                f"{_gb(device.memory_total)}; lower it, or end what else runs on this GPU",
                param="engine.device_memory_bytes",
            )
        return cls(device, wanted, "engine.device_memory_bytes")

    @staticmethod
    def used(device: Device) -> int:
        return sum(device.report().values())

    def blocks(
        self, settings: Settings, layout: KVLayout, weights: int, context: int, tower: int = 0
    ) -> Mapping[Pool, int]:
        """The KV pools that fit beside the weights, `tower` bytes of them a vision tower's, and what is
        allocated now.

        Raises EngineError where they are too small for a sequence of `context` tokens, or for
        `hmt.device_tokens`, saying what takes how much and which setting helps.
        """
        work = self.used(self.device)
        room = self.size - work - weights
        largest = fitting_blocks(settings, layout, room)
        tokens = settings.hmt.device_tokens
        if tokens is not None:
            blocks = device_blocks(settings, layout, -(-tokens // layout.block_tokens))
            if pool_bytes(layout, blocks) > room:
                fit = largest["global"] * layout.block_tokens
                help_ = f"set hmt.device_tokens to {fit} or less" if fit >= 256 else self._help(layout, tower)
                need = self._need(weights, work, pool_bytes(layout, blocks), f"KV of {tokens:,} tokens")
                raise EngineError(f"{need}; {help_}", param="hmt.device_tokens")
            return blocks
        longest = layout.block_tokens * longest_sequence(tier_sizes(settings, layout, largest))
        if longest >= context:
            return largest
        one = pool_bytes(layout, device_blocks(settings, layout, -(-context // layout.block_tokens)))
        if longest >= 256:
            help_ = f"set model.max_context to {longest} or less, or {self._help(layout, tower)}"
        else:
            help_ = self._help(layout, tower)
        need = self._need(weights, work, one, f"KV of one sequence of {context:,} tokens")
        raise EngineError(f"{need}; {help_}", param="model.max_context")

    def _need(self, weights: int, work: int, kv: int, what: str) -> str:
        return (
            f"GPU memory: {_gb(weights + work + kv)} are needed (weights {_gb(weights)}, working memory "
            f"{_gb(work)}, {what} {_gb(kv)}), and {_gb(self.size)} may be used on {self.device.name} "
            f"({self.source})"
        )

    def _help(self, layout: KVLayout, tower: int) -> str:
        kv = "" if layout.dtype == "int8" else "engine.kv: int8 halves the KV, "
        text = f"model.max_images: 0 leaves out the vision tower ({_gb(tower)}), " if tower else ""
        return (
            f"{kv}{text}a smaller scheduler.token_budget or scheduler.max_batch the working memory; or use a "
            "smaller model or a larger GPU"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class WeightsProgress:
    """How far the weights are: a bar where standard error is a terminal, else a line now and then."""

    def __init__(self, every_s: float = 10.0) -> None:
        self._every, self._next = every_s, time.monotonic() + every_s
        self._bar: tqdm[None] | None = None

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(desc="weights", total=total, unit="B", unit_scale=True)
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._bar.close()
        elif time.monotonic() >= self._next:
            log.info("weights: %.1f of %.1f GB", done / 1e9, total / 1e9)
            self._next += self._every


# --- plans and measurements -------------------------------------------------------------------------


def open_segments(
    settings: Settings, config: Gemma3Config, device: Device, limits: Limits
) -> Segments | None:
    """TensorRT's plans for this model and card; None where our own kernels do.

    On Hopper they do: plans are used where they have been built. On other cards prompts need TensorRT, and
    what is missing is built, once.
    """
    from wicore.engine.tensorrt.networks import Kind, SegmentShape
    from wicore.engine.tensorrt.plans import (
        PlanCache,
        build_missing,
        parse_buckets,
        plan_keys,
        plans_folder,
        useful_buckets,
    )
    from wicore.engine.tensorrt.trt_api import installed_backends

    hopper = device.capability[0] == 9
    backends = [b for b in installed_backends() if not (hopper and b.ahead_of_time)]
    if not backends:
        if not hopper:
            log.warning(
                "TensorRT is not installed, and prompts are slow without it on this card: "
                "pip install 'wicore[gpu]'"
            )
        return None
    backend = backends[0]
    kinds: tuple[Kind, ...] = ("first", "middle", "last")
    shape = SegmentShape.of(config)
    rows = useful_buckets(parse_buckets(settings.engine.plan_rows), limits.rows)
    cache = PlanCache(plans_folder())
    keys = plan_keys(backend, "{}.{}".format(*device.capability), shape, rows, kinds=kinds)
    missing = cache.missing(keys)
    if missing and hopper:
        log.info(
            "no TensorRT plans for this card yet; `wicore plan build` makes them, to be tried beside ours"
        )
        return None
    if missing:
        log.info("building %d TensorRT plans for this card, once; this takes minutes", len(missing))
        build_missing(cache, missing)
    return Segments(device, cache, shape, rows, backend=backend, kinds=kinds)


def tuned(device: Device, config: Gemma3Config, limits: Limits, measure: Callable[[], Choices]) -> Choices:
    """What was measured on this card for this model, or is now."""
    from wicore.engine.tensorrt.plans import plans_folder
    from wicore.engine.tensorrt.trt_api import installed_backends

    versions = ",".join(f"{b.name} {b.version}" for b in installed_backends())
    key = tuning_key(device, config, limits, versions)
    found = Tuning.load(plans_folder(), key)
    if found is not None:
        try:
            return Choices.from_json(found.values)
        except EngineError as err:
            log.warning("%s; measuring again", err.message)
    choices = measure()
    try:
        Tuning(key, choices.as_json()).save(plans_folder())
    except EngineError as err:
        log.warning("%s; what was measured is forgotten at the end", err.message)
    return choices
