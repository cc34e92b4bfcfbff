"""Webhooks that are owed: entered by the script that ends a job, delivered from here, at least once."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Literal, cast

import redis

from wicore.config import QueueSettings, WebhookSettings
from wicore.queue.connection import unavailable_on_failure
from wicore.queue.producer import JobRecord, record_of
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts
from wicore.webhooks.message import delivery_id, payload, signed_headers, wait_s
from wicore.webhooks.post import Answer, PostError, post

log = logging.getLogger(__name__)

_CLAIM_MS = 60_000
"""An attempt whose process died is repeated after this long; well over what a POST may take."""
_GRACE_MS = 2_000
"""How long the message that came with the entry has to be taken before the sweep sends another."""
_GONE = 410


@dataclass(frozen=True, slots=True)
class _Outcome:
    kind: Literal["delivered", "failed", "retry"]
    reason: str = ""
    wait_s: float = 0.0


class Outbox:
    """Thread-safe; any number of processes may deliver from it. Every method raises Unavailable."""

    def __init__(
        self,
        client: redis.Redis,
        prefix: str = "wicore",
        queue: QueueSettings | None = None,
        settings: WebhookSettings | None = None,
    ) -> None:
        self._client = client
        self._keys = Keys(prefix)
        self._settings = settings or WebhookSettings()
        self._scripts = Scripts(client, self._keys, queue or QueueSettings())

    def deliver(self, job_id: str) -> float | None:
        """Try to deliver the job's webhook, if it is due; seconds to the next attempt, if there is one."""
        with unavailable_on_failure(self._client):
            claimed = self._scripts.call("webhook", job_id, _CLAIM_MS)
        if claimed is None:
            return None
        attempt, *flat = claimed
        record = record_of(job_id, dict(zip(flat[::2], flat[1::2], strict=True)))
        outcome = self._attempt(record, attempt)
        with unavailable_on_failure(self._client):
            status = self._scripts.call(
                "webhook_end", job_id, attempt, outcome.kind, outcome.reason, round(outcome.wait_s * 1000)
            )
        if status != b"delivered":
            log.warning("webhook of job %s, attempt %d: %s", job_id, attempt, outcome.reason)
        return outcome.wait_s if status == b"pending" else None

    def overdue(self, limit: int) -> list[str]:
        """Jobs whose webhook should have been tried by now, the longest due first."""
        with unavailable_on_failure(self._client):
            seconds, micros = self._client.time()
            until = seconds * 1000 + micros // 1000 - _GRACE_MS
            found = self._client.zrange(self._keys.webhooks, "-inf", until, byscore=True, offset=0, num=limit)
        return [job_id.decode() for job_id in cast("list[bytes]", found)]

    def _attempt(self, record: JobRecord, attempt: int) -> _Outcome:
        settings = self._settings
        if settings.secret is None:
            return _Outcome("failed", "webhooks.secret is not set")
        if attempt > settings.max_attempts:  # the last one's process died
            return _Outcome("failed", f"{settings.max_attempts} attempts without a known answer")
        assert record.webhook_url is not None
        body = payload(record)
        headers = signed_headers(settings.secret, delivery_id(record.id), int(time.time()), body)
        try:
            answer = post(record.webhook_url, headers, body, allow_private=settings.allow_private)
        except PostError as err:
            answer, reason, final = Answer(0, None), str(err), err.final
        else:
            reason, final = f"answered {answer.status}", answer.status == _GONE
        if 200 <= answer.status < 300:
            return _Outcome("delivered")
        if final or attempt == settings.max_attempts:
            return _Outcome("failed", f"{reason}, in attempt {attempt}")
        return _Outcome("retry", reason, max(wait_s(attempt, settings), answer.retry_after_s or 0.0))
