"""From a delivery to a job for the engine thread: done on the intake thread, so that no step waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from redis import Redis

from wicore.admission import admit, text_alone
from wicore.config import Settings
from wicore.generation import Generation
from wicore.grammar import grammar_of
from wicore.grammar.compiler import Compiler
from wicore.hmt import CacheManager
from wicore.model import Model
from wicore.queue.consumer import Delivery
from wicore.request import JobBody
from wicore.sampling import Constraint
from wicore.stream.relay import read_log
from wicore.telemetry.serving import Times
from wicore.text.prompt import Prompt
from workers.job import Job


class Preparation:
    """Checks, tokenises and numbers jobs, compiles their grammars, and reads what earlier attempts wrote."""

    def __init__(
        self,
        settings: Settings,
        model: Model,
        vocab_size: int,
        cache: CacheManager,
        redis: Redis,
        *,
        sees: bool,
    ) -> None:
        """`vocab_size` is the engine's: how many logits a row has. `sees`: images can be encoded."""
        self._sees = sees
        self._settings, self._model, self._cache, self._redis = settings, model, cache, redis
        self._grammars = Compiler(model.tokenizer, vocab_size)
        self._next_key = 0

    def job(self, delivery: Delivery, times: Times) -> Job:
        """Raises the error that the job is to fail with, or Unavailable."""
        body = delivery.body
        prompt = admit(body, self._model, self._settings)
        if prompt.images and not self._sees:
            raise text_alone(f"{prompt.images[0].field.removesuffix('.image_url.url')}.type")
        events = (
            read_log(self._redis, delivery.job_id, prefix=self._settings.redis.prefix) if delivery.seq else []
        )
        generation = Generation(
            delivery.job_id,
            body,
            prompt,
            self._model.tokenizer,
            priority=delivery.level,
            attempt=delivery.attempt,
            log=events,
            constrain=self._constrain(body, prompt),
        )
        deadline = None
        if delivery.deadline_ms is not None:
            deadline = time.monotonic() + (delivery.deadline_ms - delivery.popped_ms) / 1000
        requests = [
            (index, replace(request, chain=self._cache.chain([*request.prompt, *request.generated])))
            for index, request in generation.requests(self._next_key)
        ]
        self._next_key += body.sequences
        return Job(delivery, generation, requests, deadline, times)

    def _constrain(self, body: JobBody, prompt: Prompt) -> Callable[[], Constraint] | None:
        """Makes what each output of the job is held to; compiles now."""
        if (grammar := grammar_of(body)) is None:
            return None
        return partial(self._grammars.constraint, grammar, prompt.stop_ids)
