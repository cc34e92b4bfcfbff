"""`wicore bench engine --profile`: a step's kernels, one after the other, beside the device's bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from wicore.bench.driver import Driver
from wicore.bench.hardware import Bounds
from wicore.bench.peers import Line
from wicore.engine.base import Engine
from wicore.errors import EngineError
from wicore.request import SamplingParams
from wicore.scheduler import Limits


class Kernel(Protocol):
    """All launches of one kind in a step."""

    @property
    def kernel(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def ms(self) -> float:
        """Of all calls together."""

    @property
    def bytes(self) -> int:
        """That they must move through memory; 0: not counted."""

    @property
    def flops(self) -> int:
        """That they must compute; 0: not counted."""


def profile_decode(engine: Engine, limits: Limits, batch: int, context: int, bounds: Bounds) -> Line:
    """A step of `batch` sequences that have `context` tokens, or as many as the KV pools hold. Raises
    EngineError where the engine cannot."""
    driver = Driver(engine, limits)
    steps = batch * -(-context // (limits.token_budget - limits.max_batch))  # until all decode, at most
    info = engine.info
    room = min(info.global_blocks, info.window_blocks) // batch * info.layout.block_tokens
    context = min(context, room - steps - 2 - info.layout.block_tokens)
    if context < 1:
        raise EngineError(f"--profile: the KV pools do not hold {batch} sequences")
    for key in range(batch):
        driver.add(key, context, steps + 2, SamplingParams())
    while len(driver.step()) < batch:
        pass
    return {"measurement": "profile", "step": "decode", "batch": batch, "prompt": context} | _profile(
        engine, driver, bounds
    )


def profile_prompt(engine: Engine, limits: Limits, tokens: int, bounds: Bounds) -> Line:
    """A step that computes one prompt, or as much of it as a step may. Raises EngineError likewise."""
    driver = Driver(engine, limits)
    driver.add(0, tokens, 4, SamplingParams())
    return {"measurement": "profile", "step": "prompt", "batch": 1, "prompt": tokens} | _profile(
        engine, driver, bounds
    )


def _profile(engine: Engine, driver: Driver, bounds: Bounds) -> Line:
    profile: Any = getattr(engine, "profile", None)
    if profile is None:
        raise EngineError(f"--profile: the {engine.info.name} engine cannot tell its kernels apart")
    plan = driver.plan()
    assert plan is not None
    kernels: Sequence[Kernel] = profile(plan)
    return {
        "ms": round(sum(kernel.ms for kernel in kernels), 3),
        "kernels": [_line(kernel, bounds) for kernel in kernels],
    }


def _line(kernel: Kernel, bounds: Bounds) -> Line:
    seconds = kernel.ms / 1e3
    line: Line = {"kernel": kernel.kernel, "calls": kernel.calls, "ms": round(kernel.ms, 4)}
    if kernel.bytes and seconds:
        line["gb_s"] = round(kernel.bytes / seconds / 1e9, 1)
        if bounds.bytes_s:
            line["share_of_bandwidth"] = round(kernel.bytes / seconds / bounds.bytes_s, 3)
    if kernel.flops and seconds:
        line["tflop_s"] = round(kernel.flops / seconds / 1e12, 1)
        if bounds.flop_s:
            line["share_of_compute"] = round(kernel.flops / seconds / bounds.flop_s, 3)
    return line


_COLUMNS = ("kernel", "calls", "ms", "share", "GB/s", "of bandwidth", "TFLOP/s", "of compute")


def table(line: Line) -> str:
    """The line for people: one row a kernel."""
    total: Any = line["ms"]
    kernels: Any = line["kernels"]
    rows = [_COLUMNS]
    for kernel in kernels:
        rows.append(
            (
                kernel["kernel"],
                str(kernel["calls"]),
                f"{kernel['ms']:.3f}",
                _percent(kernel["ms"] / total if total else 0.0),
                _number(kernel.get("gb_s")),
                _percent(kernel.get("share_of_bandwidth")),
                _number(kernel.get("tflop_s")),
                _percent(kernel.get("share_of_compute")),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    title = f"{line['step']}, batch {line['batch']}, {line['prompt']} tokens: {total:.3f} ms"
    return "\n".join([title, *texts])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
