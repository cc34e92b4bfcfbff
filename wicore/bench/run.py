"""One run of `wicore bench engine`: the engine, and the measurements that are wanted of it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from wicore.bench.engine import WARM, Ours, measure
from wicore.bench.hardware import measure_bounds, measure_ceiling
from wicore.bench.peers import Line, read_peer
from wicore.bench.serving import Serving, Sizes
from wicore.bench.work import Work
from wicore.config import Settings, load_settings
from wicore.engine.base import Engine
from wicore.errors import ConfigError
from wicore.gemma3.config import Gemma3Config, published
from wicore.model import Model, load_model
from wicore.request import SamplingParams
from wicore.scheduler import Limits

GREEDY = SamplingParams(temperature=0.0)


class EngineRun:
    """Builds the engine at its start, and closes it at the end of the `with` block."""

    def __init__(
        self,
        config: Sequence[str],
        *,
        kind: str,
        wanted: Collection[str],
        random: str | None = None,
        peer: str | None = None,
        peer_results: Path | None = None,
        batches: Sequence[int] = (1, 8, 16),
        context: int | None = None,
        prompts: Sequence[int] = (),
        streams: Sequence[int] = (16, 64),
        output: int = 256,
        restored: int = 32_000,
        folder: Path | None = None,
        sampling: Literal["greedy", "warm", "both"] = "both",
        steps: int = 32,
        rounds: int | None = None,
        profile: bool = False,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """The arguments are the command's options. Raises what building the engine raises, and ConfigError
        for a peer's results that do not fit."""
        self._wanted, self._peer, self._profile, self._progress = wanted, peer, profile, progress
        self._batches, self._context, self._prompts = batches, context, prompts
        self._restored, self._folder, self._steps, self._rounds = restored, folder, steps, rounds
        self._sizes = Sizes(
            stream_prompt=context or 1024,
            prompts=prompts or (1024, 8192),
            streams=streams,
            output=output,
        )
        self._samplings = {
            name: params
            for name, params in (("greedy", GREEDY), ("warm", WARM))
            if sampling in (name, "both")
        }
        self._settings = self._sized(load_settings(config or None, overrides={"engine.kind": kind}))
        self._model: Model | None = None
        started = time.perf_counter()
        self._engine = self._build(random)
        self._ready_s = time.perf_counter() - started
        try:
            self._name, self._config = self._identify(random)
            device = self._engine.info.device
            self._results = read_peer(peer_results, device=device, model=self._name) if peer_results else None
            self._threads = self._settings.engine.threads or os.cpu_count() or 1
        except BaseException:
            self._engine.close()
            raise

    def __enter__(self) -> EngineRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close()

    def lines(self) -> Iterator[Line]:
        """The measurements, one after the other."""
        if {"decode", "prefill"} & set(self._wanted):
            yield from self._beside_llama()
        if not self._profile and not set(self._wanted) - {"decode", "prefill"}:
            return
        self._progress("measuring what the device can do at best")
        bounds = measure_bounds(self._engine, self._threads)
        yield {"measurement": "bounds", "bytes_s": bounds.bytes_s, "flop_s": bounds.flop_s}
        serving = Serving(
            self._engine,
            self._limits(),
            Work(self._config, self._engine.info, bounds),
            self._name,
            self._samplings,
            sizes=self._sizes,
            rounds=self._rounds or 3,
            peer=self._results,
        )
        if "ready" in self._wanted:
            yield serving.ready(self._ready_s)
        for name, lines in (
            ("stream", serving.stream),
            ("first-token", serving.first_token),
            ("throughput", serving.throughput),
        ):
            if name in self._wanted:
                self._progress(f"measuring {name}")
                yield from lines()
        if self._profile:
            yield from self._profiles(serving)
        if "restore" in self._wanted:
            yield from self._restore(serving)

    def _profiles(self, serving: Serving) -> Iterator[Line]:
        from wicore.bench.profile import profile_decode, profile_prompt, table

        bounds, limits = serving.work.bounds, self._limits()
        batches = self._batches if "decode" in self._wanted else (1, *self._sizes.streams)
        for batch in batches:
            yield self._shown(
                profile_decode(self._engine, limits, batch, self._sizes.stream_prompt, bounds), table
            )
        for prompt in self._sizes.prompts:
            yield self._shown(profile_prompt(self._engine, limits, prompt, bounds), table)

    def _shown(self, line: Line, table: Callable[[Line], str]) -> Line:
        self._progress(table(line) + "\n")
        return line

    def _restore(self, serving: Serving) -> Iterator[Line]:
        from wicore.bench.restore import measure_restore

        self._progress("measuring restore")
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            for line in measure_restore(
                self._engine, self._settings, self._restored, Path(folder), self._rounds or 3
            ):
                yield line | serving.common()

    def _beside_llama(self) -> Iterator[Line]:
        from wicore.bench.peer_llama import LlamaCpp
        from wicore.gemma3.checkpoint import models_folder

        context, prompts = self._context or 128, self._prompts or (512,)
        ceiling = measure_ceiling(self._threads)
        other = None
        if self._peer and self._model is not None:
            longest = max(context + self._steps + 8, *prompts)
            models_folder().mkdir(parents=True, exist_ok=True)
            checkpoint = self._model.checkpoint
            other = LlamaCpp(checkpoint, models_folder(), self._threads, max(self._batches), longest)
        yield {
            "measurement": "ceiling",
            "read_gb_s": round(ceiling.read_gb_s, 1),
            "int8_gflop_s": round(ceiling.int8_gflop_s),
        }
        for line in measure(
            Ours(self._engine, self._settings.scheduler.max_batch, self._settings.scheduler.token_budget),
            other,
            self._config,
            self._engine.info.layout,
            ceiling,
            batches=self._batches if "decode" in self._wanted else (),
            context=context,
            prompts=prompts if "prefill" in self._wanted else (),
            steps=self._steps,
            rounds=self._rounds or 5,
        ):
            yield {"model": self._name, **line}

    def _limits(self) -> Limits:
        return Limits(self._settings.scheduler.max_batch, self._settings.scheduler.token_budget)

    def _sized(self, settings: Settings) -> Settings:
        """Room for all that is to be measured: slots, tokens a step, and, unless a card says how many there
        are or a setting does, positions of KV."""
        sizes, wanted = self._sizes, self._wanted
        batches, lengths, positions = {1}, {0}, {0}
        if "decode" in wanted:
            batches |= set(self._batches)
            positions.add(max(self._batches) * ((self._context or 128) + self._steps + 64))
        if "prefill" in wanted:
            lengths |= set(self._prompts or (512,))
        if "stream" in wanted or self._profile:
            positions.add(sizes.stream_prompt + sizes.output)
        if "first-token" in wanted or self._profile:
            lengths |= set(sizes.prompts)
        if "throughput" in wanted or self._profile:
            batches |= set(sizes.streams)
            prompt = max(sizes.prompt, sizes.stream_prompt) if self._profile else sizes.prompt
            positions.add(max(sizes.streams) * (prompt + sizes.output))
        if "restore" in wanted:
            positions.add(self._restored + 512)
        scheduler = settings.scheduler.model_copy(
            update={
                "max_batch": max(batches),
                "token_budget": max(settings.scheduler.token_budget, max(batches) + 16, *lengths),
            }
        )
        update: dict[str, object] = {"scheduler": scheduler}
        if settings.engine.kind != "tensorrt" and settings.hmt.device_tokens is None:
            block = settings.hmt.block_tokens
            room = max(16_384, *positions, *lengths) + block * max(batches)
            update["hmt"] = settings.hmt.model_copy(update={"device_tokens": room})
        return settings.model_copy(update=update)

    def _build(self, random: str | None) -> Engine:
        if random is not None:
            # Imported here: only this engine needs a GPU's packages.
            from wicore.engine.tensorrt.build import create_random_engine

            if published(random) is None:
                raise ConfigError(f"--random: {random} is no published model; gemma-3-27b is one")
            return create_random_engine(random, self._settings)
        from wicore.engine.factory import create_engine

        self._model = load_model(self._settings)
        return create_engine(self._settings, self._model)

    def _identify(self, random: str | None) -> tuple[str, Gemma3Config]:
        if self._model is not None:
            return self._model.name, self._model.checkpoint.config
        config = published(random or "")
        assert config is not None
        assert random is not None
        return random, config
