"""Attention kernels against float64 numpy, over paged pools in a random order of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.attention_steps import Sequence_ as Seq
from tests.kernels.attention_steps import Step, layout_of, model
from wicore.engine.tensorrt.device import Device

SHAPES = [(4, 2, 16), (4, 4, 32), (8, 2, 64), (4, 2, 128), (4, 1, 256), (3, 1, 48)]
"""heads, kv_heads, head_dim"""


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", ["global", "window"])
def test_single_rows_attend_to_what_they_see(device: Device, shape: Any, dtype: str, pool: Any) -> None:
    config = model(*shape)
    step = Step(
        device, config, layout_of(config, 16, dtype), [Seq([0]), Seq([300]), Seq([47]), Seq([15, 16])], padding=2
    )
    step.check(step.decode(pool, 1), pool, 1)
    step.close()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", ["global", "window"])
def test_prompt_chunks_attend_to_what_they_see(device: Device, shape: Any, dtype: str, pool: Any) -> None:
    config = model(*shape)
    sequences = [Seq(range(0, 5)), Seq(range(37, 140)), Seq(range(70, 71))]
    step = Step(device, config, layout_of(config, 16, dtype), sequences, padding=2)
    step.check(step.prefill(pool, 1), pool, 1)
    step.close()
