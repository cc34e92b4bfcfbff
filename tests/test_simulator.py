"""The simulator against traces whose outcome is worked out by hand, and `wicore kv simulate` around it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from wicore.bench.traces import read_trace
from wicore.cli import main
from wicore.engine.base import KVLayout
from wicore.exit_codes import ExitCode
from wicore.hmt.policy import LRU, POLICIES
from wicore.hmt.simulator import Hardware, Replay, Request, replay
from wicore.hmt.tiers import TierSizes

SIZE = 4
"""Tokens of a block."""
BYTES = 32
"""Of a block, in either pool."""
LAYOUT = KVLayout(SIZE, 1, 1, 1, 1, window=4, dtype="float32")
HARDWARE = Hardware(
    {
        ("device", "host"): 100 * BYTES,
        ("host", "device"): 10 * BYTES,
        ("host", "nvme"): 100 * BYTES,
        ("nvme", "host"): 5 * BYTES,
    },
    prefill_tokens_s=100,
    decode_s=0.5,
)
A, B = (1, 2, 3), (4, 5, 6)


def sizes(device: int, host: int | None = None, nvme: int | None = None, windows: int = 8) -> TierSizes:
    def pools(count: int | None) -> dict[str, int] | None:
        return None if count is None else {"global": count, "window": windows}

    return TierSizes(pools(device), pools(host), pools(nvme))


def run(tiers: TierSizes, *requests: Request, policy=LRU, hardware=HARDWARE) -> Replay:
    return replay(requests, LAYOUT, tiers, hardware, policy, checkpoint_tokens=0)


def ask(at: float, ids: tuple[int, ...], tokens: int = 12, output: int = 1, **more: object) -> Request:
    return Request(at, tokens, output, ids, **more)


# --- by hand ------------------------------------------------------------------------------------------


def test_what_the_device_still_has_is_not_computed_again() -> None:
    result = run(sizes(16), ask(0, A), ask(10, A), ask(20, (1, 2, 9)))
    assert result.first_token_s == pytest.approx([0.12, 0.04, 0.04])  # 12, 4 and 4 tokens at 100 a second
    assert result.hit_tokens == {"device": 16}
    assert (result.requests, result.prompt_tokens, result.hit_rate) == (3, 36, 16 / 36)
    assert result.moved_bytes == {}


def test_the_last_token_is_computed_always_and_a_block_that_is_not_full_is_never_found() -> None:
    assert run(sizes(16), ask(0, (1, 2), 8), ask(10, (1, 2), 8)).hit_tokens == {"device": 4}
    assert run(sizes(16), ask(0, (1, 2), 7), ask(10, (1, 2, 3), 12)).hit_tokens == {"device": 4}


def test_who_comes_while_another_is_computed_waits_for_it() -> None:
    result = run(sizes(16), ask(0, A), ask(0.02, B))
    assert result.first_token_s == pytest.approx([0.12, 0.12 - 0.02 + 0.12])


def test_who_finds_the_device_full_waits_until_another_has_ended() -> None:
    # The first has its token at 0.12 s, and its 2 tokens of output at 0.5 s each.
    result = run(sizes(4), ask(0, A, output=2), ask(0.5, B))
    assert result.first_token_s == pytest.approx([0.12, 0.12 + 1.0 - 0.5 + 0.12])


def test_what_only_host_memory_has_is_raised_at_its_speed() -> None:
    result = run(
        TierSizes({"global": 4, "window": 3}, {"global": 32, "window": 32}), ask(0, A), ask(10, B), ask(20, A)
    )
    # Two global blocks and one of the window, 10 a second; then 4 tokens.
    assert result.first_token_s[2] == pytest.approx(0.3 + 0.04)
    assert result.hit_tokens == {"host": 8}
    # Of each prompt three global blocks, and the windows of where it ends and where it can be resumed.
    assert result.moved_bytes == {"device>host": 2 * (3 + 2) * BYTES, "host>device": 3 * BYTES}
    assert result.recalled_bytes == 3 * BYTES


def test_what_only_the_file_has_comes_through_host_memory() -> None:
    tiers = TierSizes({"global": 4, "window": 3}, {"global": 3, "window": 2}, {"global": 32, "window": 32})
    result = run(tiers, ask(0, A), ask(10, B), ask(20, A))
    # Read at 5 blocks a second, one of the window and then two global ones, which are raised last, together.
    assert result.first_token_s[2] == pytest.approx(0.6 + 0.2 + 0.04)
    assert result.hit_tokens == {"nvme": 8}
    assert result.moved_bytes["nvme>host"] == result.recalled_bytes == 3 * BYTES


def test_what_is_longer_than_all_tiers_is_refused_and_nothing_else_changes() -> None:
    long = ask(5, tuple(range(10, 15)), 20)
    result = run(sizes(4), ask(0, A), long, ask(10, A))
    assert (result.requests, result.refused, len(result.first_token_s)) == (3, 1, 2)
    assert result.hit_tokens == {"device": 8}


def test_a_sequence_longer_than_the_device_is_served_from_host_memory() -> None:
    long = tuple(range(10, 17))
    result = run(sizes(4, host=32), ask(0, long, 28), ask(20, long, 28))
    # Of four global blocks it may have two, and computes no more at a time; the first two of each step must
    # have been saved before the next, and the second time nothing but the last four tokens is computed.
    assert result.refused == 0
    assert result.first_token_s[0] > 0.28
    assert sum(result.hit_tokens.values()) == 24


def test_requests_are_served_in_order_of_arrival() -> None:
    assert run(sizes(16), ask(10, A), ask(0, B)) == run(sizes(16), ask(0, B), ask(10, A))


def test_attention_of_the_trace_reaches_the_policy() -> None:
    told: list[tuple[list[int], list[float]]] = []

    class Told(LRU):
        def record(self, blocks, mass, steps=1) -> None:
            told.append((blocks.tolist(), mass.tolist()))

    run(sizes(16), ask(0, A, attention=(2.0, 0.5, 0.5)), ask(10, B), policy=Told)
    [(blocks, mass)] = told
    assert len(set(blocks)) == 3
    assert mass == pytest.approx([2 / 3, 1 / 6, 1 / 6])


def test_a2cr_evicts_what_draws_little_attention_where_lru_evicts_what_is_older() -> None:
    # Of the four blocks of the first two, the third request evicts two.
    first, second, third = (ask(10 * n, (2 * n + 1, 2 * n + 2), 8, attention=(1.9, 0.1)) for n in range(3))
    trace = [first, second, third, ask(30, first.ids, 8)]
    hits = {name: run(sizes(5), *trace, policy=POLICIES[name]).hit_tokens for name in ("lru", "a2cr")}
    assert hits == {"lru": {}, "a2cr": {"device": 4}}


def random_trace(seed: int, count: int = 150) -> list[Request]:
    """Requests that share prefixes: paths in a tree."""
    r = random.Random(seed)
    requests = []
    for number in range(count):
        path = [r.randrange(6)]
        while len(path) < r.randint(1, 6):
            path.append(10 * path[-1] + r.randrange(3))
        tokens = len(path) * SIZE - r.randrange(SIZE)
        requests.append(ask(number * 0.3, tuple(path), tokens, r.randint(0, 4)))
    return requests


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tiers", [sizes(8), sizes(8, 20), sizes(8, 12, 60)], ids=["device", "host", "file"])
def test_a_replay_gives_the_same_when_it_is_run_again(policy: str, tiers: TierSizes) -> None:
    trace = random_trace(1)
    first, again = (run(tiers, *trace, policy=POLICIES[policy]) for _ in range(2))
    assert first == again
    assert first.requests == len(first.first_token_s) == len(trace)
    assert min(first.first_token_s) > 0
    assert first.hit_rate > 0.05


# --- traces -------------------------------------------------------------------------------------------


def line(**changes: object) -> str:
    fields = {"timestamp": 1000, "input_length": 6, "output_length": 2, "hash_ids": [1, 2], "block_tokens": 4}
    return json.dumps({key: value for key, value in (fields | changes).items() if value is not None})


def write(folder: Path, *lines: str) -> Path:
    trace = folder / "trace.jsonl"
    trace.write_text("".join(f"{text}\n" for text in lines), "utf-8")
    return trace


def test_a_trace_is_read_at_its_pace_and_up_to_its_limit(tmp_path: Path) -> None:
    trace = write(tmp_path, line(), line(timestamp=3000, attention=[2, 0]), line(hash_ids="wrong"))
    assert read_trace(trace, 0.5, 2, None) == [
        Request(2.0, 6, 2, (1, 2)),
        Request(6.0, 6, 2, (1, 2), (2.0, 0.0)),
    ]


def test_blocks_have_512_tokens_where_the_first_line_says_nothing(tmp_path: Path) -> None:
    trace = write(tmp_path, line(block_tokens=None, input_length=600))
    assert [request.input_tokens for request in read_trace(trace, 1, None, None)] == [600]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ("", "must be a JSON object"),
        (line(timestamp=None), "timestamp: is missing"),
        (line(input_length=None), "input_length: is missing"),
        (line(hash_ids=None), "hash_ids: is missing"),
        (line(output_length=-1), "output_length: -1 is below 0"),
        (line(input_length=0, hash_ids=[]), "hash_ids: 0 blocks of 4 are not what input_length 0 takes"),
        (line(input_length=9), "hash_ids: 2 blocks of 4 are not what input_length 9 takes"),
        (line(input_length=4), "hash_ids: 2 blocks of 4 are not what input_length 4 takes"),
        (line(hash_ids=[1, 2**31]), "hash_ids: must be numbers of 32 bits"),
        (line(hash_ids=["a", 2]), "hash_ids: must be numbers of 32 bits"),
        (line(input_length="many"), "input_length: must be a number, not 'many'"),
        (line(timestamp="noon"), "timestamp: must be a number, not 'noon'"),
        (line(attention=[1]), "attention: must be 2 numbers"),
        (line(attention=[1, -1]), "attention: must be 2 numbers, none below 0"),
        (line(attention=[0, 0]), "attention: must be 2 numbers, none below 0 and not all 0"),
        (line(attention=[1, "x"]), "attention: must be 2 numbers"),
    ],
)
def test_a_line_that_is_wrong_is_named_with_what_is_wrong(text: str, what: str, tmp_path: Path) -> None:
    trace = write(tmp_path, line(), text)
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 2: ") as raised:
        read_trace(trace, 1, None, None)
    assert what in str(raised.value)


@pytest.mark.parametrize("size", [0, -4, "x", 1.5, True])
def test_a_block_size_that_is_none_is_named(size: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 1: block_tokens: must be a number above 0"):
        read_trace(write(tmp_path, line(block_tokens=size)), 1, None, None)


def test_a_trace_that_is_empty_or_no_text_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    for content in (b"", b"\xff\xfe\x00"):
        trace.write_bytes(content)
        with pytest.raises(ValueError, match=r"trace\.jsonl, line 1: must be a JSON object"):
            read_trace(trace, 1, None, None)


def test_recorded_attention_is_given_to_requests_that_have_none(tmp_path: Path) -> None:
    recorded = tmp_path / "attention.json"
    recorded.write_text(json.dumps({"profile": [4.0, 1.0, 1.0, 2.0], "spread": 0}))
    trace = write(tmp_path, line(), line(attention=[1, 3]))
    drawn, own = (request.attention for request in read_trace(trace, 1, None, recorded))
    assert drawn == pytest.approx(np.array([2.5, 1.5]) / 2)
    assert own == (1.0, 3.0)


@pytest.mark.parametrize("content", ["{", "[]", '{"profile": [1]}', '{"profile": "x", "spread": 1}'])
def test_a_file_that_holds_no_recorded_attention_is_named(content: str, tmp_path: Path) -> None:
    recorded = tmp_path / "attention.json"
    recorded.write_text(content)
    with pytest.raises(ValueError, match=r"attention\.json: no recorded attention"):
        read_trace(write(tmp_path, line()), 1, None, recorded)


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two conversations in turn, on blocks of 64 tokens."""
    turns = [
        line(
            timestamp=1000 * number,
            input_length=64 * (2 + number),
            hash_ids=[100 * (number % 2) + i for i in range(2 + number)],
            block_tokens=64,
        )
        for number in range(12)
    ]
    return write(tmp_path, *turns)


def simulate(trace: Path, *options: str):
    # A block of 64 tokens of this model takes 0.2 MB for all global layers, and five times that for windows.
    arguments = ["kv", "simulate", str(trace), "--model", "gemma-3-270m", "--host-gb", "0.1"]
    return CliRunner().invoke(main, [*arguments, "--nvme-gb", "0.5", *options])


def test_the_table_has_a_row_for_each_device_and_policy_under_one_heading(trace: Path) -> None:
    result = simulate(
        trace, "--device-gb", "0.02", "--device-gb", "0.05", "--policy", "lru", "--policy", "opt"
    )
    assert result.exit_code == ExitCode.OK, result.output
    heading, *rows = result.stdout.splitlines()
    assert heading.split()[:3] == ["policy", "device", "GB"]
    assert [row.split()[:2] for row in rows] == [
        ["lru", "0.02"], ["opt", "0.02"], ["lru", "0.05"], ["opt", "0.05"],
    ]  # fmt: skip
    assert "opt at 0.05 GB" in result.stderr


def test_json_lines_have_every_policy_and_add_up(trace: Path) -> None:
    result = simulate(trace, "--device-gb", "0.02", "--json")
    lines = [json.loads(text) for text in result.stdout.splitlines()]
    assert [found["policy"] for found in lines] == [*POLICIES, "opt"]
    for found in lines:
        assert (found["measurement"], found["requests"], found["refused"]) == ("kv simulate", 12, 0)
        rates = [found[f"{tier}_rate"] for tier in ("device", "host", "nvme")]
        assert found["hit_rate"] == pytest.approx(sum(rates))
        assert 0 < found["first_token_p50_s"] <= found["first_token_p99_s"]
        assert found["recalled_gb"] == found["moved_gb"].get("host>device", 0)


@pytest.mark.parametrize("seed", range(5))
def test_who_knows_the_future_recalls_no_more_than_lru(seed: int, tmp_path: Path) -> None:
    lines = [
        line(
            timestamp=1e6 * request.at,
            input_length=request.input_tokens,
            hash_ids=request.ids,
        )
        for request in random_trace(seed)
    ]
    result = simulate(
        write(tmp_path, *lines), "--json", "--policy", "lru", "--policy", "opt", "--device-gb", "0.0015"
    )
    lru, opt = (json.loads(text) for text in result.stdout.splitlines())
    assert 0 < opt["recalled_gb"] <= lru["recalled_gb"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--model", "gemma-9"], "--model: 'gemma-9' is not known; one of"),
        (["--device-gb", "0.00001"], "--device-gb: 1e-05 GB hold no block of 64 tokens of gemma-3-270m"),
        (["--plot", "curves.doc"], "--plot: curves.doc must end in one of .png"),
        (["--pace", "0"], "--pace"),
        (["--prefill", "0"], "--prefill"),
        (["--nvme-gbps", "-1"], "--nvme-gbps"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(options: list[str], what: str, trace: Path) -> None:
    result = simulate(trace, *options)
    assert result.exit_code == ExitCode.USAGE
    assert what in result.stderr


def test_a_wrong_trace_is_a_mistake_in_use(tmp_path: Path) -> None:
    result = simulate(write(tmp_path, line(), "{}"))
    assert result.exit_code == ExitCode.USAGE
    assert "trace.jsonl, line 2: hash_ids: is missing" in result.stderr


def test_the_curves_are_drawn(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    result = simulate(trace, "--device-gb", "0.02", "--device-gb", "0.05", "--plot", str(picture))
    assert result.exit_code == ExitCode.OK, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_who_lacks_matplotlib_is_told_at_once_how_to_get_it(trace: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("wicore.commands.kv.find_spec", lambda name: None)
    result = simulate(trace, "--plot", str(tmp_path / "curves.png"))
    assert result.exit_code == ExitCode.CONFIG
    assert "pip install 'wicore[bench]'" in result.stderr
    assert result.stdout == ""
