"""`wicore bench engine`, the measurements in which an engine is compared with a server's figures.

    ready        from nothing to an engine that can step
    stream       one sequence's output tokens a second after its first
    first token  of one prompt, the cache empty
    throughput   so many sequences submitted at once: output tokens over the whole run, prompts included

Prompts are random tokens. Each line has the share of what the device could do at best: of a decode step by
its bandwidth (or its products, if they take longer), of a prompt by its products, of a run by both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from wicore.bench.driver import Driver, Times
from wicore.bench.hardware import describe
from wicore.bench.peers import Line, PeerResults, Unit
from wicore.bench.work import Work
from wicore.engine.base import Engine
from wicore.request import SamplingParams
from wicore.scheduler import Limits


@dataclass(frozen=True)
class Sizes:
    """What is measured, in tokens."""

    stream_prompt: int = 1024
    prompts: Sequence[int] = (1024, 8192)
    """For the first token."""
    streams: Sequence[int] = (16, 64)
    """Batches of the throughput runs."""
    prompt: int = 512
    """Of each sequence of those."""
    output: int = 256
    """Of each sequence, where more than the first token is wanted."""


class Serving:
    """The measurements of one engine. Each may be asked for on its own."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        work: Work,
        model: str,
        samplings: Mapping[str, SamplingParams],
        *,
        sizes: Sizes,
        rounds: int,
        peer: PeerResults | None = None,
    ) -> None:
        self._engine, self._limits, self.work, self._model = engine, limits, work, model
        self._samplings, self._sizes, self._rounds, self._peer = samplings, sizes, rounds, peer

    def ready(self, seconds: float) -> Line:
        """`seconds` is what it took."""
        return {
            "measurement": "ready",
            "seconds": round(seconds, 2),
            **self._beside("ready", 0, 0, 0, seconds, "s"),
            **self.common(),
        }

    def stream(self) -> Iterator[Line]:
        prompt, output = self._sizes.stream_prompt, self._sizes.output
        least = self.work.decode_s(1, prompt + output / 2)
        for sampling, params in self._samplings.items():

            def seconds(times: Times) -> float:
                return (times.total_s - times.first_token_s) / (output - 1)

            step, _ = self._median(1, prompt, output, params, seconds)
            yield {
                **_head("stream", 1, prompt, output, sampling),
                "tokens_s": round(1 / step, 2),
                "ms_a_step": round(step * 1e3, 3),
                "share_of_bandwidth": _share(least, step),
                **self._beside("stream", 1, prompt, output, 1 / step, "tokens/s"),
                **self.common(),
            }

    def first_token(self) -> Iterator[Line]:
        for prompt in self._sizes.prompts:
            for sampling, params in self._samplings.items():
                first, _ = self._median(1, prompt, 1, params, lambda times: times.first_token_s)
                yield {
                    **_head("first token", 1, prompt, 1, sampling),
                    "ms": round(first * 1e3, 2),
                    "tokens_s": round(prompt / first, 1),
                    "share_of_compute": _share(self.work.prefill_s(prompt), first),
                    **self._beside("first token", 1, prompt, 1, first * 1e3, "ms"),
                    **self.common(),
                }

    def throughput(self) -> Iterator[Line]:
        prompt, output = self._sizes.prompt, self._sizes.output
        for batch in self._sizes.streams:
            least = self.work.run_s(batch, prompt, output)
            for sampling, params in self._samplings.items():
                total, times = self._median(batch, prompt, output, params, lambda times: times.total_s)
                rate = batch * output / total
                yield {
                    **_head("throughput", batch, prompt, output, sampling),
                    "tokens_s": round(rate, 1),
                    "seconds": round(total, 3),
                    "first_token_s": round(times.first_token_s, 3),
                    "steps": len(times.steps),
                    "preemptions": times.preemptions,
                    "share_of_bound": _share(least, total),
                    **self._beside("throughput", batch, prompt, output, rate, "tokens/s"),
                    **self.common(),
                }

    def common(self) -> Line:
        """What every line tells of model, engine and machine."""
        info = self._engine.info
        return {
            "model": self._model,
            "engine": info.name,
            "device": info.device,
            "dtype": info.weights,
            "kv": info.layout.dtype,
            **describe(),
        }

    def _median(
        self,
        batch: int,
        prompt: int,
        output: int,
        params: SamplingParams,
        seconds: Callable[[Times], float],
    ) -> tuple[float, Times]:
        """The median of the rounds, and the last of them; one before them, cut short, does not count."""
        self._run(batch, prompt, min(output, 4), params)
        rounds = [self._run(batch, prompt, output, params) for _ in range(self._rounds)]
        return statistics.median(map(seconds, rounds)), rounds[-1]

    def _run(self, batch: int, prompt: int, output: int, params: SamplingParams) -> Times:
        driver = Driver(self._engine, self._limits)
        for key in range(batch):
            driver.add(key, prompt, output, params)
        return driver.run()

    def _beside(
        self, measurement: str, batch: int, prompt: int, output: int, value: float, unit: Unit
    ) -> Line:
        if self._peer is None:
            return {}
        return self._peer.beside(measurement, batch, prompt, output, value, unit)


def _head(measurement: str, batch: int, prompt: int, output: int, sampling: str) -> Line:
    return {
        "measurement": measurement,
        "batch": batch,
        "prompt": prompt,
        "output": output,
        "sampling": sampling,
    }


def _share(least: float | None, seconds: float) -> float | None:
    return None if least is None else round(least / seconds, 3)
