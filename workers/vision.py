"""The thread that encodes the images of jobs: neither steps nor the intake of other jobs wait for it."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import ImageRows, VisionEncoder
from wicore.errors import EngineError, InvalidRequest, WicoreError
from wicore.hmt.histogram import Histogram
from wicore.text.template import PromptImage
from wicore.vision.pixels import Picture
from workers.job import Job
from workers.pixels import PixelMaker

log = logging.getLogger("wicore.worker")

ENCODE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
Rows = NDArray[np.float32]


class RowCache:
    """Rows of images by digest; over `limit` bytes the least recently used go. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: OrderedDict[bytes, Rows] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0
        self.hits = 0

    def get(self, digest: bytes) -> Rows | None:
        with self._lock:
            if (rows := self._rows.get(digest)) is not None:
                self._rows.move_to_end(digest)
                self.hits += 1
            return rows

    def put(self, digest: bytes, rows: Rows) -> None:
        with self._lock:
            if digest in self._rows or rows.nbytes > self._limit:
                return
            self._rows[digest] = rows
            self.bytes += rows.nbytes
            while self.bytes > self._limit:
                _, dropped = self._rows.popitem(last=False)
                self.bytes -= dropped.nbytes


@dataclass(slots=True)
class _Task:
    """A job whose images are being encoded."""

    job: Job
    rows: dict[bytes, Rows] = field(default_factory=dict)
    """By digest, of those that are."""

    @property
    def images(self) -> Sequence[PromptImage]:
        return self.job.generation.prompt.images

    def next(self, after: bytes | None = None) -> PromptImage | None:
        """The next image to be encoded, or the one after that of digest `after`."""
        waiting = (image for image in self.images if image.picture.digest not in self.rows)
        return next((image for image in waiting if image.picture.digest != after), None)

    def all_rows(self) -> list[ImageRows]:
        return [ImageRows(image.start, self.rows[image.picture.digest]) for image in self.images]


class Vision:
    """Encodes image by image, the next one of the most urgent job that has any, and keeps the rows."""

    def __init__(
        self,
        encoder: VisionEncoder,
        side: int,
        cache_bytes: int,
        *,
        wanted: Callable[[Job], bool],
        seen: Callable[[Job, Sequence[ImageRows]], None],
        refused: Callable[[Job, WicoreError], None],
        failed: Callable[[EngineError], None],
    ) -> None:
        """`side` in pixels, of the square that the encoder takes. The rest is called in this thread: whether
        a job is to go on; it has all its rows; an image of it is none; the encoder's device failed."""
        self._encoder, self._pixels = encoder, PixelMaker(side)
        self._wanted, self._seen, self._refused, self._failed = wanted, seen, refused, failed
        self._cache = RowCache(cache_bytes)
        self._waiting: queue.PriorityQueue[tuple[int, int, _Task | None]] = queue.PriorityQueue()
        self._number = itertools.count()
        self._started: float | None = None
        self._seconds = Histogram(ENCODE_S)
        # A daemon: an encoder that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="vision", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the image under way, whatever waits. For any thread; idempotent."""
        self._waiting.put((-1, 0, None))

    def close(self, timeout: float) -> bool:
        """Wait for the end after `stop`, then release the encoder; False: it is still busy, and was not."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._encoder.close()
        return True

    def look(self, job: Job) -> list[ImageRows] | None:
        """The rows of a job's images, if all are kept; else None, and `seen` or `refused` follows.

        For any thread; waits for nothing.
        """
        task = _Task(job)
        kept = [(image.picture.digest, self._cache.get(image.picture.digest)) for image in task.images]
        task.rows.update((digest, rows) for digest, rows in kept if rows is not None)
        if task.next() is None:
            return task.all_rows()
        self._put(task)
        return None

    def lasts_s(self) -> float:
        """How long the image under way has taken; 0 between images. For any thread."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def report(self) -> dict[str, object]:
        """For the heartbeat: images encoded, with their seconds; those that were kept. For any thread."""
        return {
            "encode_seconds": self._seconds.as_dict(),
            "cache_hits": self._cache.hits,
            "cache_bytes": self._cache.bytes,
        }

    def _put(self, task: _Task) -> None:
        self._waiting.put((int(task.job.delivery.level), next(self._number), task))

    def _run(self) -> None:
        while (task := self._waiting.get()[2]) is not None:
            if not self._wanted(task.job):
                continue
            try:
                self._advance(task)
            except EngineError as err:
                self._failed(err)
            except WicoreError as err:
                self._refused(task.job, err)
            except Exception:
                log.exception("job %s: an image could not be encoded", task.job.delivery.job_id)
                self._refused(task.job, WicoreError("Internal error: an image could not be encoded"))
        self._pixels.close()

    def _advance(self, task: _Task) -> None:
        """Encode the next image; then it is the turn of the most urgent job again."""
        if (image := task.next()) is not None:
            task.rows[image.picture.digest] = self._rows(task, image)
        if task.next() is not None:
            self._put(task)
            return
        self._seen(task.job, task.all_rows())

    def _rows(self, task: _Task, image: PromptImage) -> Rows:
        """Raises InvalidRequest, naming the field, for what cannot be decoded."""
        digest = image.picture.digest
        if (kept := self._cache.get(digest)) is not None:
            return kept
        self._started = started = time.monotonic()
        try:
            pixels = self._pixels.take(image.picture)
            self._pixels.expect(self._following(task, image))
            rows = self._encoder.encode(pixels)
        except InvalidRequest as err:
            raise InvalidRequest(f"{image.field}: {err.message}", param=image.field) from None
        finally:
            self._started = None
        self._seconds.add(time.monotonic() - started)
        self._cache.put(digest, rows)
        return rows

    def _following(self, task: _Task, image: PromptImage) -> Picture | None:
        """The picture that will probably be encoded after this one; None: nothing waits."""
        following = task.next(image.picture.digest)
        if following is None:
            with self._waiting.mutex:
                head = self._waiting.queue[0][2] if self._waiting.queue else None
            following = head.next(image.picture.digest) if head is not None else None
        return following.picture if following is not None else None
