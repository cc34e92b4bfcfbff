"""From the settings to an engine."""

from __future__ import annotations

from dataclasses import dataclass

from wicore.config import Settings
from wicore.engine.base import Engine
from wicore.engine.null import NullEngine
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config
from wicore.model import Model


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """Blocks of the device pool."""

    global_blocks: int
    window_blocks: int


def pool_sizes(settings: Settings, config: Gemma3Config) -> PoolSizes:
    """What `hmt.device_tokens` and a full batch need.

    The window pool holds the window of every sequence of a full batch and the step's new tokens, and never
    more than all positions would take. Sequences that have not reached their window leave room in it for
    cached prefixes.
    """
    block = settings.hmt.block_tokens
    every = -(-settings.hmt.device_tokens // block)
    a_sequence = -(-(config.sliding_window - 1) // block) + 1
    running = settings.scheduler.max_batch * a_sequence + -(-settings.scheduler.token_budget // block)
    return PoolSizes(every, min(every, running))


def create_engine(settings: Settings, model: Model) -> Engine:
    """The engine that `engine.kind` names, its weights loaded and its pools allocated.

    Raises EngineError when it cannot run here, CheckpointError for bad weights.
    """
    sizes = pool_sizes(settings, model.checkpoint.config)
    block = settings.hmt.block_tokens
    if settings.engine.kind == "null":
        return NullEngine(
            step_ms=settings.engine.null_step_ms,
            global_blocks=sizes.global_blocks,
            window_blocks=sizes.window_blocks,
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
            threads=settings.engine.threads,
            block_tokens=block,
            global_blocks=sizes.global_blocks,
            window_blocks=sizes.window_blocks,
            max_context=model.context,
        )
    raise EngineError(
        f"engine.kind: {settings.engine.kind!r} is not available in this version; use cpu",
        param="engine.kind",
    )
