"""Files in Redis: what is uploaded for a batch, and what a batch puts out.

A file is a hash and pieces of about a mebibyte, so that nobody holds a whole one. It is there from the moment
its hash is written, in one step with the listings and the expiry of its pieces; pieces of an upload that
never got that far expire by themselves.
"""

from __future__ import annotations

import builtins
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import redis
from redis.client import Pipeline

from wicore.errors import InvalidRequest, TooLarge, UnknownFile
from wicore.queue.connection import unavailable_on_failure
from wicore.queue.index import Order, page_from
from wicore.queue.schema import Keys

PIECE_BYTES = 2**20
MAX_LIFETIME_S = 30 * 86_400
"""How long a file is kept if nothing shorter is asked for."""
_UPLOAD_S = 3600
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a file; times are ms of Redis TIME."""

    id: str
    client: str
    """Whose it is. Not shown."""
    filename: str
    purpose: str
    bytes: int
    pieces: int
    created_ms: int
    expires_ms: int

    def public(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_ms // 1000,
            "expires_at": self.expires_ms // 1000,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Files:
    """Thread-safe; holds nothing but the client. Every method raises Unavailable when Redis is away."""

    def __init__(
        self, client: redis.Redis, prefix: str = "wicore", *, max_bytes: int = 2**26, quota: int = 2**29
    ) -> None:
        """`max_bytes` bounds an upload, `quota` all files of the client that uploads."""
        self._client = client
        self._keys = Keys(prefix)
        self._max_bytes = max_bytes
        self._quota = quota

    def upload(
        self, read: Callable[[int], bytes], *, client: str, filename: str, purpose: str, lifetime_s: int
    ) -> FileRecord:
        """Store what `read` gives until it gives nothing.

        Raises TooLarge over either bound, InvalidRequest for an empty file; then nothing is left of it.
        """
        file_id = new_file_id()
        pieces: list[str] = []
        size = 0
        try:
            with unavailable_on_failure(self._client):
                while data := read(PIECE_BYTES):
                    size += len(data)
                    self._check_size(size)
                    pieces.append(self._keys.file_piece(file_id, len(pieces)))
                    self._client.set(pieces[-1], data, ex=_UPLOAD_S)
                if not size:
                    raise InvalidRequest("file: is empty", param="file")
                now_ms = self.now_ms()
                record = FileRecord(
                    *(file_id, client, filename, purpose, size, len(pieces)),
                    *(now_ms, now_ms + lifetime_s * 1000),
                )
                self._commit(record)
        except BaseException:
            self._drop(pieces)
            raise
        return record

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise TooLarge(
                f"file: larger than the {self._max_bytes} bytes that api.max_file_bytes allows", param="file"
            )

    def _commit(self, record: FileRecord) -> None:
        """Make a file visible if its client has room for it, whatever is uploaded beside it."""

        def act(pipe: Pipeline) -> None:
            listed = cast("list[bytes]", pipe.zrange(self._keys.files_of(record.client), 0, -1))
            sizes = [pipe.hget(self._keys.file(name.decode()), "bytes") for name in listed]
            used = sum(int(cast(bytes, size)) for size in sizes if size is not None)
            if used + record.bytes > self._quota:
                raise TooLarge(
                    f"file: with the {used} bytes of your other files it exceeds the {self._quota} that "
                    "api.max_files_bytes allows; delete some",
                    param="file",
                )
            pipe.multi()
            self.publish(pipe, record)

        self._client.transaction(act, self._keys.files_of(record.client))

    def publish(self, pipe: Pipeline, record: FileRecord) -> None:
        """Queue on a transaction what makes a file of pieces that are there."""
        keys, at_s = self._keys, record.expires_ms // 1000
        for number in range(record.pieces):
            pipe.expireat(keys.file_piece(record.id, number), at_s)
        fields = {name: getattr(record, name) for name in FileRecord.__slots__ if name != "id"}
        pipe.hset(keys.file(record.id), mapping=cast("Any", fields))
        pipe.expireat(keys.file(record.id), at_s)
        for index in (keys.files, keys.files_of(record.client)):
            pipe.zadd(index, {record.id: record.created_ms})
            pipe.zremrangebyscore(index, "-inf", record.created_ms - MAX_LIFETIME_S * 1000)

    def get(self, file_id: str) -> FileRecord:
        """Raises UnknownFile."""
        found = self._load([file_id]) if _FILE_ID.fullmatch(file_id) else []
        if not found:
            raise unknown_file(file_id)
        return found[0]

    def list(
        self,
        client: str | None,
        *,
        limit: int,
        after: FileRecord | None = None,
        order: Order = "desc",
        purpose: str | None = None,
    ) -> builtins.list[FileRecord]:
        """Files of a client (None: of all) after one, of a purpose if one is named."""
        index = self._keys.files if client is None else self._keys.files_of(client)

        def load(ids: builtins.list[str]) -> builtins.list[FileRecord]:
            return [record for record in self._load(ids) if purpose in (None, record.purpose)]

        place = None if after is None else (after.created_ms, after.id)
        with unavailable_on_failure(self._client):
            return page_from(self._client, index, place, limit, order, load)

    def read(self, record: FileRecord) -> Iterator[bytes]:
        """The content, piece by piece. Raises UnknownFile when it is deleted meanwhile."""
        for number in range(record.pieces):
            with unavailable_on_failure(self._client):
                piece = self._client.get(self._keys.file_piece(record.id, number))
            if piece is None:
                raise unknown_file(record.id)
            yield cast(bytes, piece)

    def delete(self, record: FileRecord) -> None:
        """Idempotent."""
        keys = self._keys
        with unavailable_on_failure(self._client), self._client.pipeline(transaction=True) as pipe:
            pipe.delete(keys.file(record.id), *(keys.file_piece(record.id, n) for n in range(record.pieces)))
            pipe.zrem(keys.files, record.id)
            pipe.zrem(keys.files_of(record.client), record.id)
            pipe.execute()

    def now_ms(self) -> int:
        """Redis TIME."""
        seconds, micros = self._client.time()
        return seconds * 1000 + micros // 1000

    def _load(self, ids: builtins.list[str]) -> builtins.list[FileRecord]:
        with unavailable_on_failure(self._client), self._client.pipeline(transaction=False) as pipe:
            for file_id in ids:
                pipe.hgetall(self._keys.file(file_id))
            replies = pipe.execute()
        return [_record_of(file_id, fields) for file_id, fields in zip(ids, replies, strict=True) if fields]

    def _drop(self, pieces: builtins.list[str]) -> None:
        """What cannot be removed now expires."""
        try:
            if pieces:
                self._client.delete(*pieces)
        except redis.RedisError:
            pass


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


def unknown_file(file_id: str) -> UnknownFile:
    """The error for a file that is not there, or not to be seen by who asks."""
    return UnknownFile(f"No file {file_id!r:.80}: it never was, was deleted, or has expired.", param="id")


def _record_of(file_id: str, fields: Mapping[bytes, bytes]) -> FileRecord:
    texts = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
    return FileRecord(
        id=file_id,
        client=texts["client"],
        filename=texts["filename"],
        purpose=texts["purpose"],
        bytes=int(texts["bytes"]),
        pieces=int(texts["pieces"]),
        created_ms=int(texts["created_ms"]),
        expires_ms=int(texts["expires_ms"]),
    )
