"""Where a step's time goes, kernel by kernel: what is made of the launches that a card timed."""

from __future__ import annotations

import numpy as np
import pytest

from wicore.engine.base import SequenceInput
from wicore.engine.sizing import layout_of
from wicore.engine.tensorrt.cuda_kernels import TimedLaunch
from wicore.engine.tensorrt.profile import kv_bytes, summary
from wicore.gemma3.config import PUBLISHED

CONFIG = PUBLISHED["gemma-3-27b"]


def launch(kernel: str, *integers: int) -> TimedLaunch:
    return TimedLaunch(kernel, integers, None, None)  # type: ignore[arg-type]


def test_launches_of_a_kind_are_one_line_and_the_longest_comes_first() -> None:
    launches = [launch("norm"), launch("skinny", 1, 5376, 21_504), launch("norm")]
    found = summary(launches, [[1.0, 5.0, 2.0], [1.0, 9.0, 2.0], [1.0, 5.0, 2.0]], CONFIG, 0)
    assert [(line.kernel, line.calls, line.ms) for line in found] == [
        ("skinny down", 1, 5.0),
        ("norm", 2, 3.0),
    ]


@pytest.mark.parametrize(
    ("kernel", "n", "k", "role", "matrices", "out_bytes", "rows"),
    [
        ("skinny", 8192, 5376, "qkv", 1, 2, 16),
        ("skinny", 5376, 4096, "out", 1, 4, 16),
        ("hopper_matmul", 21_504, 5376, "gate_up", 2, 2, 16),
        ("hopper_matmul", 5376, 21_504, "down", 1, 4, 256),
        ("hopper_matmul", 5376, 21_504, "down", 1, 2, 257),
        ("skinny", 262_208, 5376, "head", 1, 4, 16),
    ],
)
def test_a_product_has_its_role_its_bytes_and_its_operations(
    kernel, n, k, role, matrices, out_bytes, rows
) -> None:
    [line] = summary([launch(kernel, rows, n, k, 99)], [[1.0]], CONFIG, 0)
    assert line.kernel == f"{kernel} {role}"
    assert line.flops == 2 * rows * n * k * matrices
    assert line.bytes == 2 * n * k * matrices + 2 * rows * k + out_bytes * rows * n


def test_attention_of_single_rows_reads_the_kv_that_they_see() -> None:
    layout = layout_of(CONFIG, 32, "float16")
    tokens, table = np.zeros(1, np.int32), np.zeros(200, np.int32)
    sequence = SequenceInput(
        key=0,
        tokens=tokens,
        start=2999,
        global_table=table,
        window_table=table,
        window_first=0,
        sampling=None,
    )
    seen = kv_bytes([sequence], layout, CONFIG)
    assert seen == 8192 * (10 * 3000 + 52 * 1024)
    [line] = summary([launch("decode_attention")], [[1.0]], CONFIG, seen)
    assert line.bytes == seen
