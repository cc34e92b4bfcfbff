"""One run: the service starts, each kind of job runs undisturbed, then jobs and faults, then the verdict."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff, NoBackoff

from tests.chaos import wire
from tests.chaos.doors import Clients
from tests.chaos.faults import KINDS, Faults
from tests.chaos.fleet import Fleet
from tests.chaos.jobs import PRIORITIES, Kind, Ticket, Tickets, kinds
from tests.chaos.transcript import Transcript
from tests.chaos.verdict import Judge, Verdict
from wicore.queue.connection import connect
from wicore.queue.schema import Keys
from wicore.request import Event

_WRAP_UP = 0.2
"""Share of the time kept for the jobs under way at the end, and for the verdict."""
_REPORT_S = 10.0


@dataclass(frozen=True)
class Plan:
    jobs: int
    """At least so many."""
    faults: int
    seconds: float
    """Bound on the whole run; one that does not get through by then has failed."""
    seed: int
    clients: int = 48
    workers: int = 3
    apis: int = 2
    only: tuple[str, ...] = ()
    """The kinds of faults, of faults.KINDS; none named: all."""
    broken: str | None = None
    """A guarantee to take out of the product: see breaks.py."""


@dataclass
class Report:
    plan: Plan
    verdict: Verdict
    sections: dict[str, Counter[str]]
    """Counts, by heading."""
    longest_pauses_s: dict[str, float]
    """That a client saw between two events, by the job's priority."""
    seconds: float


def run(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Report:
    """One run; `say` gets lines of progress."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="wicore-chaos-", dir=shm if shm.is_dir() else None))
    try:
        return asyncio.run(_Run(plan, folder, say).run())
    finally:
        shutil.rmtree(folder)


class _Run:
    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._began = time.monotonic()
        self._fleet = Fleet(folder, plan.workers, plan.apis, plan.broken)
        self._rng = random.Random(f"clients {plan.seed}")
        self._tickets = Tickets(plan.seed)
        self._running: set[asyncio.Task[None]] = set()
        self._ended = 0
        self._faults_done = asyncio.Event()

    async def run(self) -> Report:
        main = asyncio.current_task()
        assert main is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
        try:
            await self._fleet.start()
            url = self._fleet.valkey.url
            async with _client(url, Retry(ConstantBackoff(0.1), 50)) as self._store, _client(url) as raw:
                return await self._run(raw)
        finally:
            await self._fleet.close()

    async def _run(self, raw: Redis) -> Report:
        """`raw` repeats no command."""
        plan = self._plan
        self._clients = Clients(self._fleet.ports, raw, self._rng)
        self._faults = Faults(
            self._fleet, self._store, self._tickets, self._launch, plan.seed, plan.only or KINDS
        )
        async with asyncio.timeout(plan.seconds / 3):
            undisturbed = await self._run_undisturbed()
        self._say(f"{self._elapsed():5.0f} s: {len(undisturbed)} kinds of jobs have run undisturbed")
        await self._run_disturbed()
        await self._fleet.stop()
        return self._report(undisturbed)

    # --- jobs -------------------------------------------------------------------------------------

    async def _run_undisturbed(self) -> dict[str, Transcript]:
        async def one(kind: Kind) -> Transcript:
            body = {**kind.fields, "metadata": {"ticket": "undisturbed"}}
            answer = await wire.ask(self._fleet.ports[0], "POST", "/v1/jobs", body)
            assert answer.status == 202, answer
            events: list[Event] = []
            async for event in wire.events(self._fleet.ports[0], answer.json()["id"], 0):
                events.append(event)
            heard = Transcript().take_all(events)
            assert heard.ended == "done", events[-1]
            return heard

        every = kinds()
        return dict(zip((k.name for k in every), await asyncio.gather(*map(one, every)), strict=True))

    async def _run_disturbed(self) -> None:
        """Jobs and faults until there were enough of both and all jobs have ended, or the time is over."""
        injecting = asyncio.create_task(self._inject())
        reporting = asyncio.create_task(self._keep_saying())
        clients = [asyncio.create_task(self._be_a_client()) for _ in range(self._plan.clients)]
        load_until = self._plan.seconds * (1 - _WRAP_UP)
        try:
            await asyncio.wait([injecting, *clients], timeout=load_until - self._elapsed())
            await injecting if injecting.done() else injecting.cancel()
            await asyncio.wait(
                [*clients, *self._running], timeout=self._plan.seconds * 0.95 - self._elapsed()
            )
            for task in [*clients, *self._running]:
                task.result() if task.done() else task.cancel()
            await self._clients.close()
            await self._wait_until_empty()
        finally:
            for task in (injecting, reporting):
                task.cancel()

    async def _be_a_client(self) -> None:
        while self._wants_more():
            tickets = self._tickets.make()
            await self._clients.serve(tickets)
            self._ended += len(tickets)

    def _wants_more(self) -> bool:
        if self._elapsed() > self._plan.seconds * (1 - _WRAP_UP):
            return False
        return len(self._tickets.made) < self._plan.jobs or not self._faults_done.is_set()

    def _launch(self, ticket: Ticket) -> None:
        async def serve() -> None:
            await self._clients.serve([ticket])
            self._ended += 1

        task = asyncio.create_task(serve())
        self._running.add(task)

    # --- faults -----------------------------------------------------------------------------------

    async def _inject(self) -> None:
        """Spread over the jobs: the next fault comes when its share of them has ended."""
        share = self._plan.jobs / max(1, self._plan.faults)
        while (done := self._faults.injected.total()) < self._plan.faults:
            if self._ended >= min(done * share, self._plan.jobs * 0.95):
                await self._faults.inject()
            await asyncio.sleep(0.02)
        self._faults_done.set()

    async def _wait_until_empty(self) -> None:
        """Submits repeated without a key and spare copies of messages may still lie in a queue."""
        keys = Keys()
        while self._elapsed() < self._plan.seconds:
            left = [await self._store.llen(name) for name in keys.queues().values()]
            left += [await self._store.zcard(keys.jobs_by_status(s)) for s in ("queued", "running")]
            if not any(left):
                return
            await asyncio.sleep(0.05)

    # --- telling ----------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    async def _keep_saying(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            self._say(
                f"{self._elapsed():5.0f} s: {self._ended} jobs ended, "
                f"{self._faults.injected.total()} faults, {self._fleet.suicides} workers poisoned, "
                f"{len(self._clients.faults) + len(self._fleet.faults)} violations so far"
            )

    def _report(self, undisturbed: dict[str, Transcript]) -> Report:
        client = connect(self._fleet.valkey.url)
        try:
            judge = Judge(client, self._tickets.made, undisturbed, self._faults.malformed)
            verdict = judge.judge()
        finally:
            client.close()
        verdict.violations += self._clients.faults + self._faults.faults + self._fleet.faults
        verdict.violations += self._fleet.complaints()
        self._judge_size(verdict)
        tickets = self._tickets.made
        sections = {
            "jobs by door": Counter(ticket.door for ticket in tickets),
            "jobs by fate": Counter(ticket.fate for ticket in tickets),
            "faults": self._faults.injected,
            "what became of them": verdict.counts,
            "clients": self._clients.counts,
            "checked": verdict.checked,
        }
        verdict.counts["workers killed by poison"] = self._fleet.suicides
        pauses = {
            priority: max(
                (t.heard.longest_pause_s for t in tickets if t.priority == priority and t.fate != "poison"),
                default=0.0,
            )
            for priority in PRIORITIES
        }
        return Report(self._plan, verdict, sections, pauses, self._elapsed())

    def _judge_size(self, verdict: Verdict) -> None:
        for name, wanted, done in (
            ("jobs", self._plan.jobs, self._ended),
            ("faults", self._plan.faults, self._faults.injected.total()),
        ):
            if done < wanted:
                verdict.violations.append(
                    f"only {done} of {wanted} {name} in {self._elapsed():.0f} s: give it more --seconds"
                )


def _client(url: str, retry: Retry | None = None) -> Redis:
    """Without `retry` a command that fails is not repeated: whoever counts its effects does that."""
    errors = [redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError]
    return Redis.from_url(
        url, retry=retry or Retry(NoBackoff(), 0), retry_on_error=errors if retry else [], socket_timeout=20
    )
