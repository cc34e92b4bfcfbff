"""What must hold at the end, checked against Redis when everything else has stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from tests.chaos.fleet import MAX_ATTEMPTS
from tests.chaos.jobs import Ticket
from tests.chaos.transcript import Choice, Transcript
from tests.queue_site import Site
from wicore.queue.producer import JobRecord
from wicore.queue.schema import Keys
from wicore.request import STATUS_OF_TERMINAL

_CELERY_STATES = {"succeeded": "SUCCESS", "failed": "FAILURE", "expired": "FAILURE", "cancelled": "REVOKED"}


@dataclass
class Verdict:
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)


class Judge:
    """Looks at every job that Redis knows, and at every ticket."""

    def __init__(
        self,
        client: redis.Redis,
        tickets: Sequence[Ticket],
        undisturbed: Mapping[str, Transcript],
        malformed: Sequence[str],
    ) -> None:
        """`undisturbed`: transcripts by name of the kind, of jobs that ran before any fault."""
        self._client = client
        self._site = Site(client)
        self._tickets = {str(ticket.number): ticket for ticket in tickets}
        self._undisturbed = undisturbed
        self._malformed = malformed
        self._dead = self._site.dead()
        self.verdict = Verdict()

    def judge(self) -> Verdict:
        self._judge_invariants()
        self._judge_emptiness()
        jobs: dict[str, list[str]] = {number: [] for number in self._tickets}
        for job in self._site.jobs():
            self._judge_job(job, jobs)
        for number, ids in jobs.items():
            self._judge_ticket(self._tickets[number], ids)
        self._judge_dead(jobs)
        return self.verdict

    def _blame(self, what: str) -> None:
        self.verdict.violations.append(what)

    def _expect(self, right: bool, check: str, what: str) -> None:
        """Count a check under its name; say what is wrong when it fails."""
        self.verdict.checked[check] += 1
        if not right:
            self._blame(what)

    # --- the queue --------------------------------------------------------------------------------

    def _judge_invariants(self) -> None:
        try:
            self._site.check()
            self.verdict.checked["the queue's invariants (schema.py)"] += 1
        except AssertionError as err:
            where = err.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            line = where.tb_lineno if where else 0
            self._blame(f"an invariant of the queue (tests/queue_site.py line {line}): {err!s:.500}")

    def _judge_emptiness(self) -> None:
        keys, client = Keys(), self._client
        sizes = {name: client.hlen(getattr(keys, name)) for name in ("unacked", "deliveries")}
        sizes |= {name: client.zcard(getattr(keys, name)) for name in ("leases", "deadlines")}
        sizes |= {status: client.zcard(keys.jobs_by_status(status)) for status in ("queued", "running")}
        sizes |= {f"level {level}": client.llen(name) for level, name in keys.queues().items()}
        sizes["suspect"] = client.llen(keys.suspect)
        for pattern in (keys.line("*"), keys.message("*"), keys.cancel("*")):
            sizes[pattern] = sum(1 for _ in client.scan_iter(pattern, count=10_000))
        for name, size in sizes.items():
            self._expect(size == 0, "keys that must be empty", f"{name}: {size} entries are left")

    # --- jobs -------------------------------------------------------------------------------------

    def _judge_job(self, job: str, jobs: dict[str, list[str]]) -> None:
        record = self._site.producer.record(job)
        number = job.removeprefix("pushed-") if job.startswith("pushed-") else record.metadata.get("ticket")
        log = Transcript().take_all(self._site.log(job))
        for fault in log.faults:
            self._blame(f"the log of job {job}: {fault}")
        self._expect(
            STATUS_OF_TERMINAL.get(log.ended or "") == record.status,
            "jobs with one terminal event, the last",
            f"job {job}: its log ends with {log.ended!r}, its status is {record.status!r}",
        )
        self._judge_celery(job, record)
        self.verdict.counts[f"jobs {record.status}"] += 1
        self.verdict.counts["jobs of more than one attempt"] += record.attempts > 1
        self.verdict.counts["jobs resumed"] += log.resumed > 0
        self.verdict.counts["resumptions"] += log.resumed
        if number in jobs:
            jobs[number].append(job)
            self._judge_text(job, self._tickets[number], record, log)
        elif job in self._malformed:
            self._expect(
                log.ended == "failed", "malformed jobs failed", f"job {job}: {log.ended}, not failed"
            )
        elif number != "undisturbed":
            self._blame(f"job {job}: nobody asked for it (ticket {number})")

    def _judge_celery(self, job: str, record: JobRecord) -> None:
        stored = self._client.get(Keys.celery_result(job))
        meta: dict[str, Any] = json.loads(stored) if stored else {}
        self._expect(
            meta.get("status") == _CELERY_STATES.get(record.status)
            and (record.status != "succeeded" or meta["result"] == record.result),
            "Celery results",
            f"job {job}: {record.status}, but its Celery result is {meta!r:.200}",
        )

    def _judge_text(self, job: str, ticket: Ticket, record: JobRecord, log: Transcript) -> None:
        """Terminal event, text, ids, logprobs and finish reasons, against the undisturbed run's."""
        self._expect(
            log.ended in ticket.endings(),
            "endings that the client may expect",
            f"job {job}, {ticket.fate}: ended as {log.ended!r} ({log.end.get('error')}) "
            f"after {record.attempts} attempts",
        )
        told = record.kind, record.deadline_ms is not None
        wanted = ticket.kind.fields["kind"], ticket.timeout_s is not None
        # Of a pushed message that nobody wanted any more when its turn came nothing has been read.
        read = bool(log.choices)
        self._expect(not read or told == wanted, "records complete", f"job {job}: kind, deadline: {told}")
        if ticket.fate == "poison":
            self._expect(
                record.attempts == MAX_ATTEMPTS
                and record.error is not None
                and record.error["code"] == "worker_lost",
                "poison given up after all attempts",
                f"poison job {job}: {record.attempts} attempts, error {record.error}",
            )
            return
        whole = self._undisturbed[ticket.kind.name]
        if log.ended == "done":
            same = log.choices == whole.choices and _counts(log) == _counts(whole)
            self._expect(same, "texts as undisturbed", f"job {job}: {_difference(log, whole)}")
            told = _texts(record.result or {})
            self._expect(
                told == {index: choice.text for index, choice in whole.choices.items()},
                "results as undisturbed",
                f"job {job}: its result differs from the undisturbed one: {told!r:.200}",
            )
        else:
            prefix = all(choice.starts(whole.choices[index]) for index, choice in log.choices.items())
            self._expect(prefix, "texts of ended jobs a prefix", f"job {job}: {_difference(log, whole)}")

    # --- clients ----------------------------------------------------------------------------------

    def _judge_ticket(self, ticket: Ticket, jobs: Sequence[str]) -> None:
        """What the client saw against the log; and that one ticket made one job."""
        who = f"ticket {ticket.number} (door {ticket.door}, {ticket.fate})"
        if ticket.door == "answer":
            self._judge_answer(who, ticket, jobs)
            return
        for fault in ticket.heard.faults:
            self._blame(f"{who}, job {ticket.job}: the client saw that {fault}")
        # Sent again on a new socket, a submit has no key to be recognised by.
        most = max(1, ticket.sends) if ticket.door == "shared" else 1
        self._expect(
            1 <= len(jobs) <= most and ticket.job in jobs,
            "one job a ticket",
            f"{who}: its job is {ticket.job}, and it made the jobs {list(jobs)} in {ticket.sends} sends",
        )
        self.verdict.counts["submits repeated without a key"] += max(0, len(jobs) - 1)
        if ticket.job in jobs:
            log = Transcript().take_all(self._site.log(str(ticket.job)))
            self._expect(
                (log.last, log.digest) == (ticket.heard.last, ticket.heard.digest),
                "clients who saw the log",
                f"{who}, job {ticket.job}: the client saw {ticket.heard.last} events to "
                f"{ticket.heard.ended!r}, the log has {log.last} to {log.ended!r}, or they differ",
            )

    def _judge_answer(self, who: str, ticket: Ticket, jobs: Sequence[str]) -> None:
        self._expect(len(jobs) == 1, "one job a ticket", f"{who}: its one key made the jobs {list(jobs)}")
        if len(jobs) != 1:
            return
        record, answer = self._site.producer.record(jobs[0]), ticket.answer or {}
        if record.status == "succeeded":
            right = answer == record.result and ticket.job == record.id
        else:
            right = answer.get("error", {}).get("code") in ("expired", "cancelled")
        self._expect(
            right,
            "answers as the record",
            f"{who}, job {record.id} {record.status}: job {ticket.job} answered {answer!r:.300}",
        )

    # --- the dead ---------------------------------------------------------------------------------

    def _judge_dead(self, jobs: Mapping[str, Sequence[str]]) -> None:
        """Exactly the poison and the malformed."""
        wanted = Counter(self._malformed)
        for number, ticket in self._tickets.items():
            if ticket.fate == "poison":
                wanted.update(jobs[number])
        for entry in self._dead:
            name = self._name_of(entry)
            self._expect(
                wanted[name] > 0,
                "dead messages",
                f"dead without cause: {name}: {entry['reason']}: {entry['message']:.200}",
            )
            wanted[name] -= 1
        for name in +wanted:
            self._blame(f"{name} is not in the dead list")

    def _name_of(self, entry: Mapping[str, Any]) -> str:
        text = entry["message"]
        for mark in self._malformed:
            if mark in text:
                return mark
        try:
            return str(json.loads(text)["headers"]["id"])
        except (ValueError, TypeError, KeyError):
            return "a message without id"


def _texts(result: Mapping[str, Any]) -> dict[int, str]:
    """By choice, of a result in either of OpenAI's forms."""
    choices = result.get("choices", [])
    return {c["index"]: c["text"] if "text" in c else c["message"]["content"] for c in choices}


def _counts(log: Transcript) -> dict[str, int]:
    """Tokens used, without how many were cached, which depends on who went before."""
    return {name: count for name, count in log.end["usage"].items() if isinstance(count, int)}


def _difference(log: Transcript, whole: Transcript) -> str:
    for index in sorted(log.choices.keys() | whole.choices.keys()):
        ours, theirs = log.choices.get(index, Choice()), whole.choices.get(index, Choice())
        if ours != theirs:
            return (
                f"choice {index} is {_told(ours)}, undisturbed {_told(theirs)}; resumed {log.resumed} times"
            )
    return f"usage is {log.end.get('usage')}, undisturbed {whole.end.get('usage')}"


def _told(choice: Choice) -> str:
    return f"{choice.text!r:.120} ({len(choice.ids)} tokens, {choice.finish_reason})"
