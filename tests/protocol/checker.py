"""The search through the states, and the rules that each must keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import redis

from tests.protocol.states import KEYS, Database, State, View, World
from tests.protocol.steps import MAX_ATTEMPTS, SETTINGS, Step, Steps
from tests.queue_site import Site
from wicore.queue.schema import BELL


class Violation(AssertionError):
    """A rule that does not hold, and the steps that lead there."""

    def __init__(self, trace: tuple[str, ...], rule: str) -> None:
        steps = "".join(f"\n  {i}. {step}" for i, step in enumerate(trace, 1))
        super().__init__(f"{rule}\nafter{steps}")
        self.trace, self.rule = trace, rule


@dataclass
class Report:
    depth: int = 0
    """Calls in a row: of no more, every order was tried."""
    states: int = 1
    transitions: int = 0
    drained: int = 0
    """States from which every job was brought to its end."""


class Checker:
    """Explores one world; empties the client's database."""

    def __init__(self, client: redis.Redis, world: World, drain_every: int = 1) -> None:
        """`drain_every`: one new state in so many is brought to its end."""
        self._client, self._world, self._drain_every = client, world, drain_every
        self._site = Site(client, **SETTINGS)
        self._steps = Steps(self._site, world)
        self._drainer = self._site.worker("drainer")
        self._database = Database(client)

    def explore(self, depth: int, progress: Callable[[Report], None] = lambda report: None) -> Report:
        """Visit every state within `depth` calls. `progress` hears of each depth. Raises Violation."""
        report = Report()
        self._client.flushdb()
        start = State(self._database.read(), View((0,) * len(self._world.jobs)), ())
        for name in self._world.opening:
            start = next(state for state in self._successors(start) if state.trace[-1] == name)
        seen, frontier = {start.identity(self._world)}, [start]
        while frontier and report.depth < depth:
            reached: list[State] = []
            for state in frontier:
                for after in self._successors(state):
                    report.transitions += 1
                    identity = after.identity(self._world)
                    if identity in seen:
                        continue
                    seen.add(identity)
                    reached.append(after)
                    self._check(after)
                    if len(seen) % self._drain_every == 0:
                        self._drain(after)
                        report.drained += 1
            frontier = reached
            report.depth += 1
            report.states = len(seen)
            progress(report)
        return report

    def close(self) -> None:
        self._steps.close()
        self._site.close()

    def _successors(self, state: State) -> Iterator[State]:
        for step in self._steps.possible(state):
            self._database.write(state.keys)
            after = self._take(step, (*state.trace, step.name))
            self._compare(state, after)
            if step.harmless:
                self._must_be_equal(state, after, "a worker without the lease changes something")
            if step.repeatable:
                again = self._take(step, (*after.trace, "the same again"))
                self._must_be_equal(after, again, "a repeat changes something")
            yield after

    def _take(self, step: Step, trace: tuple[str, ...]) -> State:
        try:
            view = step.call()
        except AssertionError as err:
            raise Violation(trace, str(err)) from None
        return State(self._database.read(), view, trace)

    def _must_be_equal(self, before: State, after: State, rule: str) -> None:
        if replace(after, view=before.view).identity(self._world) != before.identity(self._world):
            raise Violation(after.trace, f"{rule}: {before.difference(after)}")

    def _compare(self, before: State, after: State) -> None:
        """A log only grows, and after its terminal event not even that."""
        for job in self._world.jobs:
            old, new = before.log(job.id), after.log(job.id)
            if new[: len(old)] != old:
                raise Violation(after.trace, f"the log of {job.id} was changed: {old} became {new}")
            if before.ended(job.id) and new != old:
                raise Violation(after.trace, f"{job.id} had ended, and its log went on: {new[len(old) :]}")

    def _check(self, state: State) -> None:
        """What holds in every state; the database is in it."""
        try:
            self._site.check()
            for job in self._world.jobs:
                record = state.record(job.id)
                assert int(record.get(b"attempts", 0)) <= MAX_ATTEMPTS, record
                fence = (job.id, record.get(b"fence", b"").decode())
                beliefs = [hold.delivery for holds in state.view.holds for hold in holds]
                holders = [d for d in beliefs if (d.job_id, d.fence) == fence]
                assert len(holders) <= 1, f"{len(holders)} deliveries are good for one lease, {fence}"
            waiting = {job.id.encode() for job in self._world.jobs if b"at" in state.record(job.id)}
            assert state.pairs(KEYS.deadlines).keys() <= waiting, (
                "the sweep would end a job that does not wait"
            )
        except AssertionError as err:
            raise Violation(state.trace, f"an invariant does not hold: {err}") from None

    def _drain(self, state: State) -> None:
        """All workers gone, another one brings every job to its end, and nothing is left over."""
        try:
            self._do_the_rest()
            self._site.check()
            last = State(self._database.read(), state.view, ())
            for job, copies in zip(self._world.jobs, state.view.sent, strict=True):
                assert last.ended(job.id) or not copies, f"{job.id} has not ended"
                assert not copies or last.keys[KEYS.job(job.id)].ttl_ms > 0, f"{job.id} is kept for ever"
            for key, value in last.keys.items():
                is_queue = value.kind == b"list" and key != KEYS.dead
                assert not is_queue or value.content == [BELL], f"{key} is not empty: {value.content}"
                on_trial = key.startswith(KEYS.trial("")) and value.ttl_ms < 0
                assert not on_trial, f"{key} still says that a suspect runs there"
            for key in (KEYS.deliveries, KEYS.unacked, KEYS.deadlines):
                assert key not in last.keys, f"{key} is not empty"
        except AssertionError as err:
            trace = (*state.trace, "all leases run out, another worker does the rest")
            raise Violation(trace, str(err)) from None

    def _do_the_rest(self) -> None:
        for _ in range(10):
            self._site.expire_leases()
            self._site.reap()
            batch = self._drainer.pop(10)
            for delivery in batch:
                assert self._site.finish(delivery) == 1
            if not batch and not self._client.exists(KEYS.leases):
                return
        raise AssertionError("there is always another message")
