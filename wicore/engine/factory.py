"""From the settings to an engine."""

from __future__ import annotations

from typing import cast

from wicore.config import Settings
from wicore.engine.base import Engine, VisionEncoder
from wicore.engine.null import NullEngine, NullVision
from wicore.engine.sizing import kv_format, kv_layout, tier_sizes, weight_format
from wicore.model import Model


def create_engine(settings: Settings, model: Model) -> Engine:
    """The engine that `engine.kind` names, its weights loaded and its pools allocated.

    Raises EngineError when it cannot run here, CheckpointError for bad weights.
    """
    block = settings.hmt.block_tokens
    if settings.engine.kind == "tensorrt":
        # Imported here: only this engine needs a GPU's packages.
        from wicore.engine.tensorrt.build import create_tensorrt_engine

        return create_tensorrt_engine(settings, model)
    blocks = tier_sizes(settings, kv_layout(settings, model.checkpoint.config)).device
    if settings.engine.kind == "null":
        return NullEngine(
            step_ms=settings.engine.null_step_ms,
            global_blocks=blocks["global"],
            window_blocks=blocks["window"],
            block_tokens=block,
            window=model.checkpoint.config.sliding_window,
            vocab_size=model.checkpoint.config.vocab_size,
            max_context=model.context,
        )
    # Imported here: ONNX Runtime takes a moment, and only this engine needs it.
    from wicore.engine.cpu import CpuEngine
    from wicore.engine.cpu.pool import KVFormat
    from wicore.engine.cpu.weights import WeightFormat

    return CpuEngine(
        model.checkpoint,
        weights=cast(WeightFormat, weight_format(settings.engine)),
        kv=cast(KVFormat, kv_format(settings.engine)),
        threads=settings.engine.threads,
        block_tokens=block,
        global_blocks=blocks["global"],
        window_blocks=blocks["window"],
        max_context=model.context,
    )


def create_vision(settings: Settings, model: Model, engine: Engine) -> VisionEncoder | None:
    """What encodes the model's images beside `engine`; None: the model has no tower, or `model.max_images` is
    0, and images are refused.

    With `engine.weights: int8` the CPU's tower is half: in 8 bits it is no faster, and its rows are 2 % off.
    Raises EngineError when it cannot run here, CheckpointError for bad weights.
    """
    vision = settings.model.tower(model.checkpoint.config)
    if vision is None:
        return None
    if settings.engine.kind == "tensorrt":
        from wicore.engine.tensorrt.vision import create_tensorrt_vision

        return create_tensorrt_vision(settings, model, engine)
    if settings.engine.kind == "null":
        return NullVision(vision, model.checkpoint.config.hidden_size)
    from wicore.engine.cpu.vision import CpuVision

    exact = weight_format(settings.engine) == "float32"
    return CpuVision(
        model.checkpoint, weights="float32" if exact else "half", threads=settings.engine.threads
    )
