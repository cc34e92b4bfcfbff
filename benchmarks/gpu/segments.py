"""TensorRT segments on this machine's card: `python -m benchmarks.gpu.segments`.

Builds the plans of one layer, checks some rows of each run against float64, with and without o_proj and
down_proj 64 times too large, and times runs inside a CUDA graph. Prints a table; with OUT set, puts the
plans, with what was measured to build them, into $OUT/plans.tar, from which `--plans FILE` starts the
next time.
Needs numpy, tensorrt and cuda-bindings only.
"""

from __future__ import annotations

import argparse
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu.segment_trial import SegmentTrial
from tests.reference import inflate, random_inputs, relative_error, segment
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.networks import KINDS, Kind, SegmentShape, bindings, flops, rows_of
from wicore.engine.tensorrt.plans import PlanCache, build_plan, parse_buckets, plan_keys
from wicore.engine.tensorrt.segments import Segments
from wicore.engine.tensorrt.trt_api import BACKENDS, Backend, BuildOptions, load_backend
from wicore.errors import EngineError

SHAPES = {
    "tiny": SegmentShape(hidden=64, inner=96, attention=64, qkv=128, vocab=512, eps=1e-6),
    "gemma-3-270m": SegmentShape(640, 2048, 1024, 1536, 262_144, 1e-6),
    "gemma-3-27b": SegmentShape(5376, 21_504, 4096, 8192, 262_208, 1e-6),
}
_CHECKED = 8
"""Rows checked of each stretch between two buckets: float64 takes its time."""
_HEADINGS = (
    f"{'segment':<8}{'rows':>6}{'build s':>9}{'kB':>6}{'MiB':>7}{'error':>10}{'inflated':>10}{'ms':>9}"
)
_HEADINGS += f"{'host ms':>9}{'TFLOP/s':>9}{'TB/s':>7}"


class Clock:
    """Says when to stop; a build cannot be interrupted, so the slowest one so far must still fit."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._slowest = 30.0

    def allows_a_build(self) -> bool:
        return time.monotonic() + 1.5 * self._slowest < self._end

    def built(self, seconds: float) -> None:
        self._slowest = max(self._slowest, seconds)


def study(
    device: Device,
    backend: Backend,
    cache: PlanCache,
    kind: Kind,
    shape: SegmentShape,
    buckets: Sequence[int],
    clock: Clock,
    options: BuildOptions,
) -> None:
    """One line a bucket."""
    buckets = rows_of(kind, buckets)
    given = random_inputs(kind, shape, buckets[-1])
    dynamic = [b.name for b in bindings(kind, shape) if b.dynamic and not b.output]
    checked = _checked_rows(buckets)
    cases: dict[str, Any] = {}
    inflatable = kind in ("middle", "last")
    for name, values in [("plain", given)] + ([("inflated", inflate(given))] if inflatable else []):
        picked = {k: v[checked] if k in dynamic else v for k, v in values.items()}
        cases[name] = (SegmentTrial(device, kind, shape, values), segment(kind, shape, picked))
    major, minor = device.capability
    for key in plan_keys(backend, f"{major}.{minor}", shape, buckets, kinds=(kind,)):
        seconds = 0.0
        if cache.load(key) is None:
            if not clock.allows_a_build():
                print(f"{kind:<8}{key.rows:>6}  no time left to build it", flush=True)
                continue
            try:
                seconds = build_plan(key, cache, options).seconds
            except EngineError as err:
                print(f"{kind:<8}{key.rows:>6}  {err.message[:300]}", flush=True)
                continue
            clock.built(seconds)
        segments = Segments(device, cache, shape, (key.rows,), backend=backend, kinds=(kind,))
        errors = {}
        for name, (trial, expected) in cases.items():
            rows = checked[checked < key.rows]
            full, few = trial.run(segments, key.rows), trial.run(segments, min(3, key.rows))
            all_errors = [relative_error(full[k][rows], expected[k][: len(rows)]) for k in expected]
            all_errors += [relative_error(few[k], expected[k][: len(few[k])]) for k in expected]
            errors[name] = float(np.max(all_errors))  # a NaN shows
        ms, host_ms = cases["plain"][0].milliseconds(segments, key.rows)
        weights = sum(b.nbytes(0) for b in bindings(kind, shape) if not b.dynamic)
        if kind == "first":
            weights -= next(b.nbytes(0) for b in bindings(kind, shape) if b.name == "table")
        columns = [
            f"{kind:<8}{key.rows:>6}{seconds:>9.1f}{cache.path(key).stat().st_size / 1000:>6.0f}",
            f"{segments.memory_bytes / 2**20:>7.0f}{errors['plain']:>10.1e}",
            f"{errors['inflated']:>10.1e}" if inflatable else " " * 10,
            f"{ms:>9.4f}{host_ms:>9.3f}{flops(kind, shape, key.rows) / ms / 1e9:>9.0f}",
            f"{weights / ms / 1e9:>7.2f}",
        ]
        print("".join(columns), flush=True)
        if options.detailed:
            print_layers(backend, segments, cases["plain"][0], kind, key.rows)
        segments.close()
    for trial, _ in cases.values():
        trial.close()


def print_layers(backend: Backend, segments: Segments, trial: SegmentTrial, kind: Kind, rows: int) -> None:
    """Where the time goes, and the kernels TensorRT chose."""
    module = backend.module
    times: dict[str, list[float]] = {}

    class Report(module.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, name: str, ms: float) -> None:
            times.setdefault(name, []).append(ms)

    report = Report()
    plan = segments.plan(kind, rows)
    plan.profile(report)
    for _ in range(5):
        trial.run(segments, rows)
    for name, each in times.items():
        print(f"    {min(each):>8.4f} ms  {name[:150]}")
    for text in plan.layers():
        tactic = re.search(r'"TacticName" *: *"([^"]+)"', text)
        if tactic and tactic.group(1) != "0x0000000000000000":
            print(f"    {tactic.group(1)}")


def _checked_rows(buckets: Sequence[int]) -> np.ndarray[Any, Any]:
    """The first rows, then some that only the larger buckets have."""
    starts = [0, *buckets[:-1]]
    rows = [
        np.linspace(start, end - 1, min(_CHECKED, end - start)).astype(int)
        for start, end in zip(starts, buckets, strict=True)
    ]
    return np.unique(np.concatenate([np.arange(min(3, buckets[0])), *rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="tiny,gemma-3-27b", help="of " + ", ".join(SHAPES))
    parser.add_argument("--kinds", default="middle,last,first,head")
    parser.add_argument("--rows", default="64,512,2048,8192")
    parser.add_argument("--seconds", type=float, default=480, help="start no build that may end later")
    parser.add_argument("--plans", type=Path, help="a plans.tar of an earlier run")
    parser.add_argument("--effort", type=int, help="TensorRT's builder_optimization_level, 0 to 5")
    parser.add_argument("--layers", action="store_true", help="print each layer's time and kernel")
    parser.add_argument("--backend", choices=BACKENDS, default="tensorrt")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if kind in options.kinds.split(",")]
    kinds.sort(key=options.kinds.split(",").index)

    from wicore.engine.tensorrt.cuda import CudaDevice

    backend, clock = load_backend(options.backend), Clock(options.seconds)
    device = CudaDevice()
    print(
        f"{device.name}, {backend.name} {backend.version}; MiB: scratch memory; TB/s: of weights", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        cache = PlanCache(Path(folder))
        if options.plans:
            with tarfile.open(options.plans) as tar:
                tar.extractall(folder)
        for model in options.models.split(","):
            print(f"\n{model}\n{_HEADINGS}", flush=True)
            for kind in kinds:
                study(
                    device, backend, cache, kind, SHAPES[model], parse_buckets(options.rows), clock,
                    BuildOptions(effort=options.effort, detailed=options.layers),
                )  # fmt: skip
                if out := os.environ.get("OUT"):
                    with tarfile.open(f"{out}/plans.tar", "w") as tar:
                        tar.add(folder, ".")
    device.close()


if __name__ == "__main__":
    main()
