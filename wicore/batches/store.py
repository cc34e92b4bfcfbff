"""Batches in Redis: made, looked up, listed, called off, and moved from status to status."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import redis
from redis.client import Pipeline

from wicore.access.keys import Limits
from wicore.batches.record import ENDED, WINDOW_S, Batch, Endpoint, Output, Status, batch_of, new_batch_id
from wicore.errors import Conflict, UnknownBatch
from wicore.files import FileRecord, Files, new_file_id
from wicore.queue.connection import unavailable_on_failure
from wicore.queue.index import page_from
from wicore.queue.schema import Keys

KEPT_S = 30 * 86_400
"""How long a batch is known after its end."""
_BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")


class Batches:
    """Thread-safe; holds nothing but the client. Every method raises Unavailable when Redis is away."""

    def __init__(self, client: redis.Redis, files: Files, prefix: str = "wicore") -> None:
        self._client = client
        self._files = files
        self._keys = Keys(prefix)

    def create(
        self,
        *,
        client: str,
        endpoint: Endpoint,
        input_file: FileRecord,
        model: str,
        metadata: Mapping[str, str],
        limits: Limits,
        lifetime_s: int,
    ) -> Batch:
        """Accept a batch of the requests in a file; a runner then looks at them."""
        keys, batch_id = self._keys, new_batch_id()
        with unavailable_on_failure(self._client):
            now_ms = self._files.now_ms()
            fields: dict[str, Any] = {
                "client": client,
                "status": "validating",
                "endpoint": endpoint,
                "input_file_id": input_file.id,
                "model": model,
                "metadata": json.dumps(dict(metadata), ensure_ascii=False),
                "limits": limits.model_dump_json(include=set(Limits.model_fields), exclude_none=True),
                "lifetime_s": lifetime_s,
                "created_ms": now_ms,
                "deadline_ms": now_ms + WINDOW_S * 1000,
                **dict.fromkeys(_COUNTS, 0),
                "output_file": new_file_id(),
                "error_file": new_file_id(),
            }
            with self._client.pipeline(transaction=True) as pipe:
                pipe.hset(keys.batch(batch_id), mapping=cast(Any, fields))
                for index in (keys.batches, keys.batches_of(client)):
                    pipe.zadd(index, {batch_id: now_ms})
                pipe.sadd(keys.batches_open, batch_id)
                pipe.execute()
        return self.get(batch_id)

    def get(self, batch_id: str) -> Batch:
        """Raises UnknownBatch."""
        found = self._load([batch_id]) if _BATCH_ID.fullmatch(batch_id) else []
        if not found:
            raise unknown_batch(batch_id)
        return found[0]

    def list(self, client: str | None, *, limit: int, after: Batch | None = None) -> builtins.list[Batch]:
        """Batches of a client (None: of all), newest first, after one."""
        index = self._keys.batches if client is None else self._keys.batches_of(client)
        place = None if after is None else (after.created_ms, after.id)
        with unavailable_on_failure(self._client):
            return page_from(self._client, index, place, limit, "desc", self._load)

    def open(self) -> builtins.list[str]:
        """Ids of the batches that have not ended."""
        with unavailable_on_failure(self._client):
            found = cast("set[bytes]", self._client.smembers(self._keys.batches_open))
        return sorted(name.decode() for name in found)

    def cancel(self, batch_id: str) -> Batch:
        """Call a batch off; idempotent. Raises UnknownBatch, Conflict when it has ended otherwise."""
        batch = self.move(batch_id, "cancelling", ("validating", "in_progress"))
        if batch.status not in ("cancelling", "cancelled"):
            raise Conflict(f"The batch cannot be cancelled: it is {batch.status}", param="id")
        return batch

    def move(
        self,
        batch_id: str,
        to: Status,
        of: tuple[Status, ...],
        also: Callable[[Pipeline, Batch, int], None] | None = None,
    ) -> Batch:
        """Put a batch that is in one of the statuses `of` into another; the batch as it is then.

        `also` queues on the same transaction what goes with it; it is given the batch as it was and the time,
        ms of Redis. Raises UnknownBatch.
        """
        key = self._keys.batch(batch_id)

        def act(pipe: Pipeline) -> None:
            fields = cast("dict[bytes, bytes]", pipe.hgetall(key))
            if not fields:
                raise unknown_batch(batch_id)
            batch = batch_of(batch_id, fields)
            now_ms = self._files.now_ms()
            pipe.multi()
            if batch.status not in of:
                return
            pipe.hset(key, mapping={"status": to, f"{to}_ms": now_ms})
            if also is not None:
                also(pipe, batch, now_ms)
            if to in ENDED:
                self._close(pipe, batch)

        with unavailable_on_failure(self._client):
            self._client.transaction(act, key)
        return self.get(batch_id)

    def finish(self, batch_id: str) -> Batch:
        """End a batch whose every line has its answer: its files can be seen from now on."""
        batch = self.get(batch_id)
        to: Status = "completed"
        if "cancelling" in batch.times:
            to = "cancelled"
        elif batch.expired:
            to = "expired"
        return self.move(batch_id, to, ("finalizing",), self._publish)

    def fail(self, batch_id: str, errors: builtins.list[dict[str, Any]]) -> Batch:
        """End a batch whose file holds something else than requests."""

        def tell(pipe: Pipeline, batch: Batch, now_ms: int) -> None:
            pipe.hset(self._keys.batch(batch.id), "errors", json.dumps(errors, ensure_ascii=False))

        return self.move(batch_id, "failed", ("validating",), tell)

    def _publish(self, pipe: Pipeline, batch: Batch, now_ms: int) -> None:
        for which, output in (("output", batch.output), ("error", batch.error)):
            if output.bytes:
                self._files.publish(pipe, _file_of(batch, which, output, now_ms))

    def _close(self, pipe: Pipeline, batch: Batch) -> None:
        keys = self._keys
        pipe.srem(keys.batches_open, batch.id)
        pipe.delete(*(keys.batch_part(batch.id, part) for part in ("lines", "open", "ended")))
        pipe.expire(keys.batch(batch.id), KEPT_S)
        for index in (keys.batches, keys.batches_of(batch.client)):
            # Those that are gone by now: a batch ends soon after its window.
            pipe.zremrangebyscore(index, "-inf", batch.created_ms - 2 * KEPT_S * 1000)

    def _load(self, ids: builtins.list[str]) -> builtins.list[Batch]:
        with unavailable_on_failure(self._client), self._client.pipeline(transaction=False) as pipe:
            for batch_id in ids:
                pipe.hgetall(self._keys.batch(batch_id))
            replies = pipe.execute()
        return [batch_of(name, fields) for name, fields in zip(ids, replies, strict=True) if fields]


_COUNTS = (
    *("next", "total", "completed", "failed", "expired", "input_tokens", "output_tokens"),
    *("output_pieces", "output_bytes", "error_pieces", "error_bytes"),
)


def _file_of(batch: Batch, which: str, output: Output, now_ms: int) -> FileRecord:
    return FileRecord(
        id=output.file,
        client=batch.client,
        filename=f"{batch.id}_{which}.jsonl",
        purpose="batch_output",
        bytes=output.bytes,
        pieces=output.pieces,
        created_ms=now_ms,
        expires_ms=now_ms + batch.lifetime_s * 1000,
    )


def unknown_batch(batch_id: str) -> UnknownBatch:
    """The error for a batch that is not there, or not to be seen by who asks."""
    return UnknownBatch(f"No batch {batch_id!r:.80}: it never was, or its record has expired.", param="id")
