"""A queue with workers that a test drives by hand, and the invariants that hold between any two calls."""

from __future__ import annotations

import json
from typing import Any

import redis

from wicore.config import QueueSettings
from wicore.queue.consumer import Delivery, LeaseConsumer
from wicore.queue.producer import Producer, Submission
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts
from wicore.request import (
    STATUS_OF_TERMINAL,
    TERMINAL_TYPES,
    Event,
    Priority,
    parse_job,
    started_event,
    terminal_event,
    token_event,
    usage_of,
)
from wicore.stream.publisher import _calls, _Work
from wicore.stream.relay import read_log

RESULT = {"object": "text_completion", "choices": [{"text": "a"}], "nothing": [], "more": {}}


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.job_id for delivery in deliveries]


class Site:
    def __init__(self, client: redis.Redis, **settings: Any) -> None:
        self.redis = client
        self.settings = QueueSettings(**settings)
        self.keys = Keys()
        self.producer = Producer(client, settings=self.settings)
        self.scripts = Scripts(client, self.keys, self.settings)
        self._consumers: list[LeaseConsumer] = []

    def worker(self, owner: str = "w1") -> LeaseConsumer:
        consumer = LeaseConsumer(self.redis, owner, settings=self.settings)
        self._consumers.append(consumer)
        return consumer

    def submit(self, priority: Priority = Priority.NORMAL, text: str = "Once", **more: Any) -> Submission:
        fields: dict[str, Any] = {"kind": "completion", "prompt": text}
        for name in ("timeout_s", "queue_timeout_s"):
            if name in more:
                fields[name] = more.pop(name)
        return self.producer.submit(parse_job(fields), priority, **more)

    def write(self, delivery: Delivery, *events: Event, result: Any = None) -> list[Any]:
        """What the publisher does with events, and an ending if the last one is terminal; replies."""
        work = _Work(delivery, list(events))
        if events and events[-1]["type"] in TERMINAL_TYPES:
            work.events, work.ending, work.result = work.events[:-1], events[-1], result
        return self.scripts.call_many(_calls(work))

    def start(self, delivery: Delivery) -> list[Any]:
        job, seq = delivery.job_id, delivery.seq + 1
        return self.write(
            delivery,
            started_event(job, seq, delivery.attempt),
            token_event(job, seq + 1, 0, "a", [7]),
        )

    def finish(self, delivery: Delivery, kind: Any = "done", **more: Any) -> int:
        seq = self.last_seq(delivery.job_id) + 1
        event = terminal_event(delivery.job_id, seq, kind, finish_reason="stop", usage=usage_of(1, 1), **more)
        return int(self.write(delivery, event, result=RESULT if kind == "done" else None)[-1])

    def last_seq(self, job_id: str) -> int:
        log = self.log(job_id)
        return log[-1]["seq"] if log else 0

    def expire_leases(self) -> None:
        """As if every worker had been silent for a whole lease."""
        for tag in self.redis.zrange(self.keys.leases, 0, -1):
            self.redis.zadd(self.keys.leases, {tag: 1})

    def lose_workers(self) -> None:
        """All workers die, and the sweep finds it."""
        self.expire_leases()
        self.reap()

    def reap(self) -> list[int]:
        return self.scripts.call("reap")

    def log(self, job_id: str) -> list[Event]:
        return read_log(self.redis, job_id)

    def types(self, job_id: str) -> list[str]:
        return [event["type"] for event in self.log(job_id)]

    def dead(self) -> list[dict[str, Any]]:
        return [json.loads(entry) for entry in self.redis.lrange(self.keys.dead, 0, -1)]

    def jobs(self) -> list[str]:
        return [job.decode() for job in self.redis.zrange(self.keys.jobs, 0, -1)]

    def check(self) -> None:
        """The invariants of schema.py."""
        keys, client = self.keys, self.redis
        assert set(client.hkeys(keys.unacked)) == set(client.zrange(keys.leases, 0, -1))
        waiting = leased = 0
        sums: dict[str, int] = {}
        for job in self.jobs():
            record = {k.decode(): v.decode() for k, v in client.hgetall(keys.job(job)).items()}
            status = record["status"]
            ended = status in STATUS_OF_TERMINAL.values()
            assert client.zscore(keys.jobs_by_status(status), job) == float(record["created_ms"])
            for index in (keys.jobs_of(record["client"], wanted) for wanted in (None, status)):
                listed_at = float(record["created_ms"]) if record["client"] else None
                assert client.zscore(index, job) == listed_at
            owes_webhook = client.zscore(keys.webhooks, job) is not None
            assert owes_webhook == (record.get("webhook_status") == "pending")
            log = self.log(job)
            assert [event["seq"] for event in log] == list(range(1, int(record["seq"]) + 1))
            terminal = [event for event in log if event["type"] in TERMINAL_TYPES]
            assert len(terminal) == ended, (job, record, log)
            if ended:
                assert terminal == log[-1:]
                assert STATUS_OF_TERMINAL[terminal[0]["type"]] == status
                assert "fence" not in record
                assert client.exists(keys.celery_result(job))
                assert (client.ttl(keys.job(job)) > 0) == ("batch" not in record)
                assert "at" not in record
            else:
                assert ("at" in record) != ("fence" in record), (job, record)
                assert client.ttl(keys.job(job)) == -1
                waiting += "at" in record
                leased += "fence" in record
                assert client.hexists(keys.unacked, record["tag"]) == ("fence" in record)
                if "at" in record and record["at"] != keys.suspect:
                    for what, count in (("jobs", 1), ("tokens", int(record["tokens"]))):
                        name = f"{record['level']} {record['client']}:{what}"
                        sums[name] = sums.get(name, 0) + count
            assert client.exists(keys.message(job)) == ("at" in record)
        open_jobs = sum(client.zcard(keys.jobs_by_status(status)) for status in ("queued", "running"))
        assert open_jobs == waiting + leased
        assert client.zcard(keys.leases) == leased
        open_tags = {
            client.hget(keys.job(job.decode()), "tag")
            for status in ("queued", "running")
            for job in client.zrange(keys.jobs_by_status(status), 0, -1)
        }
        assert set(client.hkeys(keys.deliveries)) == open_tags
        self._check_sums(sums)

    def _check_sums(self, sums: dict[str, int]) -> None:
        """`backlog` and `waiting` hold what the records of waiting jobs add up to."""
        levels = [str(int(level)) for level in Priority]
        backlog = {
            f"{level} {name.decode()}": int(count)
            for level in levels
            for name, count in self.redis.hgetall(self.keys.backlog(level)).items()
        }
        assert backlog == sums
        for level in levels:
            for what in ("jobs", "tokens"):
                total = sum(
                    count for name, count in sums.items() if name.startswith(level) and name.endswith(what)
                )
                assert int(self.redis.hget(self.keys.waiting, f"{level}:{what}") or 0) == total

    def close(self) -> None:
        for consumer in self._consumers:
            consumer.close()
