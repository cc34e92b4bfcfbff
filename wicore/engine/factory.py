"""From the settings to an engine."""

from __future__ import annotations

from wicore.config import Settings
from wicore.engine.base import Engine
from wicore.engine.null import NullEngine
from wicore.engine.sizing import kv_layout, tier_sizes
from wicore.errors import EngineError
from wicore.model import Model


def create_engine(settings: Settings, model: Model) -> Engine:
    """The engine that `engine.kind` names, its weights loaded and its pools allocated.

    Raises EngineError when it cannot run here, CheckpointError for bad weights.
    """
    blocks = tier_sizes(settings, kv_layout(settings, model.checkpoint.config)).device
    block = settings.hmt.block_tokens
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
    if settings.engine.kind == "cpu":
        # Imported here: ONNX Runtime takes a moment, and only this engine needs it.
        from wicore.engine.cpu import CpuEngine

        return CpuEngine(
            model.checkpoint,
            weights=settings.engine.weights,
            kv=settings.engine.kv,
            threads=settings.engine.threads,
            block_tokens=block,
            global_blocks=blocks["global"],
            window_blocks=blocks["window"],
            max_context=model.context,
        )
    raise EngineError(
        f"engine.kind: {settings.engine.kind!r} is not available in this version; use cpu",
        param="engine.kind",
    )
