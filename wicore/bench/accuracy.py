"""`wicore bench accuracy`: what 8-bit weights or 8-bit KV change, against the same engine in float32.

Texts of three kinds, cut into windows that are scored position by position: English reference prose and
source code (both from the Python standard library, so that anyone can repeat it), and stories that the
exact model itself tells, which is what a served model mostly sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import SequenceInput, StepPlan
from wicore.engine.cpu import CpuEngine
from wicore.engine.cpu.pool import KVFormat
from wicore.engine.cpu.weights import WeightFormat
from wicore.model import Model
from wicore.request import SamplingParams
from wicore.sampling import SamplingState

WINDOW = 384
"""Positions of one text that are scored together."""
LONG = 4000
LONG_SCORED = 1024
"""The long text's length, and how many of its last positions are scored: those that see the most KV."""
_KV_FORMATS: tuple[KVFormat, KVFormat] = ("float32", "int8")
_BLOCK = 32
_ROWS = 64
"""Positions compared at a time: a row of logits is a megabyte."""
_STORIES = (
    "Once upon a time in a small village,",
    "The history of the city begins",
    "My favourite recipe is",
)

Float = NDArray[np.float32]
Line = dict[str, object]


def measure(model: Model, windows: int) -> Iterator[Line]:
    """8-bit weights: a line a kind of text and one for all, `windows` scored of each kind."""
    exact, rounded = _engine(model, WINDOW, weights="float32"), _engine(model, WINDOW, weights="int8")
    texts = _texts(model, exact, windows)
    for line in _lines(exact, rounded, texts):
        yield {"weights": "int8 against float32", **line}


def measure_kv(model: Model, windows: int, weights: WeightFormat) -> Iterator[Line]:
    """8-bit KV with the same weights: the same texts, the end of a long one, and the size of the KV."""
    exact, rounded = (_engine(model, LONG, weights=weights, kv=kv) for kv in _KV_FORMATS)
    texts = _texts(model, exact, windows)
    for line in _lines(exact, rounded, texts):
        yield {"kv": "int8 against float32", "weights": weights, **line}
    scored = _compare(exact, rounded, _long_text(model), LONG - LONG_SCORED)
    kind = f"the last {LONG_SCORED} of {LONG} positions of reference prose"
    yield {"kv": "int8 against float32", "weights": weights, **_line(kind, *scored)}
    for engine in (exact, rounded):
        layout = engine.info.layout
        yield {
            "measurement": "kv size",
            "kv": layout.dtype,
            "global_bytes_a_token": layout.block_bytes("global") // layout.block_tokens,
            "window_bytes_a_token": layout.block_bytes("window") // layout.block_tokens,
        }


def _lines(
    exact: CpuEngine, rounded: CpuEngine, texts: Mapping[str, list[NDArray[np.int32]]]
) -> Iterator[Line]:
    agree: list[NDArray[np.bool_]] = []
    divergence: list[NDArray[np.float64]] = []
    for kind, samples in texts.items():
        same, nats = zip(*(_compare(exact, rounded, tokens) for tokens in samples), strict=True)
        agree.append(np.concatenate(same))
        divergence.append(np.concatenate(nats))
        yield _line(kind, agree[-1], divergence[-1])
    yield _line("all", np.concatenate(agree), np.concatenate(divergence))


def _line(kind: str, agree: NDArray[np.bool_], divergence: NDArray[np.float64]) -> Line:
    return {
        "measurement": "accuracy",
        "text": kind,
        "positions": len(agree),
        "argmax_agreement": round(float(agree.mean()), 4),
        "mean_kl_nats": float(f"{divergence.mean():.2e}"),
        "p99_kl_nats": float(f"{np.quantile(divergence, 0.99):.2e}"),
    }


def _engine(model: Model, positions: int, *, weights: WeightFormat, kv: KVFormat = "float32") -> CpuEngine:
    blocks = positions // _BLOCK + 1
    return CpuEngine(
        model.checkpoint,
        weights=weights,
        kv=kv,
        block_tokens=_BLOCK,
        global_blocks=blocks,
        window_blocks=blocks,
    )


def _prose(topics: Sequence[str]) -> str:
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics[name] for name in topics)


def _long_text(model: Model) -> NDArray[np.int32]:
    tokens = model.tokenizer.encode(_prose(("objects", "types", "specialnames", "class")), bos=True)
    if len(tokens) < LONG:
        raise ValueError(f"the long text has {len(tokens)} tokens, {LONG} needed")
    return np.array(tokens[:LONG], np.int32)


def _texts(model: Model, exact: CpuEngine, windows: int) -> Mapping[str, list[NDArray[np.int32]]]:
    import heapq
    import textwrap

    prose = _prose(("assignment", "exprlists", "with", "try"))
    code = inspect.getsource(heapq) + inspect.getsource(textwrap)
    stories = [_story(model, exact, _STORIES[i % len(_STORIES)], i) for i in range(windows)]
    return {
        "reference prose": _windows(model, prose, windows),
        "source code": _windows(model, code, windows),
        "the model's own stories": stories,
    }


def _windows(model: Model, text: str, count: int) -> list[NDArray[np.int32]]:
    bos, *ids = model.tokenizer.encode(text, bos=True)
    size = WINDOW - 1
    return [np.array([bos, *ids[i * size : (i + 1) * size]], np.int32) for i in range(count)]


def _story(model: Model, engine: CpuEngine, opening: str, seed: int) -> NDArray[np.int32]:
    tokens = model.tokenizer.encode(opening, bos=True)
    # Told on whatever comes: an early end would leave positions unscored.
    params = SamplingParams(temperature=0.7, top_p=0.9, logit_bias={model.tokenizer.eos: -100.0})
    state = SamplingState(params, seed)
    start = 0
    while len(tokens) < WINDOW:
        plan = StepPlan((_input(engine, np.array(tokens[start:], np.int32), start, state),))
        token = engine.step(plan).outputs[0].token
        assert token is not None
        state.observe(token.id)
        start = len(tokens)
        tokens.append(token.id)
    return np.array(tokens, np.int32)


def _input(
    engine: CpuEngine, tokens: NDArray[np.int32], start: int, sampling: SamplingState | None = None
) -> SequenceInput:
    table = np.arange(engine.info.global_blocks, dtype=np.int32)
    return SequenceInput(0, tokens, start, table, table, 0, sampling)


def _compare(
    exact: CpuEngine, rounded: CpuEngine, tokens: NDArray[np.int32], first: int = 0
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(whether the likeliest token is the same, KL divergence) at positions from `first` on."""
    agree, divergence = [], []
    if first:
        for engine in (exact, rounded):
            engine.step(StepPlan((_input(engine, tokens[:first], 0),)))
    for start in range(first, len(tokens), _ROWS):
        part = tokens[start : start + _ROWS]
        p, q = (e.logits(StepPlan((_input(e, part, start),)))[0] for e in (exact, rounded))
        agree.append(p.argmax(-1) == q.argmax(-1))
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        divergence.append((np.exp(log_p) * (log_p - log_q)).sum(-1, dtype=np.float64))
    return np.concatenate(agree), np.concatenate(divergence)


def _log_softmax(logits: Float) -> Float:
    shifted: Float = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted
