"""`wicore bench accuracy`: what 8-bit weights change, against the same engine in float32.

Texts of three kinds, cut into windows that are scored position by position: English reference prose and
source code (both from the Python standard library, so that anyone can repeat it), and stories that the
float32 model itself tells, which is what a served model mostly sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import SequenceInput, StepPlan
from wicore.engine.cpu import CpuEngine
from wicore.engine.cpu.weights import WeightFormat
from wicore.model import Model
from wicore.request import SamplingParams
from wicore.sampling import SamplingState

WINDOW = 384
"""Positions of one text that are scored together."""
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
    """One line a kind of text and one for all: agreement of the likeliest token, and mean KL divergence
    (nats, float32 from 8-bit) a position. `windows` are scored of each kind."""
    exact, rounded = _engine(model, "float32"), _engine(model, "int8")
    agree: list[NDArray[np.bool_]] = []
    divergence: list[NDArray[np.float64]] = []
    for kind, texts in _texts(model, exact, windows).items():
        same, nats = zip(*(_compare(exact, rounded, tokens) for tokens in texts), strict=True)
        agree.append(np.concatenate(same))
        divergence.append(np.concatenate(nats))
        yield _line(kind, agree[-1], divergence[-1])
    yield _line("all", np.concatenate(agree), np.concatenate(divergence))


def _line(kind: str, agree: NDArray[np.bool_], divergence: NDArray[np.float64]) -> Line:
    return {
        "measurement": "accuracy",
        "weights": "int8 against float32",
        "text": kind,
        "positions": len(agree),
        "argmax_agreement": round(float(agree.mean()), 4),
        "mean_kl_nats": float(f"{divergence.mean():.2e}"),
        "p99_kl_nats": float(f"{np.quantile(divergence, 0.99):.2e}"),
    }


def _engine(model: Model, weights: WeightFormat) -> CpuEngine:
    blocks = WINDOW // _BLOCK + 1
    return CpuEngine(
        model.checkpoint, weights=weights, block_tokens=_BLOCK, global_blocks=blocks, window_blocks=blocks
    )


def _texts(model: Model, exact: CpuEngine, windows: int) -> Mapping[str, list[NDArray[np.int32]]]:
    import heapq
    import pydoc_data.topics
    import textwrap

    prose = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "exprlists", "with", "try"))
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
        plan = StepPlan((_input(np.array(tokens[start:], np.int32), start, state),))
        token = engine.step(plan).outputs[0].token
        assert token is not None
        state.observe(token.id)
        start = len(tokens)
        tokens.append(token.id)
    return np.array(tokens, np.int32)


def _input(tokens: NDArray[np.int32], start: int, sampling: SamplingState | None = None) -> SequenceInput:
    table = np.arange(WINDOW // _BLOCK + 1, dtype=np.int32)
    return SequenceInput(0, tokens, start, table, table, 0, sampling)


def _compare(
    exact: CpuEngine, rounded: CpuEngine, tokens: NDArray[np.int32]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    agree, divergence = [], []
    for start in range(0, len(tokens), _ROWS):
        plan = StepPlan((_input(tokens[start : start + _ROWS], start),))
        p, q = exact.logits(plan)[0], rounded.logits(plan)[0]
        agree.append(p.argmax(-1) == q.argmax(-1))
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        divergence.append((np.exp(log_p) * (log_p - log_q)).sum(-1, dtype=np.float64))
    return np.concatenate(agree), np.concatenate(divergence)


def _log_softmax(logits: Float) -> Float:
    shifted: Float = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted
