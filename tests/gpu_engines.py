"""The TensorRT engine on an emulated device, for small checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tests.emulation import EmulatedDevice
from wicore.engine.tensorrt.autotune import Choices
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.engine import TensorrtEngine
from wicore.engine.tensorrt.hopper import Tiling
from wicore.engine.tensorrt.matmuls import Choice, layer_products
from wicore.engine.tensorrt.weights import load_weights
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint
from wicore.gemma3.config import Gemma3Config

SMALL_TILE = Tiling(32, consumers=1, stages=3)
"""Of Hopper's product, as the emulation is fastest at it."""


def emulated_engine(
    path: Path, *, device: EmulatedDevice | None = None, checkpoint: Checkpoint | None = None, **options: Any
) -> TensorrtEngine:
    """On a card without Hopper's instructions, unless `device` is another."""
    device = device or EmulatedDevice(capability=(8, 0))
    return engine_on(device, checkpoint or open_checkpoint(path), **options)


def engine_on(
    device: Device, checkpoint: Checkpoint, *, kv: Literal["float16", "int8"] = "float16", **options: Any
) -> TensorrtEngine:
    """With small pools and steps of up to 128 rows, unless `options` say otherwise."""
    sizes = {"block_tokens": 16, "global_blocks": 256, "window_blocks": 256, "token_budget": 128}
    weights = load_weights(device, checkpoint, int8_kv=kv == "int8")
    return TensorrtEngine(weights, checkpoint.config, device, kv=kv, **sizes | options)


def hopper_choices(config: Gemma3Config) -> Callable[[Callable[[], Choices]], Choices]:
    """For `tune`: every product of more than 64 rows by Hopper's kernel, in small tiles."""
    products = {*layer_products(config), *layer_products(config, half_deltas=True)}
    return lambda measure: Choices({product: [Choice(8192, SMALL_TILE)] for product in products})
