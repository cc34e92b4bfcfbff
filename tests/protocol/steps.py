"""What can happen in a state: each step a call of the real code, and what its answer must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from tests.messages import pushed
from tests.protocol.states import KEYS, PAST, WORKERS, Hold, Sent, State, View, World
from tests.queue_site import RESULT, Site
from wicore.errors import UnknownJob
from wicore.queue.consumer import Delivery, LeaseConsumer
from wicore.request import Event, started_event, terminal_event, token_event

EVENTS = 2
"""Appends tried with one delivery: the opening and a token."""
MAX_ATTEMPTS = 2
NEVER_S = 3600.0
"""Leases and deadlines run out by a step of the model, not by the clock."""
SETTINGS = {"max_attempts": MAX_ATTEMPTS, "lease_s": NEVER_S, "background_share": 0.0}


class Step(NamedTuple):
    name: str
    call: Callable[[], View]
    """Does it; returns the view after it. AssertionError: the answer was wrong."""
    repeatable: bool = False
    """Done once more, the first answer having been lost, it must change nothing."""
    harmless: bool = False
    """It must change nothing at all."""


class _Deaf(LeaseConsumer):
    """Its pops are done in Redis, and it never hears of them."""

    def _admit(self, rows: list[list[Any]]) -> list[Delivery]:
        return []


class Steps:
    def __init__(self, site: Site, world: World) -> None:
        self._site, self._world = site, world
        self._consumers = [site.worker(name) for name in WORKERS]
        self._deaf = [_Deaf(site.redis, name, settings=site.settings) for name in WORKERS]

    def close(self) -> None:
        for consumer in self._deaf:
            consumer.close()

    def possible(self, state: State) -> Iterator[Step]:
        """All of them. The database must be in `state` when one is called."""
        for index, job in enumerate(self._world.jobs):
            yield from self._of_clients(state, index, job)
        for number, worker in enumerate(WORKERS):
            for size in self._world.batches:
                yield Step(f"{worker} pops {size}", partial(self._pop, state, number, size))
                lost = partial(self._pop_unheard, state.view, number, size)
                yield Step(f"{worker} pops {size}, the answer is lost", lost)
            for hold in state.view.holds[number]:
                yield from self._of_worker(state, number, hold)
        yield Step(f"{WORKERS[0]} peeks", partial(self._peek, state), True, True)
        yield from self._of_time(state)

    def _of_clients(self, state: State, index: int, job: Sent) -> Iterator[Step]:
        sent = state.view.sent[index]
        if sent < job.copies:
            yield Step(f"send {job.id}", partial(self._send, state.view, index, job), not job.foreign)
        if KEYS.cancel(job.id) not in state.keys and (sent or job.foreign):
            yield Step(f"cancel {job.id}", partial(self._cancel, state.view, job.id), True)

    def _of_worker(self, state: State, worker: int, hold: Hold) -> Iterator[Step]:
        view, job, fence = state.view, hold.delivery.job_id, hold.delivery.fence
        record = state.record(job)
        stale = record.get(b"fence") != fence.encode()
        who = f"{WORKERS[worker]} ({job} {fence}{', stale' if stale else ''})"
        if hold.written < EVENTS:
            yield Step(f"{who} appends", partial(self._append, view, worker, hold, stale), not stale, stale)
        kinds = ["done"] + ["cancelled"] * (b"cancel" in record) + ["expired"] * _is_late(record)
        for kind in kinds:
            end = partial(self._finish, view, worker, hold, kind, stale)
            yield Step(f"{who} ends as {kind}", end, not stale, stale)
        yield Step(f"{who} renews", partial(self._renew, view, worker, hold, stale), False, stale)
        newest = [other for other in view.holds[worker] if other.delivery.job_id == job][-1]
        if hold.on_trial and hold is newest:
            yield Step(f"{who} is acquitted", partial(self._acquit, view, worker, hold), True, stale)
        yield Step(f"{who} hands back", partial(self._hand_back, view, worker, hold), not stale, stale)

    def _of_time(self, state: State) -> Iterator[Step]:
        leases = state.pairs(KEYS.leases)
        for job in self._world.jobs:
            record = state.record(job.id)
            tag, fence = record.get(b"tag", b""), record.get(b"fence", b"").decode()
            if fence and leases.get(tag) != PAST:
                yield Step(
                    f"the lease of {job.id} ({fence}) runs out", partial(self._expire, state.view, tag)
                )
            if job.late and record and not state.ended(job.id):
                for limit in (b"deadline_ms", b"start_by_ms"):
                    if record.get(limit) != PAST:
                        pass_it = partial(self._be_late, state, job.id, limit)
                        yield Step(f"the {limit.decode()} of {job.id} passes", pass_it)
        if PAST in leases.values() or PAST in state.pairs(KEYS.deadlines).values():
            yield Step("reap", partial(self._reap, state.view), True)

    # --- clients ----------------------------------------------------------------------------------

    def _send(self, view: View, index: int, job: Sent) -> View:
        if job.foreign:
            self._site.redis.lpush(KEYS.queue(job.level), pushed(job.id, timeout_s=NEVER_S))
        else:
            more = {"timeout_s": NEVER_S} if job.late else {}
            self._site.submit(job.level, job_id=job.id, **more)
        return view.sending(index)

    def _cancel(self, view: View, job: str) -> View:
        try:
            self._site.producer.cancel(job)
        except UnknownJob:
            pass  # the wish is kept all the same
        return view

    # --- workers ----------------------------------------------------------------------------------

    def _pop(self, state: State, worker: int, size: int) -> View:
        view = state.view
        consumer = self._consumers[worker]
        consumer._uncertain = view.uncertain[worker]
        got = consumer.pop(size, **_terms(view.holds[worker]))
        foreign = {job.id for job in self._world.jobs if job.foreign}
        for delivery in got:
            job, record = delivery.job_id, state.record(delivery.job_id)
            assert delivery.attempt <= MAX_ATTEMPTS, f"{job} is delivered too often"
            assert job not in foreign or delivery.deadline_ms is not None, f"{job} has lost its deadline"
            called_off = KEYS.cancel(job) in state.keys or b"cancel" in record
            assert not called_off, f"{job} is delivered although it was called off"
            assert not _is_late(record), f"{job} is delivered although it is late"
        return view.popped(worker, got, lost=False)

    def _peek(self, state: State) -> View:
        for peeked in self._consumers[0].peek(len(self._world.jobs)):
            job, record = peeked.job_id, state.record(peeked.job_id)
            assert record[b"at"].startswith(KEYS.line("").encode()), (
                f"{job} is shown although it does not wait"
            )
            called_off = KEYS.cancel(job) in state.keys or b"cancel" in record
            assert not called_off, f"{job} is shown although it was called off"
            assert not _is_late(record), f"{job} is shown although it is late"
        return state.view

    def _pop_unheard(self, view: View, worker: int, size: int) -> View:
        deaf = self._deaf[worker]
        deaf._uncertain = view.uncertain[worker]
        deaf.pop(size, **_terms(view.holds[worker]))
        return view.popped(worker, [], lost=True)

    def _append(self, view: View, worker: int, hold: Hold, stale: bool) -> View:
        (reply,) = self._site.write(hold.delivery, _next_event(hold))
        assert reply in ((0,) if stale else (1, 2)), f"append answered {reply}"
        return view if stale else view.exchange(worker, hold, replace(hold, written=hold.written + 1))

    def _finish(self, view: View, worker: int, hold: Hold, kind: Any, stale: bool) -> View:
        event = terminal_event(hold.delivery.job_id, hold.next_seq, kind)
        (reply,) = self._site.write(hold.delivery, event, result=RESULT if kind == "done" else None)
        assert reply == int(not stale), f"finish answered {reply}"
        return view if stale else view.exchange(worker, hold, None)

    def _renew(self, view: View, worker: int, hold: Hold, stale: bool) -> View:
        d = hold.delivery
        lost, _ = self._site.scripts.call("renew", d.job_id, d.tag, d.fence)
        assert lost == [d.tag.encode()] * stale, f"renew answered that {lost!r} are lost"
        # Who is told that a lease is lost drops the job; who is not may go on with it for long.
        return view.exchange(worker, hold, None) if stale else view

    def _acquit(self, view: View, worker: int, hold: Hold) -> View:
        self._consumers[worker].acquit(hold.delivery)
        return view.exchange(worker, hold, replace(hold, acquitted=True))

    def _hand_back(self, view: View, worker: int, hold: Hold) -> View:
        self._consumers[worker].hand_back([hold.delivery])
        return view.exchange(worker, hold, None)

    # --- time -------------------------------------------------------------------------------------

    def _expire(self, view: View, tag: bytes) -> View:
        self._site.redis.zadd(KEYS.leases, {tag: int(PAST)}, xx=True)
        return view

    def _be_late(self, state: State, job: str, limit: bytes) -> View:
        self._site.redis.hset(KEYS.job(job), limit, int(PAST))
        if _is_late({**state.record(job), limit: PAST}):
            self._site.redis.zadd(KEYS.deadlines, {job: int(PAST)}, xx=True)
        return state.view

    def _reap(self, view: View) -> View:
        self._site.reap()
        return view


def _terms(holds: tuple[Hold, ...]) -> dict[str, Any]:
    """On which a worker with these pops."""
    return {
        "held": [hold.delivery for hold in holds],
        "suspects": not any(hold.on_trial for hold in holds),
    }


def _next_event(hold: Hold) -> Event:
    job, seq = hold.delivery.job_id, hold.next_seq
    return (
        token_event(job, seq, 0, "a", [7]) if hold.written else started_event(job, seq, hold.delivery.attempt)
    )


def _is_late(record: dict[bytes, bytes]) -> bool:
    never_started = record.get(b"start_by_ms") == PAST and b"started_ms" not in record
    return never_started or record.get(b"deadline_ms") == PAST
