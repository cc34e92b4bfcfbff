"""`wicore bench engine`: small runs of each measurement, on engines that need no GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.services import ROOT, TINY
from wicore.bench.driver import Driver
from wicore.bench.hardware import Bounds, measure_bounds
from wicore.bench.peers import PeerResults, read_peer
from wicore.bench.profile import profile_decode, profile_prompt, table
from wicore.bench.run import GREEDY
from wicore.bench.serving import Serving, Sizes
from wicore.bench.work import Work
from wicore.cli import main
from wicore.engine.null import NullEngine
from wicore.errors import ConfigError, EngineError
from wicore.exit_codes import ExitCode
from wicore.gemma3.config import PUBLISHED
from wicore.scheduler import Limits

HARDWARE = {"cpu", "cores", "python", "date"}
SMALL = ("--context", "40", "--prompt", "50", "--streams", "3", "--output", "6", "--rounds", "1")
VLLM = ROOT / "benchmarks" / "peers" / "vllm-0.26.0-h200.json"


def bench(*options: str) -> Result:
    return CliRunner().invoke(main, ["bench", "engine", *options], env={"WICORE_MODEL__PATH": str(TINY)})


def run(*options: str) -> list[dict]:
    result = bench(*options)
    assert result.exit_code == ExitCode.OK, result.stderr or result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def of(lines: list[dict], measurement: str) -> list[dict]:
    return [line for line in lines if line["measurement"] == measurement]


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    """All that is usual for an engine that is not the CPU's."""
    return run("--engine", "null", *SMALL, "--restored", "900")


def test_every_line_tells_model_machine_format_and_sizes(lines) -> None:
    measured = [line for line in lines if line["measurement"] not in ("bounds", "memory")]
    assert len(measured) == 1 + 2 + 2 + 2 + 3
    for line in measured:
        assert line.keys() >= {"model", "engine", "device", "dtype", "kv", *HARDWARE}
        if line["measurement"] != "ready":
            assert line.keys() >= {"batch", "prompt", "output"}


def test_a_stream_is_timed_after_its_first_token_with_each_sampling(lines) -> None:
    greedy, warm = of(lines, "stream")
    assert (greedy["sampling"], warm["sampling"]) == ("greedy", "warm")
    assert (greedy["prompt"], greedy["output"]) == (40, 6)
    assert 5 < greedy["ms_a_step"] < 100
    assert greedy["tokens_s"] == pytest.approx(1000 / greedy["ms_a_step"], rel=0.01)


def test_a_throughput_run_counts_prompts_and_all_output(lines) -> None:
    line = of(lines, "throughput")[0]
    assert (line["batch"], line["prompt"], line["output"]) == (3, 512, 6)
    assert line["tokens_s"] == pytest.approx(3 * 6 / line["seconds"], rel=0.05)
    assert line["steps"] >= 6
    assert line["preemptions"] == 0


def test_a_restored_prompt_is_found_in_the_tier_that_the_line_names(lines) -> None:
    [host], [file] = of(lines, "first token, from host memory"), of(lines, "first token, from the file")
    assert host["hit_tokens"] == {"host": 896}
    assert file["hit_tokens"] == {"nvme": 896}
    assert host["times_sooner"] > 0
    assert file["disk_read_gb_s"] >= 0


def test_an_engine_that_computes_nothing_has_no_bounds(lines) -> None:
    assert of(lines, "bounds") == [{"measurement": "bounds", "bytes_s": None, "flop_s": None}]
    assert of(lines, "stream")[0]["share_of_bandwidth"] is None


def test_the_cpu_engine_is_measured_beside_the_bounds_of_its_processor() -> None:
    measures = [part for name in ("decode", "prefill", "stream", "restore") for part in ("--measure", name)]
    found = run("--batch", "2", "--steps", "2", "--restored", "700", *measures, *SMALL)
    assert {line["measurement"] for line in found} >= {
        "decode",
        "prefill",
        "stream",
        "first token, from the file",
    }
    [stream, _] = of(found, "stream")
    assert 0 < stream["share_of_bandwidth"] < 1
    assert of(found, "decode")[0]["share_of_bandwidth"] > 0
    assert of(found, "first token, from host memory")[0]["hit_tokens"]["host"] > 600


def test_decode_and_prefill_are_what_is_usual_for_the_cpu() -> None:
    found = run("--batch", "1", "--steps", "2", "--rounds", "1", "--context", "10", "--prompt", "20")
    assert [line["measurement"] for line in found] == ["ceiling", "decode", "prefill", "memory"]


# --- a peer's results ---------------------------------------------------------------------------


def results(**changes: object) -> dict:
    line = {"measurement": "stream", "batch": 1, "prompt": 40, "output": 6, "value": 50.0, "unit": "tokens/s"}
    return {"name": "peer", "card": "none", "model": "tiny", "dtype": "int4", "lines": [line], **changes}


def test_a_peer_s_figure_and_the_ratio_stand_beside_ours(tmp_path: Path) -> None:
    path = tmp_path / "peer.json"
    path.write_text(json.dumps(results()))
    found = run("--engine", "null", "--measure", "stream", "--peer-results", str(path), *SMALL)
    for line in of(found, "stream"):
        assert (line["peer"], line["peer_value"]) == ("peer int4", 50.0)
        assert line["ratio"] == pytest.approx(line["tokens_s"] / 50, abs=0.01)


def test_of_times_the_shorter_is_the_better_and_other_sizes_have_no_ratio() -> None:
    line = {"measurement": "first token", "batch": 1, "prompt": 9, "output": 1, "value": 30, "unit": "ms"}
    peer = PeerResults.model_validate(results(lines=[line]))
    assert peer.beside("first token", 1, 9, 1, 10.0, "ms")["ratio"] == 3.0
    assert peer.beside("first token", 1, 8, 1, 10.0, "ms") == {}
    assert peer.beside("first token", 1, 9, 1, 10.0, "s") == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("{", "Invalid JSON"),
        (json.dumps(results(lines=[{"measurement": "stream"}])), "lines.0.batch: Field required"),
        (json.dumps(results(card="NVIDIA H100")), "with tiny on NVIDIA H100, and this is tiny on none"),
        (json.dumps(results(model="big")), "with big on none"),
    ],
)
def test_results_that_do_not_fit_are_refused_before_anything_is_measured(
    tmp_path: Path, text: str | None, told: str
) -> None:
    path = tmp_path / "peer.json"
    if text is not None:
        path.write_text(text)
    result = bench("--engine", "null", "--peer-results", str(path))
    assert result.exit_code == ExitCode.CONFIG
    assert told in result.stderr
    assert not result.stdout


@pytest.mark.parametrize("path", sorted(VLLM.parent.glob("*.json")), ids=lambda path: path.stem)
def test_the_peers_in_the_repository_have_a_figure_for_each_usual_measurement(path: Path) -> None:
    peer = read_peer(path, device="NVIDIA H200", model="gemma-3-27b")
    sizes = Sizes()
    wanted = [("stream", 1, sizes.stream_prompt, sizes.output), ("ready", 0, 0, 0)]
    wanted += [("first token", 1, prompt, 1) for prompt in sizes.prompts]
    wanted += [("throughput", batch, sizes.prompt, sizes.output) for batch in sizes.streams]
    assert {(line.measurement, line.batch, line.prompt, line.output) for line in peer.lines} == set(wanted)


# --- bounds -------------------------------------------------------------------------------------


def test_a_27b_step_is_bound_by_its_weights_and_its_prompts_by_products() -> None:
    """The arithmetic of a card that moves 4.3 TB/s and computes 790 TFLOP/s."""
    config = PUBLISHED["gemma-3-27b"]
    engine = NullEngine(step_ms=0, global_blocks=8, window_blocks=8)
    layout = replace(
        engine.info.layout,
        **{"global_layers": 10, "window_layers": 52, "kv_heads": 16, "head_dim": 128, "window": 1024},
        dtype="float16",
    )
    info = replace(engine.info, layout=layout, weights="float16")
    work = Work(config, info, Bounds(4.3e12, 790e12))
    assert work.decode_bytes(1, 0) == pytest.approx(54e9, rel=0.02)
    assert work.decode_bytes(1, 640) - work.decode_bytes(1, 0) == pytest.approx(640 * 496 * 1024, rel=0.01)
    assert work.decode_s(1, 1152) == pytest.approx(12.7e-3, rel=0.03)
    assert work.prefill_s(8192) == pytest.approx(0.55, rel=0.05)
    assert work.run_s(16, 512, 256) == pytest.approx(4.1, rel=0.03)
    assert work.run_s(64, 512, 256) == pytest.approx(6.6, rel=0.03)
    assert Work(config, info, Bounds()).run_s(16, 512, 256) is None


def test_an_engine_may_measure_its_own_device() -> None:
    class Card(NullEngine):
        def ceilings(self) -> dict[str, float]:
            return {"copy_bytes_s": 2e12, "matmul_flop_s": 3e14}

    card = Card(step_ms=1, global_blocks=64, window_blocks=64)
    bounds = measure_bounds(card, 1)
    assert bounds == Bounds(2e12, 3e14)
    work = Work(PUBLISHED["gemma-3-270m"], card.info, bounds)
    sizes = Sizes(stream_prompt=20, output=4)
    serving = Serving(card, Limits(2, 64), work, "m", {"greedy": GREEDY}, sizes=sizes, rounds=1)
    [line] = serving.stream()
    assert line["share_of_bandwidth"] is not None


# --- kernel by kernel ---------------------------------------------------------------------------


@dataclass
class Kernel:
    kernel: str
    calls: int
    ms: float
    bytes: int
    flops: int


class Profiled(NullEngine):
    def profile(self, plan) -> list[Kernel]:
        self.profiled = [(len(s.tokens), s.start) for s in plan.sequences]
        return [Kernel("matmul", 62, 8.0, 32 * 10**9, 10**12), Kernel("norm", 124, 2.0, 0, 0)]


def test_a_profile_is_of_a_decode_step_or_of_a_prompt_with_shares_of_the_bounds() -> None:
    engine = Profiled(step_ms=0, global_blocks=64, window_blocks=64)
    limits, bounds = Limits(4, 64), Bounds(4e12, 1e15)
    line = profile_decode(engine, limits, 3, 30, bounds)
    assert engine.profiled == [(1, 31), (1, 31), (1, 30)], "two prompts fit in the first step"
    assert line["ms"] == 10.0
    matmul, norm = line["kernels"]
    assert (matmul["gb_s"], matmul["share_of_bandwidth"]) == (4000.0, 1.0)
    assert (matmul["tflop_s"], matmul["share_of_compute"]) == (125.0, 0.125)
    assert norm == {"kernel": "norm", "calls": 124, "ms": 2.0}
    profile_prompt(engine, limits, 50, bounds)
    assert engine.profiled == [(50, 0)]


def test_the_table_has_a_row_for_each_kernel() -> None:
    engine = Profiled(step_ms=0, global_blocks=64, window_blocks=64)
    line = profile_prompt(engine, Limits(4, 64), 50, Bounds(4e12, None))
    assert table(line).splitlines() == [
        "prompt, batch 1, 50 tokens: 10.000 ms",
        "kernel  calls     ms  share   GB/s  of bandwidth  TFLOP/s  of compute",
        "matmul     62  8.000    80%  4,000          100%      125",
        "norm      124  2.000    20%",
    ]


def test_an_engine_that_cannot_tell_its_kernels_apart_says_so() -> None:
    engine = NullEngine(step_ms=0, global_blocks=8, window_blocks=8)
    with pytest.raises(EngineError, match="--profile: the null engine"):
        profile_prompt(engine, Limits(4, 64), 50, Bounds())


# --- options ------------------------------------------------------------------------------------


def test_made_up_weights_are_for_a_gpu_and_a_published_name() -> None:
    assert "for --engine tensorrt" in bench("--random", "gemma-3-27b").stderr
    result = bench("--engine", "tensorrt", "--random", "gemma-9")
    assert result.exit_code == ExitCode.CONFIG
    assert "gemma-9 is no published model" in result.stderr


def test_a_peer_that_nothing_is_measured_beside_is_refused() -> None:
    result = bench("--measure", "stream", "--peer", "llama.cpp")
    assert result.exit_code == ExitCode.USAGE


def test_a_run_ends_each_sequence_after_its_output() -> None:
    driver = Driver(NullEngine(step_ms=0, global_blocks=64, window_blocks=64), Limits(2, 20))
    driver.add(1, 30, 5, GREEDY)
    driver.add(2, 10, 2, GREEDY)
    times = driver.run()
    assert times.tokens == 7
    assert times.first_token_s <= times.total_s
    assert driver.scheduler.idle


def test_a_bad_peer_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="peer-results"):
        read_peer(tmp_path / "nothing.json", device="x", model="y")
