"""Studies of the cache over request traces: what `wicore kv simulate` prints and draws."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from wicore.engine.base import KVLayout, Pool
from wicore.engine.sizing import layout_of
from wicore.gemma3.config import PUBLISHED, published
from wicore.hmt.chain import TokenChain
from wicore.hmt.optimum import OPT, Future
from wicore.hmt.policy import POLICIES
from wicore.hmt.rates import Route
from wicore.hmt.simulator import Hardware, Replay, Request, replay
from wicore.hmt.tiers import POOLS, TierSizes, split_bytes

Line = dict[str, Any]

_GB = 1e9
_BLOCK_TOKENS = 512
"""Of Mooncake's traces."""
_COLUMNS = "{:<8}{:>10}{:>9}{:>9}{:>9}{:>9}{:>13}{:>13}{:>11}{:>11}"


@dataclass(frozen=True, slots=True)
class Study:
    """What is replayed and on what: the options of `wicore kv simulate`. `check` it before it is `run`."""

    trace: Path
    model: str
    devices: tuple[float, ...]
    host_gb: float
    nvme_gb: float
    host_gbps: float
    nvme_gbps: float
    prefill: float
    decode_ms: float
    pace: float
    window_share: float
    checkpoint_tokens: int
    limit: int | None
    policies: tuple[str, ...]
    attention: Path | None

    @classmethod
    def of(cls, **options: Any) -> Study:
        """Raises ValueError for a model that is not published."""
        study = cls(**{field.name: options[field.name] for field in fields(cls)})
        if published(study.model) is None:
            raise ValueError(f"--model: {study.model!r} is not known; one of {', '.join(PUBLISHED)}")
        return study

    def check(self) -> None:
        """Raises ValueError for a device that holds no block."""
        size = block_tokens(self.trace)
        for device in self.devices:
            blocks = self._blocks(size, device)
            if blocks is None or not all(blocks.values()):
                raise ValueError(f"--device-gb: {device:g} GB hold no block of {size} tokens of {self.model}")

    def run(self, requests: Sequence[Request], progress: Callable[[str], None]) -> Iterator[Line]:
        """A line for each capacity and policy."""
        size = block_tokens(self.trace)
        for device in self.devices:
            for name in self.policies or (*POLICIES, "opt"):
                started = time.monotonic()
                result = self._replay(requests, size, device, name)
                progress(f"{name} at {device:g} GB: {time.monotonic() - started:.1f} s")
                yield self._line(result, device, name)

    def row(self, line: Line, *, first: bool) -> str:
        """The line as a row of a table; `first` puts the heading before it."""
        heading = _COLUMNS.format(
            "policy", "device GB", "hit %", "device %", "host %", "nvme %", "recalled GB", "written GB",
            "TTFT p50", "p99 s",
        )  # fmt: skip
        row = _COLUMNS.format(
            line["policy"],
            f"{line['device_gb']:g}",
            *(f"{100 * line[key]:.1f}" for key in ("hit_rate", "device_rate", "host_rate", "nvme_rate")),
            *(f"{line[key]:.1f}" for key in ("recalled_gb", "written_gb")),
            *(f"{line[key]:.2f}" for key in ("first_token_p50_s", "first_token_p99_s")),
        )
        return f"{heading}\n{row}" if first else row

    def _replay(self, requests: Sequence[Request], size: int, device: float, name: str) -> Replay:
        layout, on_device = self._layout(size), self._blocks(size, device)
        assert on_device is not None, "checked"
        host = self._blocks(size, self.host_gb)
        sizes = TierSizes(on_device, host, self._blocks(size, self.nvme_gb) if host else None)
        between: Mapping[Route, float] = {
            ("device", "host"): self.host_gbps * _GB,
            ("host", "device"): self.host_gbps * _GB,
            ("host", "nvme"): self.nvme_gbps * _GB,
            ("nvme", "host"): self.nvme_gbps * _GB,
        }
        hardware = Hardware(between, self.prefill, self.decode_ms / 1000)
        run = partial(replay, requests, layout, sizes, hardware, checkpoint_tokens=self.checkpoint_tokens)
        if name != "opt":
            return run(POLICIES[name])
        # What comes is known from a first replay, that of any policy: the order is that of arrival.
        order: list[list[bytes]] = []
        run(POLICIES["lru"], served=lambda chain: order.append(chain.hashes))
        future = Future(order)

        def advance(chain: TokenChain) -> None:
            future.advance()

        return run(partial(OPT, future=future), served=advance)

    def _blocks(self, size: int, gigabytes: float) -> dict[Pool, int] | None:
        layout = self._layout(size)
        slot_bytes: dict[Pool, int] = {pool: layout.block_bytes(pool) for pool in POOLS}
        return split_bytes(slot_bytes, int(gigabytes * _GB), self.window_share)

    def _layout(self, size: int) -> KVLayout:
        config = PUBLISHED[self.model]
        return layout_of(config, size, "float16")

    def _line(self, result: Replay, device: float, name: str) -> Line:
        waits = sorted(result.first_token_s) or [0.0]
        prompt = max(1, result.prompt_tokens)
        return {
            "measurement": "kv simulate",
            "policy": name,
            "model": self.model,
            "device_gb": device,
            "host_gb": self.host_gb,
            "nvme_gb": self.nvme_gb,
            "requests": result.requests,
            "refused": result.refused,
            "hit_rate": result.hit_rate,
            **{
                f"{tier}_rate": result.hit_tokens.get(tier, 0) / prompt for tier in ("device", "host", "nvme")
            },
            "recalled_gb": result.recalled_bytes / _GB,
            "written_gb": result.moved_bytes.get("device>host", 0) / _GB,
            "moved_gb": {route: size / _GB for route, size in result.moved_bytes.items()},
            "first_token_p50_s": statistics.median(waits),
            "first_token_p99_s": waits[int(0.99 * (len(waits) - 1))],
        }


def block_tokens(trace: Path) -> int:
    """Tokens of a block: what the trace's first line says, or 512.

    Raises ValueError naming the file, the line and what is wrong with it.
    """
    with _lines(trace) as lines:
        size = _parsed(trace, 1, next(lines, "")).get("block_tokens", _BLOCK_TOKENS)
    if type(size) is not int or size < 1:
        raise ValueError(f"{trace}, line 1: block_tokens: must be a number above 0, not {size!r}")
    return size


def read_trace(trace: Path, pace: float, limit: int | None, attention: Path | None) -> list[Request]:
    """The requests of a trace, `pace` times as fast as they came.

    Raises ValueError naming the file, the line and what is wrong with it.
    """
    size = block_tokens(trace)
    profile = _Profile(attention) if attention is not None else None
    requests = []
    with _lines(trace) as lines:
        for number, text in enumerate(islice(lines, limit), 1):
            line = _parsed(trace, number, text)
            try:
                requests.append(_request(line, size, pace, profile))
            except KeyError as err:
                raise ValueError(f"{trace}, line {number}: {err.args[0]}: is missing") from None
            except (TypeError, ValueError) as err:
                raise ValueError(f"{trace}, line {number}: {err}") from None
    return requests


def _request(line: Line, size: int, pace: float, profile: _Profile | None) -> Request:
    """Raises KeyError for a field that is missing, TypeError or ValueError for one that is wrong."""
    ids = tuple(line["hash_ids"])
    at, tokens, output = (_number(line, key) for key in ("timestamp", "input_length", "output_length"))
    if tokens < 1 or not 0 <= len(ids) * size - tokens < size:
        raise ValueError(f"hash_ids: {len(ids)} blocks of {size} are not what input_length {tokens} takes")
    if not all(type(i) is int and -(2**31) <= i < 2**31 for i in ids):
        raise ValueError("hash_ids: must be numbers of 32 bits")
    if output < 0:
        raise ValueError(f"output_length: {output} is below 0")
    drawn = line.get("attention") or (profile.of(ids) if profile else None)
    return Request(at / 1000 / pace, int(tokens), int(output), ids, _attention(drawn, len(ids)))


def _number(line: Line, key: str) -> float:
    number: float = line[key]
    if not _is_number(number):
        raise ValueError(f"{key}: must be a number, not {number!r}")
    return number


def _attention(drawn: Any, blocks: int) -> tuple[float, ...] | None:
    if drawn is None:
        return None
    right = isinstance(drawn, list) and len(drawn) == blocks
    if not right or not all(_is_number(share) and share >= 0 for share in drawn) or sum(drawn) == 0:
        raise ValueError(f"attention: must be {blocks} numbers, none below 0 and not all 0")
    return tuple(map(float, drawn))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _lines(trace: Path) -> TextIO:
    # What is no UTF-8 is no JSON either, and then has a line that can be named.
    return trace.open(encoding="utf-8", errors="replace")


def _parsed(trace: Path, number: int, text: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if not isinstance(line, dict):
        raise ValueError(f"{trace}, line {number}: must be a JSON object")
    return line


class _Profile:
    """Attention by place in the prompt, as recorded from a model (benchmarks/attention.py), with as much
    spread between contents as was recorded; a content's own factor is drawn from its id."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError naming the file when it holds something else."""
        try:
            recorded = json.loads(path.read_text("utf-8"))
            self._curve, self._spread = np.asarray(recorded["profile"], float), float(recorded["spread"])
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{path}: no recorded attention: {type(err).__name__}: {err}") from None

    def of(self, ids: Sequence[int]) -> list[float]:
        places = (np.arange(len(ids)) + 0.5) / len(ids)
        grid = (np.arange(len(self._curve)) + 0.5) / len(self._curve)
        own = [np.random.default_rng(abs(i)).lognormal(0, self._spread) for i in ids]
        drawn = np.interp(places, grid, self._curve) * own
        values: list[float] = (drawn / drawn.mean()).tolist()
        return values


def curves(lines: Sequence[Line], path: Path) -> None:
    """Draw bytes recalled and hit rate against the device's capacity, a curve a policy. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, label, scale in (
        (axes[0], "recalled_gb", "recalled to the device, GB", 1.0),
        (axes[1], "device_rate", "prompt tokens found on the device, %", 100.0),
    ):
        for policy in dict.fromkeys(line["policy"] for line in lines):
            points = sorted(
                (line["device_gb"], scale * line[key]) for line in lines if line["policy"] == policy
            )
            dashes = {"linestyle": "--", "color": "black"} if policy == "opt" else {}
            bold = 2.5 if policy == "a2cr" else 1.2
            axis.plot(
                *zip(*points, strict=True), marker="o", markersize=3, label=policy, linewidth=bold, **dashes
            )
        axis.set_xlabel("KV memory of the device, GB")
        axis.set_ylabel(label)
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)
