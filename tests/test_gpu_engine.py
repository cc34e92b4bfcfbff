"""The TensorRT engine beyond what every engine owes, on an emulated device: parity in each mode, graphs,
memory, and a device that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.emulation import EmulatedDevice
from tests.emulation.device import EmulatedBuffer
from tests.engines import FIXTURES, TINY, generate, rows
from tests.gpu_engines import emulated_engine, hopper_choices
from tests.numpy_segments import NumpySegments
from tests.test_parity import relative_error
from tests.workload import Job, Server
from wicore.config import Settings, load_settings
from wicore.engine.base import StepPlan
from wicore.engine.tensorrt.build import build_engine, weight_bytes
from wicore.engine.tensorrt.engine import TensorrtEngine
from wicore.engine.tensorrt.networks import SegmentShape
from wicore.engine.tensorrt.weights import RandomWeights, load_weights
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint
from wicore.request import Priority, SamplingParams

TOLERANCE = 1e-2
Reference = Mapping[str, NDArray[Any]]


def with_segments(name: str) -> TensorrtEngine:
    config = open_checkpoint(FIXTURES / name).config
    segments = NumpySegments(SegmentShape.of(config), (64, 256), kinds=("first", "middle", "last"))
    return emulated_engine(FIXTURES / name, segments=segments)


def with_hopper(name: str) -> TensorrtEngine:
    tune = hopper_choices(open_checkpoint(FIXTURES / name).config)
    return emulated_engine(FIXTURES / name, device=EmulatedDevice(), tune=tune)


MODES: Mapping[str, Callable[[str], TensorrtEngine]] = {
    "kernels for few rows": lambda name: emulated_engine(FIXTURES / name),
    "Hopper": with_hopper,
    "TensorRT": with_segments,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[TensorrtEngine]:
    found = emulated_engine(FIXTURES / "tiny")
    yield found
    found.close()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return dict(np.load(FIXTURES / "tiny" / "reference.npz"))


# --- parity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", [TINY[0], *(pytest.param(name, marks=pytest.mark.thorough) for name in TINY[1:])]
)
def test_logits_are_those_of_transformers_however_the_prompt_is_cut(name: str, mode: str) -> None:
    engine, reference = MODES[mode](name), np.load(FIXTURES / name / "reference.npz")
    [row] = rows(engine, 1, 300)
    parts = []
    # More than the buffers hold, some, and one at a time.
    for size in (200, 70, 1, 1, 28):
        tokens = reference["tokens"][row.start : row.start + size]
        parts.append(engine.logits(StepPlan((row.input(tokens),)))[row.key])
        row.start += size
    logits = np.concatenate(parts)
    assert relative_error(logits[reference["positions"]], reference["logits"]) <= TOLERANCE
    assert (logits.argmax(-1) == reference["argmax"]).mean() >= 0.98
    engine.close()


def test_logits_in_a_mixed_batch_are_those_of_transformers(engine, reference) -> None:
    tokens, batch = reference["tokens"], rows(engine, 4, 300)
    for row, done in zip(batch, (0, 70, 129, 200), strict=True):
        if done:
            engine.step(StepPlan((row.input(tokens[:done]),)))
        row.start = done
    sizes = (90, 60, 1, 1)
    plan = StepPlan(tuple(r.input(tokens[r.start : r.start + n]) for r, n in zip(batch, sizes, strict=True)))
    logits = engine.logits(plan)
    at = {int(position): i for i, position in enumerate(reference["positions"])}
    scale = np.abs(reference["logits"]).max()
    compared = 0
    for row in batch:
        for offset, found in enumerate(logits[row.key]):
            if (index := at.get(row.start + offset)) is not None:
                assert np.abs(found - reference["logits"][index]).max() / scale <= TOLERANCE
                compared += 1
    assert compared > 50


def test_prompts_that_end_in_a_step_give_the_likeliest_token_of_their_last_row(engine, reference) -> None:
    lengths = (90, 1, 37, 1, 5)
    asked = [reference["tokens"][i : i + length] for i, length in enumerate(lengths)]
    batch = rows(engine, len(lengths), max(lengths) + 1)
    plan = StepPlan(tuple(row.input(ids, sample=row.key != 2) for row, ids in zip(batch, asked, strict=True)))
    outputs = engine.step(plan).outputs
    logits = engine.logits(plan)
    for row in batch:
        token = outputs[row.key].token
        if row.key == 2:
            assert token is None
        else:
            # Alone, the last layer's products may be made by another kernel: near ties may fall otherwise.
            found = logits[row.key][-1]
            assert token is not None
            assert found[token.id] >= found.max() - 2e-2 * np.abs(found).max()


def test_hoppers_prompt_kernel_gives_the_logits_of_the_other() -> None:
    config = replace(open_checkpoint(FIXTURES / "tiny").config, head_dim=128, query_pre_attn_scalar=128)
    found = []
    for device, options in (
        (EmulatedDevice(capability=(8, 0)), {}),
        (EmulatedDevice(), {"tune": hopper_choices(config)}),
    ):
        weights = load_weights(device, RandomWeights(config))
        sizes = {"block_tokens": 16, "global_blocks": 32, "window_blocks": 32, "token_budget": 128}
        engine = TensorrtEngine(weights, config, device, **sizes, **options)
        [row] = rows(engine, 1, 200)
        parts = []
        for first, count in ((0, 70), (70, 90)):
            row.start = first
            tokens = np.arange(first, first + count) % config.vocab_size
            parts.append(engine.logits(StepPlan((row.input(tokens),)))[row.key])
        found.append(np.concatenate(parts))
        engine.close()
    assert relative_error(found[1], found[0]) <= TOLERANCE


def test_kv_in_8_bits_stays_near_transformers(reference) -> None:
    engine = emulated_engine(FIXTURES / "tiny", kv="int8")
    [row] = rows(engine, 1, 300)
    logits = engine.logits(StepPlan((row.input(reference["tokens"][:300]),)))[row.key]
    off = logits[reference["positions"]] - reference["logits"]
    assert np.sqrt(np.square(off).mean()) <= 0.005 * np.abs(reference["logits"]).max()
    assert (logits.argmax(-1) == reference["argmax"]).mean() >= 0.95


class Inflated(Checkpoint):
    """The projections that two norms follow, so many times as large: the text is the same."""

    def __init__(self, of: Checkpoint, factor: float) -> None:
        tensors = {name: of.stored(name) for name in of.names()}
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                raw = (tensor.decode(tensor.raw) * np.float32(factor)).view(np.uint8)
                tensors[name] = replace(
                    tensor,
                    dtype="F32",
                    raw=raw,
                    decode=lambda raw: np.ascontiguousarray(raw).view(np.float32),
                    place=None,
                )
        super().__init__(of.path, of.config, tensors, lambda: b"")


def test_projections_64_times_as_large_overflow_nothing(reference) -> None:
    large = Inflated(open_checkpoint(FIXTURES / "tiny"), 64)
    engine = emulated_engine(FIXTURES / "tiny", checkpoint=large)
    [row] = rows(engine, 1, 300)
    logits = engine.logits(StepPlan((row.input(reference["tokens"][:120]),)))[row.key]
    positions = [i for i, p in enumerate(reference["positions"]) if p < 120]
    found = logits[reference["positions"][positions]]
    assert relative_error(found, reference["logits"][positions]) <= TOLERANCE


@pytest.mark.parametrize("factor", [1, 64])
def test_a_long_prompt_whose_deltas_are_half_has_the_logits_of_transformers(reference, factor: int) -> None:
    checkpoint = Inflated(open_checkpoint(FIXTURES / "tiny"), factor)
    engine = emulated_engine(
        FIXTURES / "tiny",
        device=EmulatedDevice(),
        checkpoint=checkpoint,
        tune=hopper_choices(checkpoint.config),
        token_budget=300,
    )
    assert engine._matmuls.half_deltas(300)
    [row] = rows(engine, 1, 300)
    logits = engine.logits(StepPlan((row.input(reference["tokens"][:300]),)))[row.key]
    assert relative_error(logits[reference["positions"]], reference["logits"]) <= 3e-3
    engine.close()


# --- steps ------------------------------------------------------------------------------------------


def outputs(engine: TensorrtEngine) -> list[tuple[Any, ...]]:
    """Tokens, logprobs and mass of three sequences, whose prompts share steps with tokens of others."""
    warm = SamplingParams(temperature=0.8, top_p=0.9, logprobs=2, logit_bias={7: 1.5})
    first, second, third = rows(engine, 3, 100, seed=3)
    first.params, third.params = warm, SamplingParams(temperature=0.0, logprobs=0)
    prompts = {row.key: np.arange(10, 10 + n) for row, n in ((first, 40), (second, 21), (third, 1))}
    found = []
    for turn in range(5):
        batch = [first, second, third][: turn + 1]
        plan = StepPlan(
            tuple(
                row.input(row.output[-1:] if row.output else prompts[row.key], sample=True) for row in batch
            )
        )
        result = engine.step(plan)
        for row in batch:
            output = result.outputs[row.key]
            row.start += 1 if row.output else len(prompts[row.key])
            row.output.append(output.token.id)
            found.append((output.token, output.mass.tolist()))
    return found


def test_a_replayed_graph_gives_what_its_launches_give() -> None:
    eager = emulated_engine(FIXTURES / "tiny", graphs=False)
    assert outputs(emulated_engine(FIXTURES / "tiny")) == outputs(eager)


def test_graphs_captured_at_the_start_give_the_same(engine) -> None:
    prepared = emulated_engine(FIXTURES / "tiny", max_batch=4)
    prepared.prepare()
    assert outputs(prepared) == outputs(engine)


def test_graphs_can_wait_for_host_memory(engine) -> None:
    waiting = emulated_engine(FIXTURES / "tiny", max_batch=4)
    waiting.prepare_when_used()
    waiting.host_memory("global", 4)
    graphs = dict(waiting._runner._graphs)
    assert len(graphs) == 3
    assert outputs(waiting) == outputs(engine)
    assert waiting._runner._graphs == graphs


def test_attention_mass_of_a_chunk_beside_single_tokens_sums_to_one(engine) -> None:
    row, other = rows(engine, 2, 260, seed=8)
    prompt = np.random.default_rng(3).integers(5, 500, 210)
    result = engine.step(StepPlan((other.input(prompt[:1]), row.input(prompt))))
    mass = result.outputs[row.key].mass
    used = -(-len(prompt) // engine.info.layout.block_tokens)
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    assert (mass[:used] > 0).all()
    assert (mass[used:] == 0).all()
    assert result.outputs[other.key].mass[0] == pytest.approx(1, abs=1e-5)


def test_more_sequences_than_a_batch_has_are_refused(engine) -> None:
    batch = rows(engine, 17, 16)
    with pytest.raises(ValueError, match=r"17 sequences sample, and scheduler\.max_batch is 16"):
        engine.step(StepPlan(tuple(row.input([5], sample=True) for row in batch)))


def test_the_fingerprint_tells_weights_formats_and_modes_apart() -> None:
    engines = [
        emulated_engine(FIXTURES / "tiny", **options)
        for options in ({}, {"kv": "int8"}, {"invariant": True}, {"block_tokens": 32}, {"content": "other"})
    ]
    assert len({engine.info.fingerprint for engine in engines}) == len(engines)
    assert engines[0].info.fingerprint == emulated_engine(FIXTURES / "tiny").info.fingerprint


# --- a device that fails ----------------------------------------------------------------------------


class FailingDevice(EmulatedDevice):
    """Fails every call once `broken`, as a card does after a fault."""

    broken = False

    def copy(self, dst, src, size, stream) -> None:
        if self.broken:
            raise EngineError("an illegal address was met")
        super().copy(dst, src, size, stream)


def test_a_device_that_fails_in_a_step_is_not_trusted_again() -> None:
    device = FailingDevice(capability=(8, 0))
    engine = emulated_engine(FIXTURES / "tiny", device=device)
    host = engine.host_memory("global", 4)
    [row] = rows(engine, 1, 60)
    generate(engine, row, [5, 6, 7], 2)
    saved = engine.copy_out("global", [1, 2], host[:2])
    device.broken = True
    with pytest.raises(EngineError, match="an illegal address was met"):
        engine.step(StepPlan((row.input([5]),)))
    device.broken = False
    with pytest.raises(EngineError, match="the device failed before: an illegal address was met"):
        engine.step(StepPlan((row.input([5]),)))
    with pytest.raises(EngineError, match="the device failed: an illegal address"):
        saved.wait()
    late = engine.copy_out("global", [1], host[2:3])
    assert late.done()
    with pytest.raises(EngineError, match="copy of KV blocks failed"):
        late.wait()
    engine.close()
    engine.close()


def test_logits_that_are_no_numbers_end_the_engine() -> None:
    engine = emulated_engine(FIXTURES / "tiny")
    [row] = rows(engine, 1, 60)
    engine.step(StepPlan((row.input([5, 6, 7]),)))
    row.start = 3
    poison = np.full((1, engine.info.layout.block_bytes("global")), 0xFF, np.uint8)
    engine.copy_in("global", poison, row.blocks[:1].tolist()).wait()
    with pytest.raises(EngineError, match="are not usable"):
        engine.step(StepPlan((row.input([5], sample=True),)))
    with pytest.raises(EngineError, match="failed before"):
        engine.step(StepPlan((row.input([5], sample=True),)))


# --- from settings ----------------------------------------------------------------------------------


def settings(**options: Any) -> Settings:
    given = {"engine.kind": "tensorrt", "hmt.block_tokens": 16, "hmt.host_bytes": 0}
    given |= {"scheduler.max_batch": 4, "scheduler.token_budget": 64}
    return load_settings([], {}, given | {key.replace("__", "."): value for key, value in options.items()})


def built(memory_bytes: int, context: int = 1024, **options: Any) -> TensorrtEngine:
    config = open_checkpoint(FIXTURES / "tiny").config
    device = EmulatedDevice(memory_bytes=memory_bytes)
    weights = RandomWeights(config)
    return build_engine(
        settings(**options), config, device, weights, context=context, content=lambda: "random"
    )


def test_a_step_that_streams_comes_after_the_pinning_of_what_it_reads() -> None:
    engine = built(64 << 20)
    memory = engine.host_memory("global", 4)
    memory[:] = 0
    [row] = rows(engine, 1, 60)
    generate(engine, row, list(range(5, 45)), 1)
    streaming = replace(row, global_blocks=np.concatenate([[2], row.blocks[1:]]).astype(np.int32), streamed=1)
    with mock.patch.object(EmulatedBuffer, "wait", side_effect=EngineError("not pinned")) as waited:
        engine.step(StepPlan((row.input([5]),)))
        assert not waited.called
        with pytest.raises(EngineError, match="not pinned"):
            engine.step(StepPlan((streaming.input([5]),)))
        waited.assert_called_once_with(3 * engine.info.layout.block_bytes("global"))


def test_pools_take_what_memory_is_left() -> None:
    small, large = (built(mb << 20).info for mb in (64, 128))
    assert large.global_blocks > small.global_blocks > 1024 // 16
    for info, mb in ((small, 64), (large, 128)):
        used = sum(info.memory.values())
        assert 0.91 * (mb << 20) <= used <= 0.92 * (mb << 20)


def test_a_budget_is_kept() -> None:
    info = built(1 << 30, engine__device_memory_bytes=100 << 20).info
    assert 99 << 20 <= sum(info.memory.values()) <= 100 << 20


def test_the_random_engine_generates() -> None:
    engine = built(64 << 20)
    [row] = rows(engine, 1, 60)
    assert len(generate(engine, row, [5, 6, 7], 3)) == 3


@pytest.mark.parametrize(
    ("memory", "context", "options", "words"),
    [
        (
            64,
            1024,
            {"hmt__device_tokens": 1_000_000},
            r"KV of 1,000,000 tokens .* set hmt\.device_tokens to \d+",
        ),
        (24, 131_072, {}, r"KV of one sequence of 131,072 tokens .*set model\.max_context to \d+ or less"),
        (
            5,
            1024,
            {},
            r"GPU memory: .* needed \(weights .*, working memory .* engine\.kv: int8 halves the KV",
        ),
        (64, 1024, {"engine__device_memory_bytes": 1 << 30}, r"engine\.device_memory_bytes: 1\.1 GB, and"),
    ],
    ids=["device_tokens", "a sequence", "weights and work", "the budget"],
)
def test_too_little_memory_is_told_before_weights_are_read(
    memory, context, options, words, monkeypatch
) -> None:
    monkeypatch.setattr("wicore.engine.tensorrt.build.load_weights", None)
    with pytest.raises(EngineError, match=words):
        built(memory << 20, context, **options)


def test_the_reckoned_size_of_the_weights_is_theirs() -> None:
    engine = built(64 << 20)
    config = open_checkpoint(FIXTURES / "tiny").config
    assert engine.info.memory["the weights"] == pytest.approx(weight_bytes(config), rel=0.02)


class SlowlyPinned(EmulatedBuffer):
    """Host memory that is pinned piece by piece, each when it was asked how far that is."""

    def __init__(self, device: EmulatedDevice, size: int, step: int) -> None:
        super().__init__(device, size, "")
        self._pinned, self.piece, self.detours = 0, 2 * step, 0

    @property
    def pinned(self) -> int:
        self._pinned, before = min(self.size, self._pinned + self.piece), self._pinned
        self.detours += before < self.size
        return before

    @pinned.setter
    def pinned(self, value: int) -> None:
        self._pinned = value

    def wait(self, size: int | None = None) -> None:
        self._pinned = max(self._pinned, self.size if size is None else size)


class SlowlyPinning(EmulatedDevice):
    def __init__(self) -> None:
        super().__init__()
        self.slow: list[SlowlyPinned] = []

    def allocate_host(self, size: int, step: int = 0) -> EmulatedBuffer:
        if not step:
            return super().allocate_host(size)
        self.slow.append(SlowlyPinned(self, size, step))
        self._buffers[self.slow[-1].address] = self.slow[-1]
        return self.slow[-1]


def served(device: EmulatedDevice | None = None, **options: Any) -> tuple[list[list[int]], Server]:
    """What jobs get of the engine under the scheduler, with tiers as the settings say: two documents asked
    about in turn, then one that is longer than 256 positions."""
    given = {"engine__invariant": True, "scheduler__max_batch": 2, **options}
    checkpoint = open_checkpoint(FIXTURES / "tiny")
    engine = build_engine(
        settings(**given),
        checkpoint.config,
        device or EmulatedDevice(),
        checkpoint,
        context=560,
        content=lambda: "tiny",
    )
    service = Server(settings(**given), engine)
    numbers = np.random.default_rng(4)
    documents = [numbers.integers(5, 500, 180).tolist() for _ in range(2)]
    prompts = [documents[i % 2] + [20 + i] for i in range(6)] + [numbers.integers(5, 500, 300).tolist()]
    jobs = [Job(12 * i, tuple(prompt), 3, Priority.NORMAL) for i, prompt in enumerate(prompts)]
    outputs = service.serve(jobs)
    service.close()
    return outputs, service


@pytest.mark.thorough
def test_output_does_not_depend_on_how_much_the_device_holds() -> None:
    expected, _ = served(hmt__device_tokens=4096)
    found, service = served(hmt__device_tokens=256, hmt__host_bytes=4 * 2**20)
    assert found == expected
    assert service.streamed_steps > 0
    assert service.cache.manager.stats.hit_tokens["host"] > 0


@pytest.mark.thorough
def test_output_does_not_depend_on_how_soon_host_memory_is_pinned() -> None:
    tiers = {"hmt__device_tokens": 256, "hmt__host_bytes": 4 * 2**20}
    expected, _ = served(**tiers)
    device = SlowlyPinning()
    found, service = served(device, **tiers)
    assert found == expected
    assert service.cache.manager.stats.hit_tokens["host"] > 0
    assert all(buffer.detours > 1 for buffer in device.slow)
