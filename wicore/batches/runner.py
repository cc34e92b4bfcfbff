"""Carries batches out, a portion at a time: checks the file, makes lines jobs, puts their answers out.

All that is known of a batch is in Redis, and every step is safe to repeat: a line's job has an id that
follows from the line, and the script `batch_line` takes each line once and answers it once. So a runner may
be killed at any point, and any number may run; a claim keeps them from doing the same work twice.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, cast

import redis
from redis.client import Pipeline

from wicore.access.rates import Rate, Rates, tokens_taken
from wicore.admission import admit
from wicore.batches.lines import (
    Answer,
    Checker,
    LineJob,
    Why,
    answered,
    called_off,
    job_of,
    parse_line,
    refused,
    split,
)
from wicore.batches.record import Batch, job_id
from wicore.batches.store import Batches
from wicore.config import Settings
from wicore.errors import QueueFull, RateLimited, Unavailable, UnknownFile, WicoreError
from wicore.files import Files
from wicore.model import Model
from wicore.queue.connection import unavailable_on_failure
from wicore.queue.producer import Producer, record_of
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts

log = logging.getLogger(__name__)

IN_FLIGHT = 512
"""Lines of a batch that are jobs at once: enough for any worker, few enough to leave room on the level."""
PORTION = 64
"""Lines that are looked at before another batch has its turn."""
_CLAIM_S = 5
"""How long a batch waits for the next runner when one was killed; a portion takes less."""
_LOOK_S = 5.0


class Runner:
    """One thread's; `advance` raises Unavailable when Redis is away."""

    def __init__(self, client: redis.Redis, settings: Settings, model: Callable[[], Model]) -> None:
        """`model` describes the served model when it is first needed; it may raise CheckpointError."""
        prefix = settings.redis.prefix
        self._client = client
        self._settings = settings
        self._model = model
        self._keys = Keys(prefix)
        self._scripts = Scripts(client, self._keys, settings.queue)
        self._producer = Producer(client, prefix, settings.queue)
        self._files = Files(client, prefix)
        self.batches = Batches(client, self._files, prefix)
        self._look_at: dict[tuple[str, str], float] = {}
        self._rest_until: dict[str, float] = {}

    def advance(self, batch_id: str) -> bool:
        """Do a portion of what there is to do for an open batch; whether more can be done at once."""
        claim, token = self._keys.batch_part(batch_id, "claim"), uuid.uuid4().hex
        with unavailable_on_failure(self._client):
            if not self._client.set(claim, token, nx=True, ex=_CLAIM_S):
                return False
            try:
                return self._advance(self.batches.get(batch_id))
            finally:
                if self._client.get(claim) == token.encode():
                    self._client.delete(claim)

    def _advance(self, batch: Batch) -> bool:
        if batch.status == "validating":
            self._validate(batch)
            return True
        if batch.status == "finalizing":
            self.batches.finish(batch.id)
            self._look_at = {known: at for known, at in self._look_at.items() if known[0] != batch.id}
            return True
        collected = self._collect(batch)
        if batch.status == "cancelling":
            moved = self._skip(batch, "batch_cancelled")
        elif self._files.now_ms() >= batch.deadline_ms:
            moved = self._skip(batch, "batch_expired")
        else:
            moved = self._submit(batch)
        self._look_after(batch)
        if self._is_answered(batch):
            self.batches.move(batch.id, "finalizing", ("in_progress", "cancelling"))
            return True
        return bool(collected or moved)

    # --- the file -------------------------------------------------------------------------------

    def _validate(self, batch: Batch) -> None:
        checker = Checker(batch.endpoint, self._settings.api.max_body_bytes)
        draft = self._keys.batch_draft(batch.id, uuid.uuid4().hex)
        total = 0
        try:
            for portion in self._checked(batch, checker):
                total += self._push(draft, portion)
                self._client.expire(self._keys.batch_part(batch.id, "claim"), _CLAIM_S)
        except UnknownFile as err:
            checker.errors = [_file_error(err)]
        if checker.errors:
            self._client.delete(draft)
            self.batches.fail(batch.id, checker.errors)
            return

        def take_over(pipe: Pipeline, batch: Batch, now_ms: int) -> None:
            part = self._keys.batch_part(batch.id, "lines")
            pipe.hset(self._keys.batch(batch.id), "total", total)
            pipe.rename(draft, part)
            pipe.persist(part)

        if "in_progress" not in self.batches.move(batch.id, "in_progress", ("validating",), take_over).times:
            self._client.delete(draft)  # cancelled meanwhile

    def _checked(self, batch: Batch, checker: Checker) -> Iterator[list[bytes]]:
        """Lines in portions; none any more once a fault was found, but all faults are."""
        pieces = self._files.read(self._files.get(batch.input_file_id))
        portion: list[bytes] = []
        size = 0
        for number, content in split(pieces, self._settings.api.max_body_bytes):
            if checker.check(number, content) and not checker.errors:
                portion.append(content)
                size += len(content)
            if size > 2**20:
                yield portion
                portion, size = [], 0
            if checker.is_full:
                return
        checker.finish()
        if portion:
            yield portion

    def _push(self, key: str, portion: list[bytes]) -> int:
        self._client.rpush(key, *portion)
        self._client.expire(key, 3600)  # should this process die now
        return len(portion)

    # --- lines to jobs --------------------------------------------------------------------------

    def _submit(self, batch: Batch) -> bool:
        """Make lines jobs while there is room for them; whether any was taken."""
        if time.monotonic() < self._rest_until.get(batch.client, 0.0):
            return False
        most = IN_FLIGHT if batch.limits.parallel is None else min(IN_FLIGHT, _half(batch.limits.parallel))
        room = min(PORTION, most - self._client.hlen(self._keys.batch_part(batch.id, "open")))
        taken = False
        for number, content in self._waiting(batch, room):
            try:
                known = self._submit_line(batch, number, content)
            except (QueueFull, RateLimited):
                break
            taken = self._tell(batch, number, known) or taken
            if batch.client in self._rest_until:
                break
        return taken

    def _submit_line(self, batch: Batch, number: int, content: bytes) -> LineJob | Answer:
        """The job that the line is now, or why it is none. Raises QueueFull, RateLimited or Unavailable."""
        line, model = parse_line(content), self._model()
        try:
            job = job_of(batch.endpoint, line, batch.limits, lambda body: admit(body, model, self._settings))
            left_s = max(0.001, (batch.deadline_ms - self._files.now_ms()) / 1000)
            submission = self._producer.submit(
                job.body.model_copy(update={"timeout_s": min(left_s, job.body.timeout_s or left_s)}),
                job.priority,
                job_id=job_id(batch.id, number),
                client=batch.client,
                prompt_tokens=len(job.prompt.token_ids),
                max_tokens=job.prompt.max_tokens,
                limits=batch.limits,
                reserve=tokens_taken(job.body, job.prompt),
                fields={"batch": batch.id, **job.fields()},
            )
        except (QueueFull, RateLimited, Unavailable, redis.RedisError):
            raise
        except WicoreError as err:
            return refused(batch.id, number, line.custom_id, err)
        except Exception:
            log.exception("line %d of %s", number, batch.id)
            return refused(batch.id, number, line.custom_id, WicoreError("Internal error"))
        self._rest(batch.client, submission.rates)
        return job

    def _rest(self, client: str, rates: Rates) -> None:
        """Leave half of what the client's limits hold to its other calls."""
        wait_ms = max((_until_half_ms(rate) for rate in rates), default=0.0)
        self._rest_until.pop(client, None)
        if wait_ms > 0:
            self._rest_until[client] = time.monotonic() + wait_ms / 1000

    def _skip(self, batch: Batch, why: Why) -> bool:
        """Answer lines that will not become jobs any more; whether there were any."""
        taken = False
        for number, content in self._waiting(batch, PORTION):
            answer = called_off(batch.id, number, parse_line(content).custom_id, why)
            taken = self._tell(batch, number, answer) or taken
        return taken

    def _waiting(self, batch: Batch, count: int) -> Iterator[tuple[int, bytes]]:
        """The next lines that are no jobs, with their numbers."""
        if count <= 0:
            return
        with self._client.pipeline(transaction=True) as pipe:
            pipe.hget(self._keys.batch(batch.id), "next")
            pipe.lrange(self._keys.batch_part(batch.id, "lines"), 0, count - 1)
            first, contents = pipe.execute()
        yield from enumerate(contents, int(first))

    # --- jobs to answers ------------------------------------------------------------------------

    def _collect(self, batch: Batch) -> bool:
        """Put out the answers of jobs that have ended; whether there were any."""
        key = self._keys.batch_part(batch.id, "ended")
        ended = [name.decode() for name in cast("list[bytes]", self._client.lrange(key, 0, PORTION - 1))]
        for job in ended:
            fields = cast("dict[bytes, bytes]", self._client.hgetall(self._keys.job(job)))
            number = int(job.rpartition("-")[2])
            if fields:
                self._tell(batch, number, answered(batch, number, record_of(job, fields), _custom_id(fields)))
            else:  # Redis lost it: the search for what is lost answers the line
                self._client.lrem(key, 1, job)
        return bool(ended)

    def _look_after(self, batch: Batch) -> None:
        """Every few seconds: call off the jobs of a cancelled batch, and answer lines whose job is gone."""
        now, known = time.monotonic(), (batch.id, batch.status)
        if now < self._look_at.get(known, 0.0):
            return
        self._look_at[known] = now + _LOOK_S
        lines = self._open(batch)
        with self._client.pipeline(transaction=False) as pipe:
            for number, _ in lines:
                pipe.exists(self._keys.job(job_id(batch.id, number)))
            there = pipe.execute()
        for (number, custom_id), is_there in zip(lines, there, strict=True):
            if not is_there:
                self._tell(batch, number, called_off(batch.id, number, custom_id, "request_lost"))
            elif batch.status == "cancelling":
                self._producer.cancel(job_id(batch.id, number))

    def _open(self, batch: Batch) -> list[tuple[int, str]]:
        """(number, custom_id) of the lines that are jobs."""
        found = cast("dict[bytes, bytes]", self._client.hgetall(self._keys.batch_part(batch.id, "open")))
        return [(int(number), custom_id.decode()) for number, custom_id in found.items()]

    def _is_answered(self, batch: Batch) -> bool:
        with self._client.pipeline(transaction=True) as pipe:
            pipe.llen(self._keys.batch_part(batch.id, "lines"))
            pipe.hlen(self._keys.batch_part(batch.id, "open"))
            return not any(pipe.execute())

    def _tell(self, batch: Batch, number: int, answer: Answer | LineJob) -> bool:
        """Say what has become of a line; False when that was known, or it is not the line's turn."""
        job = job_id(batch.id, number)
        args: list[str | bytes | int] = [batch.id, number, job, answer.custom_id]
        if isinstance(answer, Answer):
            text = answer.text.encode("utf-8", "replace")
            args += [answer.which, text, answer.outcome, answer.input_tokens, answer.output_tokens]
        return bool(self._scripts.call("batch_line", *args))


def _half(limit: int) -> int:
    return max(1, limit // 2)


def _until_half_ms(rate: Rate) -> float:
    """Buckets fill evenly."""
    missing = rate.limit - rate.remaining
    return rate.reset_ms * (1 - rate.limit / 2 / missing) if missing else 0.0


def _custom_id(fields: dict[bytes, bytes]) -> str:
    return fields[b"custom_id"].decode()


def _file_error(err: UnknownFile) -> dict[str, Any]:
    return {"code": "file_not_found", "message": err.message, "line": None, "param": "input_file_id"}
