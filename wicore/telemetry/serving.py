"""What a worker has served, in counts and histograms.

Pure: times come from the caller. What is measured, and the bounds of the histograms, are those of vLLM's v1
engine (vllm/v1/metrics/loggers.py), so that its dashboards and thresholds carry over.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from wicore.hmt.histogram import Histogram

FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
NEXT_TOKEN_S = (
    *(
        0.01,
        0.025,
        0.05,
        0.075,
        0.1,
        0.15,
        0.2,
        0.3,
        0.4,
        0.5,
        0.75,
        1.0,
        2.5,
        5.0,
        7.5,
        10.0,
        20.0,
        40.0,
        80.0,
    ),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def token_bounds(most: int) -> list[int]:
    """1, 2, 5, 10, ... up to `most`."""
    bounds = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return [bound for bound in bounds if bound <= most]


@dataclass(slots=True)
class Times:
    """When one attempt at a job reached each stage, in seconds of one clock; None: not yet."""

    popped: float
    queued_s: float
    """How long it had waited by then, since it was accepted."""
    attempt: int = 1
    resumes: bool = False
    """An earlier attempt left events, so that this one's first token is not the job's."""
    seeing: float | None = None
    """When its images were asked for, if it has any; `seen` when all were there."""
    seen: float | None = None
    scheduled: float | None = None
    """When the first step that computed something of it began."""
    first_token: float | None = None
    last_token: float | None = None


class Rate:
    """How fast totals grow, over about the last WINDOW_S seconds. One thread adds; any may ask."""

    WINDOW_S = 10

    def __init__(self) -> None:
        self._seen: deque[tuple[float, tuple[int, ...]]] = deque(maxlen=self.WINDOW_S + 1)

    def see(self, totals: tuple[int, ...], at: float) -> None:
        if not self._seen or at - self._seen[-1][0] >= 1:
            self._seen.append((at, totals))

    def a_second(self, totals: tuple[int, ...], at: float) -> list[float]:
        """Of each of the totals; 0 when nothing was seen."""
        seen = list(self._seen)
        if not seen:
            return [0.0] * len(totals)
        since, before = next((old for old in reversed(seen) if at - old[0] >= self.WINDOW_S), seen[0])
        return [(now - then) / max(1.0, at - since) for now, then in zip(totals, before, strict=True)]


class ServingStats:
    """Of one worker since its start. One thread writes; any may `report`."""

    def __init__(self, context: int) -> None:
        """`context`: the most tokens that a request can have."""
        self._latency = {
            "time_to_first_token": Histogram(FIRST_TOKEN_S),
            "inter_token_latency": Histogram(NEXT_TOKEN_S),
            "request_time_per_output_token": Histogram(NEXT_TOKEN_S),
            "request_queue_time": Histogram(REQUEST_S),
            "request_prefill_time": Histogram(REQUEST_S),
            "request_decode_time": Histogram(REQUEST_S),
            "request_inference_time": Histogram(REQUEST_S),
            "e2e_request_latency": Histogram(REQUEST_S),
        }
        self._prompt = Histogram(token_bounds(context))
        self._generated = Histogram(token_bounds(context))
        self._step = Histogram(STEP_TOKENS)
        self._finished: Counter[str] = Counter()
        self._prompt_tokens = self._generation_tokens = 0
        self._rate = Rate()
        self._last: dict[int, float] = {}
        """When each sequence that is present got its last token."""
        self._gone: list[int] = []

    def step(self, sampled: Iterable[int], computed: int, at: float) -> None:
        """A step ended: the keys of the sequences that got a token, and how many tokens it computed."""
        self._rate.see(self._totals, at)
        self._step.add(computed)
        latency, last = self._latency["inter_token_latency"], self._last
        shared: Counter[float] = Counter()
        for key in sampled:
            self._generation_tokens += 1
            if (before := last.get(key)) is not None:
                shared[before] += 1
            last[key] = at
        # Most sequences had their last token in the same step.
        for before, count in shared.items():
            latency.add(at - before, count)
        for key in self._gone:
            last.pop(key, None)
        self._gone.clear()

    def gone(self, key: int) -> None:
        """A sequence ended; its last token may still be in a `step` to come."""
        self._gone.append(key)

    def started(self, times: Times, prompt_tokens: int) -> None:
        """A job got its first token of this attempt."""
        if times.resumes or times.first_token is None:
            return
        self._prompt_tokens += prompt_tokens
        self._latency["time_to_first_token"].add(times.queued_s + times.first_token - times.popped)

    def ended(self, times: Times, reason: str, prompt_tokens: int, generated: int, at: float) -> None:
        """A job ended for this reason. Stages that it never reached do not count."""
        self._finished[reason] += 1
        latency = self._latency
        latency["e2e_request_latency"].add(times.queued_s + at - times.popped)
        self._prompt.add(prompt_tokens)
        self._generated.add(generated)
        if times.scheduled is None:
            return
        latency["request_queue_time"].add(times.queued_s + times.scheduled - times.popped)
        if times.first_token is None or times.last_token is None:
            return
        latency["request_prefill_time"].add(times.first_token - times.scheduled)
        latency["request_inference_time"].add(times.last_token - times.scheduled)
        decode = times.last_token - times.first_token
        latency["request_decode_time"].add(decode)
        if generated > 1:
            latency["request_time_per_output_token"].add(decode / (generated - 1))

    @property
    def _totals(self) -> tuple[int, int]:
        return self._prompt_tokens, self._generation_tokens

    def report(self, at: float, **more: int) -> dict[str, dict[str, object]]:
        """As JSON: `latency`, histograms in seconds; `requests`, counts, histograms of tokens, and `more`;
        `rates`, a second."""
        prompt_rate, generation_rate = self._rate.a_second(self._totals, at)
        return {
            "rates": {
                "prompt_tokens_per_s": round(prompt_rate, 2),
                "generation_tokens_per_s": round(generation_rate, 2),
            },
            "latency": {name: histogram.as_dict() for name, histogram in self._latency.items()},
            "requests": {
                "finished": dict(self._finished),
                "prompt_tokens": self._prompt_tokens,
                "generation_tokens": self._generation_tokens,
                "request_prompt_tokens": self._prompt.as_dict(),
                "request_generation_tokens": self._generated.as_dict(),
                "iteration_tokens": self._step.as_dict(),
                **more,
            },
        }
