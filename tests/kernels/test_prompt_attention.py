"""The prompt kernel of Hopper against float64 numpy; what both must do is in test_attention.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.emulation import EmulatedDevice
from tests.kernels.attention_steps import Step, Text, layout_of, model
from wicore.engine.base import Pool
from wicore.engine.tensorrt.attention_settings import HopperSetting, MmaSetting, prompt_setting
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.prompt_attention import PoolMemory
from wicore.errors import EngineError

POOLS: tuple[Pool, Pool] = ("global", "window")
SHAPE = (4, 2, 128)
"""heads, kv_heads, head_dim of the smallest model with all that matters of the 27B's."""

OF_THE_CARD = HopperSetting(128, 3, 3)


def assert_same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


def run(
    device: Device,
    texts: list[Text],
    setting: HopperSetting = OF_THE_CARD,
    shape: tuple[int, int, int] = SHAPE,
    *,
    block_tokens: int = 16,
    window: int = 100,
    place: int = 0,
) -> list[np.ndarray]:
    """Both pools' output, checked."""
    config = model(*shape, window=window)
    step = Step(
        device,
        config,
        layout_of(config, block_tokens),
        texts,
        prefill_setting=setting,
        place=place,
        padding=1,
    )
    found = []
    for pool in POOLS:
        step.clear()
        out = step.prefill(pool, 1)
        step.check(out, pool, 1)
        found.append(out)
    step.close()
    return found


def test_chunks_of_several_tiles_attend_to_what_they_see(device: Device) -> None:
    run(device, [Text(range(190, 330)), Text(range(0, 3)), Text(range(127, 129))])


@pytest.mark.parametrize(
    "setting",
    [
        HopperSetting(64, 2, 2),
        HopperSetting(48, 3, 2, turns=False),
        pytest.param(HopperSetting(112, 2, 3), marks=pytest.mark.thorough),
        pytest.param(HopperSetting(128, 1, 1), marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_every_setting_is_right(device: Device, setting: HopperSetting) -> None:
    run(device, [Text(range(150, 260))], setting)


@pytest.mark.parametrize("block_tokens", [pytest.param(32, marks=pytest.mark.thorough), 48, 128])
def test_blocks_may_have_any_size(device: Device, block_tokens: int) -> None:
    run(device, [Text(range(161, 240)), Text(range(7, 9))], block_tokens=block_tokens)


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(4, 2, 256), (8, 1, 64), (8, 1, 128)], ids=str)
def test_other_heads_are_right(device: Device, shape: tuple[int, int, int]) -> None:
    run(device, [Text(range(100, 180)), Text(range(20, 23))], HopperSetting(64, 2, 2), shape)


def test_where_blocks_lie_and_who_shares_the_launch_changes_nothing(device: Device) -> None:
    text = range(150, 200)
    alone = run(device, [Text(text)])
    elsewhere = run(device, [Text(text, streamed=8)], place=1)
    together = run(device, [Text(text, streamed=2), Text(range(30, 95)), Text([300])], place=2)
    for other in (elsewhere, together):
        assert_same_bits([out[:50] for out in other], [out[:50] for out in alone])


def test_where_a_prompt_is_cut_changes_nothing(device: Device) -> None:
    config = model(*SHAPE, window=100)
    step = Step(device, config, layout_of(config), [Text(range(100, 240))], prefill_setting=OF_THE_CARD)
    for pool in POOLS:
        whole = step.prefill(pool)
        step.clear()
        chunks = [(0, 1, 0, 100), (1, 70, 0, 101), (71, 69, 0, 171)]
        assert_same_bits([whole], [step.prefill(pool, chunks=chunks)])
    step.close()


def test_tokens_of_an_image_see_all_of_it(device: Device) -> None:
    images = [(140, 150), (180, 262)]
    run(device, [Text(range(130, 200), images=images), Text(range(3, 5))], window=40)


def test_settings_differ_by_rounding_only(device: Device) -> None:
    config = model(*SHAPE)
    found = []
    for setting in (OF_THE_CARD, MmaSetting.of(config, layout_of(config), (9, 0))):
        step = Step(device, config, layout_of(config), [Text(range(60, 70))], prefill_setting=setting)
        found.append(step.prefill("global").astype(np.float32))
        step.close()
    np.testing.assert_allclose(*found, atol=2e-3)


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "hopper"),
    [
        ((32, 16, 128), "float16", (9, 0), True),
        ((32, 16, 128), "int8", (9, 0), False),
        ((32, 16, 128), "float16", (8, 9), False),
        ((32, 16, 128), "float16", (10, 0), False),
        ((3, 1, 128), "float16", (9, 0), False),
        ((4, 2, 48), "float16", (9, 0), False),
    ],
)
def test_hoppers_kernel_is_for_pairs_of_heads_in_half_precision_on_hopper(
    shape: tuple[int, int, int], dtype: str, capability: tuple[int, int], hopper: bool
) -> None:
    config = model(*shape)
    layout = layout_of(config, 16, dtype)
    setting = prompt_setting(config, layout, capability)
    assert isinstance(setting, HopperSetting) == hopper
    if isinstance(setting, HopperSetting):
        assert setting.shared_bytes(config) <= 227 << 10


def test_more_memory_than_the_copy_engine_reaches_is_refused(emulated: EmulatedDevice) -> None:
    config = model(*SHAPE)
    step = Step(emulated, config, layout_of(config), [Text([3])], prefill_setting=OF_THE_CARD)
    size = layout_of(config).block_bytes("global")
    memory = PoolMemory(
        "global", step.device_address["global"], step.host.address, size, 1, (1 << 39) // size + 1
    )
    with pytest.raises(EngineError, match=r"hmt\.host_bytes"):
        step.attention.bind(memory)
    step.close()
