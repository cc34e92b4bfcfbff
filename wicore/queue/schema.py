"""Every Redis key: its name, type, writer and lifetime. No other module spells one.

With prefix `wicore` ({q} is a level's list, {id} a job, {tag} a delivery tag):

    key                           type    what                                                 lives
    {q}: wicore, wicore\\x06\\x163,  list    ready messages of levels 0, 3, 6, 9;                 until popped
      ...6, ...9                          LPUSH in (submit, any client), RPOP out (pop)
    wicore:unacked                hash    {tag} -> `[q, owner:attempt, id]\\n` + raw message     the lease
    wicore:leases                 zset    {tag} by expiry, ms of Redis TIME                    the lease
    wicore:deliveries             hash    {tag} -> attempts                                    until the end
    wicore:suspect                list    raw messages whose worker died (reap; pop)           until popped
    wicore:dead                   list    JSON {reason, at_ms, message}, newest first          last 10,000
    wicore:job:{id}               hash    the record, fields below                             retention
    wicore:log:{id}               stream  events: entry id `0-seq`, field `event`              retention
    wicore:cancel:{id}            string  someone wants the job off (cancel)                   1 h, or the end
    wicore:idem:{sha256}          string  an idempotency key: `body digest, id`                24 h
    wicore:jobs                   zset    all ids by `created_ms`: the listing                 retention
    wicore:jobs:{status}          zset    ids by `created_ms`: the listing by status           retention
    wicore:finished               zset    ids by `finished_ms`: whom the sweep forgets,        retention
                                          and the rate at which jobs end
    wicore:deadlines              zset    waiting ids by `deadline_ms`: whom the sweep ends    while waiting
    wicore:tombstones             hash    {q} -> messages in it whose job has ended            until popped
    wicore:workers                hash    worker -> heartbeat JSON (registry.py)               see there
    wicore:bucket:{key}           hash    token bucket (the API)                               see there
    celery-task-meta-{id}         string  the result in Celery's JSON                          retention

Written by the scripts in lua/, whose heads say which, unless said otherwise here. "Retention": until
`retention_s` after the job's end.

Channels: `wicore:events:{id}` (each event, as in the log), `wicore:control` (JSON {type: cancel, job}),
`celery-task-meta-{id}` (as the string).

Fields of a record: `status`; `level` (0, 3, 6, 9); `tag`; `at` (the list its message waits in; absent
while leased and after the end, save for a tombstone); `fence` (`owner:attempt`, only while leased);
`worker`; `attempts`; `seq` (last in the log); `created_ms`, `deadline_ms`, `started_ms`, `first_token_ms`,
`finished_ms`; `kind`, `model`, `metadata`, `prompt_tokens`, `position`; `cancel` (wished); `finish_reason`,
`usage`, `result`, `error` (JSON); `finished_by` (fence of who ended it).

Invariants, between any two commands:
    open jobs (status queued or running) = jobs waiting in a list (`at`) + jobs leased (`fence`);
    a tag is in `unacked` exactly when it is in `leases`;
    a job has one terminal event, and it is the last entry of its log.
A record never goes before its message: the record of a job that ended while waiting is kept until
the message is popped, so that the message cannot pass for a new job.

One Redis (or one with replicas), version 7 or later, or Valkey. Not Redis Cluster: the scripts touch keys
of many slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from wicore.request import Priority

_SEPARATOR = "\x06\x16"
"""What Kombu puts between a queue's name and its priority; level 0 has neither."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under one prefix (letters, digits, `_.-`, as RedisSettings checks)."""

    prefix: str = "wicore"

    def queue(self, level: Priority) -> str:
        return self.prefix if level == 0 else f"{self.prefix}{_SEPARATOR}{int(level)}"

    def queues(self) -> dict[Priority, str]:
        """Lists by level, the most urgent first."""
        return {level: self.queue(level) for level in sorted(Priority)}

    @property
    def suspect(self) -> str:
        return f"{self.prefix}:suspect"

    @property
    def dead(self) -> str:
        return f"{self.prefix}:dead"

    @property
    def unacked(self) -> str:
        return f"{self.prefix}:unacked"

    @property
    def leases(self) -> str:
        return f"{self.prefix}:leases"

    @property
    def deliveries(self) -> str:
        return f"{self.prefix}:deliveries"

    @property
    def deadlines(self) -> str:
        return f"{self.prefix}:deadlines"

    @property
    def tombstones(self) -> str:
        return f"{self.prefix}:tombstones"

    @property
    def jobs(self) -> str:
        return f"{self.prefix}:jobs"

    def jobs_by_status(self, status: str) -> str:
        return f"{self.prefix}:jobs:{status}"

    @property
    def finished(self) -> str:
        return f"{self.prefix}:finished"

    @property
    def workers(self) -> str:
        return f"{self.prefix}:workers"

    @property
    def control(self) -> str:
        return f"{self.prefix}:control"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}:job:{job_id}"

    def log(self, job_id: str) -> str:
        return f"{self.prefix}:log:{job_id}"

    def events(self, job_id: str) -> str:
        return f"{self.prefix}:events:{job_id}"

    def cancel(self, job_id: str) -> str:
        return f"{self.prefix}:cancel:{job_id}"

    def idempotency(self, digest: str) -> str:
        return f"{self.prefix}:idem:{digest}"

    def bucket(self, key: str) -> str:
        return f"{self.prefix}:bucket:{key}"

    @staticmethod
    def celery_result(job_id: str) -> str:
        return f"celery-task-meta-{job_id}"
