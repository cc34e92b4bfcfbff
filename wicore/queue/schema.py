"""Every Redis key: its name, type, writer and lifetime. No other module spells one.

With prefix `wicore` ({q} is a level's list, {level} 0, 3, 6 or 9, {id} a job, {tag} a delivery tag):

    key                           type    what                                                 lives
    {q}: wicore, wicore\\x06\\x163,  list    messages that other clients LPUSH, not yet seen       until a pop
      ...6, ...9                          by a pop; `!` while jobs wait on the level
    wicore:queue:{level}:{client} list    waiting ids: LPUSH in, RPOP out                      until popped
    wicore:clients:{level}        zset    clients by turn, in tokens (line.lua)                while they wait
    wicore:turns                  hash    {level} -> the turn reached                          for ever
    wicore:backlog:{level}        hash    {client}:jobs, {client}:tokens that wait             while they wait
    wicore:waiting                hash    {level}:jobs, {level}:tokens that wait               for ever
    wicore:message:{id}           string  the raw message of a waiting job                     until popped
    wicore:suspect                list    waiting ids whose worker died (reap; pop)            until popped
    wicore:unacked                hash    {tag} -> `[its queue, owner:n, id]\\n` + raw message  the lease
    wicore:leases                 zset    {tag} by expiry, ms of Redis TIME                    the lease
    wicore:deliveries             hash    {tag} -> attempts, for every open job                until the end
    wicore:trial:{owner}          string  {tag} of the suspect that a worker runs              the lease
    wicore:dead                   list    JSON {id, at_ms, job, level, client, reason,         last 10,000
                                          message}, newest first: messages given up
    wicore:dead:count             string  how many ever were: numbers the ids                  for ever
    wicore:job:{id}               hash    the record, fields below                             retention
    wicore:log:{id}               stream  events: entry id `0-seq`, field `event`              retention
    wicore:cancel:{id}            string  someone wants the job off (cancel)                   1 h, or the end
    wicore:idem:{sha256}          string  an idempotency key: `body digest, id`                24 h
    wicore:jobs                   zset    all ids by `created_ms`: the listing                 retention
    wicore:jobs:{status}          zset    ids by `created_ms`: the listing by status           retention
    wicore:jobs:all:{client},     zset    the same of one client that has a name; what is      retention
      wicore:jobs:{status}:{client}         queued or running counts against its limit
    wicore:finished               zset    `id` or `id client` by `finished_ms`: for the sweep  retention
    wicore:deadlines              zset    waiting ids by when they expire                      while waiting
    wicore:pace                   hash    decayed sums over ended jobs: jobs, ms, tokens,      for ever
                                          output (line.lua)
    wicore:workers                hash    worker -> heartbeat JSON (registry.py; abandon)      see there
    wicore:capacity               string  slots of all live workers                            1 s
    wicore:counts                 hash    jobs so far: accepted, leased, handed_back,          for ever
                                          redelivered, and {status} they ended with
    wicore:webhooks               zset    ids whose webhook is owed, by when it is due, ms     until it ends
    wicore:steady                 string  since when the tasks' sweep has run without a gap    15 s
    wicore-tasks and its levels   list    Celery messages for workers/tasks.py; LPUSH in       until done
                                          (terminate, any client); taken by stock Kombu,
                                          with its own wicore-tasks:unacked and the like
    wicore:keys                   hash    digest -> API key as JSON (wicore/access/store.py)   for ever
    wicore:bucket:{client}        hash    its rate limits: requests, tokens (limits.lua)       until full
    celery-task-meta-{id}         string  the result in Celery's JSON                          retention
    wicore:file:{file}            hash    a file: client, filename, purpose, bytes, pieces,    its own expiry
                                          created_ms, expires_ms (files.py)
    wicore:file:{file}:{n}        string  its content, in pieces of about 1 MiB                as the file; an
                                                                                               upload's, 1 h
    wicore:files                  zset    files by `created_ms`: the listing                   30 days
    wicore:files:{client}         zset    the same of one client                               30 days
    wicore:batch:{batch}          hash    a batch: status, counts, files (batches/record.py)   30 days from
                                                                                               its end
    wicore:batch:{batch}:lines    list    lines that are no jobs yet, the next one first       until its end
    wicore:batch:{batch}:draft:{} list    the same while its file is checked                   1 h
    wicore:batch:{batch}:open     hash    lines that are jobs, unanswered: number, custom_id   until its end
    wicore:batch:{batch}:ended    list    ids of those whose job has ended (terminate)         until its end
    wicore:batch:{batch}:claim    string  a runner works on it                                 5 s
    wicore:batches                zset    batches by `created_ms`: the listing                 as they
    wicore:batches:of:{client}    zset    the same of one client                               as they
    wicore:batches:open           set     batches that have not ended                          until then

Written by the scripts in lua/, whose heads say which, unless said otherwise here. "Retention": until
`retention_s` after the job's end.

Channels: `wicore:events:{id}` (each event, as in the log), `wicore:control` (JSON {type: cancel, job}),
`celery-task-meta-{id}` (as the string).

Fields of a record: `status`; `level` (0, 3, 6, 9); `client` (who takes turns with whom; '' is one, too);
`tag`; `at` (the queue it waits in; only while waiting); `fence` (`owner:n`, the n-th lease; only while
leased); `leases`; `worker`; `attempts`; `seq` (last in the log); `created_ms`, `deadline_ms`, `start_by_ms`,
`leased_ms`, `started_ms`, `first_token_ms`, `finished_ms`; `unread` (nobody has read the body yet); `kind`,
`model`, `metadata`, `prompt_tokens`, `tokens` (expected in all), `charged` (to its client's turn);
`reserved`, `reserved_rate` (tokens taken from its client's bucket until the end, and the rate then);
`position`, `wait_ms` (told at acceptance); `cancel` (wished); `finish_reason`, `usage`, `result`, `error`
(JSON); `finished_by` (fence of who ended it); `retry_of` (id of the dead letter);
`webhook_url`, `webhook_status` (pending, delivered, failed), `webhook_attempts`, `webhook_error`;
`response` (JSON: what a response repeats and its conversation, which so live as long as the record);
`custom_id` and `batch` (of a line of a batch; `batch` until its answer is put out, and the record with it).

Invariants, between any two commands:
    open jobs (status queued or running) = jobs waiting (`at`) + jobs leased (`fence`);
    a waiting job's message is in message:{id}, a leased one's in `unacked`, an ended one's nowhere;
    a tag is in `unacked` exactly when it is in `leases`;
    `waiting` and `backlog` are the sums over the jobs that wait in queues;
    a job has one terminal event, and it is the last entry of its log;
    a job is in `webhooks` exactly when its `webhook_status` is pending.

One Redis (or one with replicas, behind Sentinel or not), version 7 or later, or Valkey. Not Redis Cluster:
the scripts touch keys of many slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wicore.request import Priority

_SEPARATOR = "\x06\x16"
"""What Kombu puts between a queue's name and its priority; level 0 has neither."""
BELL = b"!"
"""What lies on a level's list while jobs wait on the level: wakes workers, means nothing."""
ALIVE_PERIODS = 3
"""Heartbeats that a worker may miss before it counts as gone."""


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
    def dead_count(self) -> str:
        return f"{self.prefix}:dead:count"

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
    def turns(self) -> str:
        return f"{self.prefix}:turns"

    @property
    def waiting(self) -> str:
        return f"{self.prefix}:waiting"

    @property
    def pace(self) -> str:
        return f"{self.prefix}:pace"

    @property
    def capacity(self) -> str:
        return f"{self.prefix}:capacity"

    @property
    def counts(self) -> str:
        return f"{self.prefix}:counts"

    @property
    def jobs(self) -> str:
        return f"{self.prefix}:jobs"

    def jobs_by_status(self, status: str) -> str:
        return f"{self.prefix}:jobs:{status}"

    def jobs_of(self, client: str, status: str | None = None) -> str:
        return f"{self.prefix}:jobs:{status or 'all'}:{client}"

    @property
    def finished(self) -> str:
        return f"{self.prefix}:finished"

    @property
    def keys(self) -> str:
        return f"{self.prefix}:keys"

    @property
    def workers(self) -> str:
        return f"{self.prefix}:workers"

    @property
    def control(self) -> str:
        return f"{self.prefix}:control"

    def line(self, level_and_client: str) -> str:
        return f"{self.prefix}:queue:{level_and_client}"

    def clients(self, level: str) -> str:
        return f"{self.prefix}:clients:{level}"

    def backlog(self, level: str) -> str:
        return f"{self.prefix}:backlog:{level}"

    def message(self, job_id: str) -> str:
        return f"{self.prefix}:message:{job_id}"

    def trial(self, owner: str) -> str:
        return f"{self.prefix}:trial:{owner}"

    @property
    def webhooks(self) -> str:
        return f"{self.prefix}:webhooks"

    @property
    def steady(self) -> str:
        return f"{self.prefix}:steady"

    @property
    def tasks(self) -> str:
        """The Celery queue of workers/tasks.py, whose messages stock Kombu takes."""
        return f"{self.prefix}-tasks"

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

    def file(self, file_id: str) -> str:
        return f"{self.prefix}:file:{file_id}"

    def file_piece(self, file_id: str, number: int) -> str:
        return f"{self.prefix}:file:{file_id}:{number}"

    @property
    def files(self) -> str:
        return f"{self.prefix}:files"

    def files_of(self, client: str) -> str:
        return f"{self.prefix}:files:{client}"

    def batch(self, batch_id: str) -> str:
        return f"{self.prefix}:batch:{batch_id}"

    def batch_part(self, batch_id: str, part: Literal["lines", "open", "ended", "claim"]) -> str:
        return f"{self.prefix}:batch:{batch_id}:{part}"

    def batch_draft(self, batch_id: str, token: str) -> str:
        return f"{self.prefix}:batch:{batch_id}:draft:{token}"

    @property
    def batches(self) -> str:
        return f"{self.prefix}:batches"

    def batches_of(self, client: str) -> str:
        return f"{self.prefix}:batches:of:{client}"

    @property
    def batches_open(self) -> str:
        return f"{self.prefix}:batches:open"

    def bucket(self, client: str) -> str:
        return f"{self.prefix}:bucket:{client}"

    @staticmethod
    def celery_result(job_id: str) -> str:
        return f"celery-task-meta-{job_id}"
