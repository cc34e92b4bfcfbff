"""What goes wrong, one thing at a time, in an order drawn from a seed.

An innocent job must not run out of attempts because of us: whatever can cost a worker its leases is done only
while no job that is not poison stands at its last attempt but one.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import ClassVar

from redis.asyncio import Redis

from tests.chaos.fleet import LEASE_S, MAX_ATTEMPTS, Fleet, Lease, leases
from tests.chaos.jobs import Ticket, Tickets, malformed
from wicore.queue.schema import Keys
from wicore.request import Priority

KINDS = {
    "kill -9 of a worker": 5,
    "SIGSTOP of a worker past its lease": 4,
    "SIGTERM of a worker": 3,
    "kill -9 of an API": 2,
    "SIGTERM of an API": 1,
    "SIGSTOP of an API": 1,
    "kill -9 of Valkey": 2,
    "SIGSTOP of Valkey": 2,
    "kill -9 of Valkey and of a worker": 1,
    "kill -9 of Valkey, SIGTERM of a worker": 1,
    "CLIENT KILL TYPE normal": 1,
    "CLIENT KILL TYPE pubsub": 1,
    "poison job": 1,
    "malformed message": 2,
    "message pushed twice": 1,
}
"""How often each comes in a deck; decks are shuffled and dealt one after the other."""


class Faults:
    def __init__(
        self,
        fleet: Fleet,
        store: Redis,
        tickets: Tickets,
        launch: Callable[[Ticket], None],
        seed: int,
        only: Collection[str],
    ) -> None:
        """`launch` starts a client for a ticket; `only`: the kinds that there shall be."""
        self._fleet = fleet
        self._redis = store
        self._tickets = tickets
        self._launch = launch
        self._rng = random.Random(f"faults {seed}")
        self._deck = {name: count for name, count in KINDS.items() if name in only}
        self._hand: list[str] = []
        self._poison: Ticket | None = None
        self.injected: Counter[str] = Counter()
        self.malformed: list[str] = []
        """Marks of the malformed messages."""
        self.faults: list[str] = []

    async def inject(self) -> None:
        """The next fault of the deck that is possible now."""
        if not self._hand:
            self._hand = [name for name, count in self._deck.items() for _ in range(count)]
            self._rng.shuffle(self._hand)
        for name in self._hand:
            if await self._inject[name](self):
                self._hand.remove(name)
                self.injected[name] += 1
                return
        await asyncio.sleep(0.1)

    # --- workers ----------------------------------------------------------------------------------

    async def _freeze_worker(self) -> tuple[str, list[Lease]] | None:
        """SIGSTOP a worker whose jobs can all afford to lose it, a busy one if there is one."""
        have = Counter(lease.owner for lease in await leases(self._redis))
        owners = list(self._fleet.workers)
        self._rng.shuffle(owners)
        for owner in sorted(owners, key=lambda owner: have[owner] == 0):
            if self._signal(owner, signal.SIGSTOP):
                held = [lease for lease in await leases(self._redis) if lease.owner == owner]
                if held and not any(map(self._is_at_risk, held)) and owner in self._fleet.workers:
                    return owner, held
                self._signal(owner, signal.SIGCONT)
        return None

    def _signal(self, owner: str, number: int) -> bool:
        member = self._fleet.workers.get(owner)
        if member is None or member.process.poll() is not None:
            return False
        member.process.send_signal(number)
        return True

    async def _kill_worker(self) -> bool:
        frozen = await self._freeze_worker()
        if frozen is None:
            return False
        self._fleet.kill_worker(frozen[0])
        return True

    async def _stall_worker(self) -> bool:
        """Frozen past its lease; it comes back while others are about its jobs, or later."""
        frozen = await self._freeze_worker()
        if frozen is None:
            return False
        owner, held = frozen
        jobs = {lease.job for lease in held}
        end = time.monotonic() + 2 * LEASE_S + 1.0
        while time.monotonic() < end:
            if any(lease.job in jobs and lease.owner != owner for lease in await leases(self._redis)):
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(self._rng.choice((0.0, 0.0, self._rng.uniform(0.2, 1.5))))
        self._signal(owner, signal.SIGCONT)
        return True

    async def _retire_worker(self) -> bool:
        """What it hands back must not have been charged an attempt."""
        frozen = await self._freeze_worker()
        if frozen is None:
            return False
        owner, held = frozen
        await self._fleet.retire_worker(owner)
        charged = await self._redis.hmget(Keys().deliveries, [lease.tag for lease in held])
        for lease, attempts in zip(held, charged, strict=True):
            if attempts is not None and int(attempts) > lease.attempt and lease.job != self._poisoned():
                self.faults.append(
                    f"job {lease.job}: {int(attempts)} attempts are counted after {owner}, told to stop in "
                    f"attempt {lease.attempt}, handed it back"
                )
        return True

    # --- APIs -------------------------------------------------------------------------------------

    async def _kill_api(self) -> bool:
        if not self._fleet.apis:
            return False
        self._fleet.kill_api(self._rng.choice(list(self._fleet.apis)))
        return True

    async def _retire_api(self) -> bool:
        for port in self._rng.sample(list(self._fleet.apis), len(self._fleet.apis)):
            if await self._fleet.answers(port) and port in self._fleet.apis:
                self._fleet.retire_api(port)
                return True
        return False

    async def _stall_api(self) -> bool:
        """Longer than a client of ours is silent between two events, shorter than it waits."""
        if not self._fleet.apis:
            return False
        port = self._rng.choice(list(self._fleet.apis))
        self._fleet.signal_api(port, signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(0.5, 3.0))
        self._fleet.signal_api(port, signal.SIGCONT)
        return True

    # --- Valkey -----------------------------------------------------------------------------------

    async def _kill_valkey(self) -> bool:
        if await self._any_at_risk():
            return False
        async with self._outage():
            return True

    async def _kill_valkey_and_worker(self) -> bool:
        frozen = None if await self._any_at_risk() else await self._freeze_worker()
        if frozen is None:
            return False
        async with self._outage():
            self._fleet.kill_worker(frozen[0])
            return True

    async def _kill_valkey_and_retire_worker(self) -> bool:
        """It has something to write and to hand back, and cannot."""
        frozen = None if await self._any_at_risk() else await self._freeze_worker()
        if frozen is None:
            return False
        async with self._outage():
            leaving = asyncio.create_task(self._fleet.retire_worker(frozen[0]))
        await leaving
        return True

    @asynccontextmanager
    async def _outage(self) -> AsyncIterator[None]:
        """Valkey is killed before, and started a moment after, what happens inside."""
        await self._fleet.kill_valkey()
        yield
        await asyncio.sleep(self._rng.uniform(0.0, 0.8))
        await self._fleet.start_valkey()

    async def _stall_valkey(self) -> bool:
        pid = self._fleet.valkey.pid
        if pid is None or await self._any_at_risk():
            return False
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(0.7, 1.2))
        os.kill(pid, signal.SIGCONT)
        return True

    async def _cut(self, kind: str) -> bool:
        if await self._any_at_risk():
            return False
        await self._redis.execute_command("CLIENT", "KILL", "TYPE", kind)
        return True

    # --- messages ---------------------------------------------------------------------------------

    async def _send_poison(self) -> bool:
        """One at a time, lest the same innocents meet several."""
        if self._poisoned() is not None or await self._any_at_risk():
            return False
        self._poison = self._tickets.make_poison()
        self._launch(self._poison)
        return True

    async def _push_malformed(self) -> bool:
        mark, message = malformed(len(self.malformed))
        self.malformed.append(mark)
        await self._redis.lpush(Keys().queue(self._rng.choice(list(Priority))), message)
        return True

    async def _push_twice(self) -> bool:
        self._launch(self._tickets.make_duplicated())
        return True

    # --- sparing innocents ------------------------------------------------------------------------

    def _poisoned(self) -> str | None:
        """The poison job under way."""
        if self._poison is None or self._poison.heard.ended is not None:
            return None
        return self._poison.job or "not yet accepted"

    def _is_at_risk(self, lease: Lease) -> bool:
        return lease.attempt >= MAX_ATTEMPTS - 1 and lease.job != self._poisoned()

    async def _any_at_risk(self) -> bool:
        return any(map(self._is_at_risk, await leases(self._redis)))

    _inject: ClassVar[dict[str, Callable[[Faults], Awaitable[bool]]]] = {
        "kill -9 of a worker": _kill_worker,
        "SIGSTOP of a worker past its lease": _stall_worker,
        "SIGTERM of a worker": _retire_worker,
        "kill -9 of an API": _kill_api,
        "SIGTERM of an API": _retire_api,
        "SIGSTOP of an API": _stall_api,
        "kill -9 of Valkey": _kill_valkey,
        "kill -9 of Valkey and of a worker": _kill_valkey_and_worker,
        "kill -9 of Valkey, SIGTERM of a worker": _kill_valkey_and_retire_worker,
        "SIGSTOP of Valkey": _stall_valkey,
        "CLIENT KILL TYPE normal": lambda self: self._cut("normal"),
        "CLIENT KILL TYPE pubsub": lambda self: self._cut("pubsub"),
        "poison job": _send_poison,
        "malformed message": _push_malformed,
        "message pushed twice": _push_twice,
    }
