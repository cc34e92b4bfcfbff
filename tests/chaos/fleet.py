"""The processes of a run: Valkey, workers, APIs. A process that ends untold is a fault."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from redis.asyncio import Redis

from tests.chaos import wire
from tests.chaos.worker import POISONED
from tests.services import module_process, settings_for
from wicore.config import Settings
from wicore.queue.embedded import EmbeddedValkey
from wicore.queue.schema import Keys

LEASE_S = 1.5
MAX_ATTEMPTS = 5
_LEAVE_S = 45.0
"""What a process told to stop may take: gunicorn waits 20 s for calls under way."""
_START_S = 60.0
_WATCH_S = 0.05


@dataclass(frozen=True)
class Lease:
    """What `unacked` says of a job that a worker has."""

    job: str
    tag: str
    owner: str
    attempt: int


@dataclass
class Member:
    """A worker or an API process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Fleet:
    def __init__(self, folder: Path, workers: int, apis: int, broken: str | None) -> None:
        """`folder` gets Valkey's data and everybody's logs; `broken`: see breaks.py. Starts nothing."""
        self._folder = folder
        self._broken = broken
        # Synced before every answer: what an everysec Redis may lose is not what is tested here.
        self.valkey = EmbeddedValkey(folder / "valkey", extra=("--appendfsync", "always"))
        # Valkey dies with the thread that started it, so one thread starts it every time, and stays.
        self._valkey_thread = ThreadPoolExecutor(1)
        self._sizes = workers, apis
        self.ports = [_free_port() for _ in range(apis)]
        self.workers: dict[str, Member] = {}
        """Those in service, by owner."""
        self.apis: dict[int, Member] = {}
        """Those in service, by port."""
        self.faults: list[str] = []
        self.suicides = 0
        """Workers that poison killed."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._started = 0
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Everything up and answering."""
        await self.start_valkey()
        for _ in range(self._sizes[0]):
            self.start_worker()
        for port in self.ports:
            self.start_api(port)
        self._watcher = asyncio.create_task(self._watch())
        await self.ready()

    def settings(self, **more: Any) -> Settings:
        """A small KV pool, so that sequences are preempted; one thread an engine, for there are several."""
        return settings_for(
            self.valkey.url,
            queue__lease_s=LEASE_S,
            queue__max_attempts=MAX_ATTEMPTS,
            queue__drain_s=0.3,
            scheduler__max_batch=8,
            hmt__device_tokens=1024,
            engine__threads=1,
            telemetry__log_level="warning",
            **more,
        )

    # --- starting and ending ----------------------------------------------------------------------

    async def start_valkey(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._valkey_thread, self.valkey.start)

    async def kill_valkey(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._valkey_thread, self.valkey.kill)

    def start_worker(self) -> None:
        self._started += 1
        owner = f"worker-{self._started}"
        broken = [self._broken] if self._broken else []
        self.workers[owner] = self._start(owner, self.settings(), "tests.chaos.worker", owner, *broken)

    def start_api(self, port: int) -> None:
        self._started += 1
        settings = self.settings(api__port=port)
        gunicorn = ("gunicorn", "-c", "python:api.gunicorn_conf", "api.wsgi:app")
        self.apis[port] = self._start(f"api-{self._started}", settings, *gunicorn)

    def _start(self, name: str, settings: Settings, *module: str) -> Member:
        log = self._folder / f"{name}.log"
        with open(log, "ab") as output:
            process = module_process(settings, *module, stdout=output, stderr=output)
        return Member(name, process, log)

    def kill_worker(self, owner: str) -> None:
        """kill -9, and another one starts."""
        member = self.workers.pop(owner)
        member.process.kill()
        member.process.wait()
        self.start_worker()

    def kill_api(self, port: int) -> None:
        """kill -9 of gunicorn and its worker, and another one starts."""
        member = self.apis.pop(port)
        family = psutil.Process(member.process.pid).children(recursive=True)
        for process in (member.process, *family):
            process.kill()
        member.process.wait()
        psutil.wait_procs(family, timeout=5)
        self.start_api(port)

    def signal_api(self, port: int, number: int) -> None:
        """To gunicorn and its worker, if they are in service."""
        if port in self.apis:
            main = psutil.Process(self.apis[port].process.pid)
            for process in (main, *main.children(recursive=True)):
                process.send_signal(number)

    async def retire_worker(self, owner: str) -> None:
        """SIGTERM, while another one starts; returns when the old one has ended."""
        member = self.workers.pop(owner)
        member.process.send_signal(signal.SIGTERM)
        member.process.send_signal(signal.SIGCONT)
        self.start_worker()
        await self._end_of(member)

    def retire_api(self, port: int) -> None:
        """SIGTERM; another one starts when this one has ended, since the port is one."""
        member = self.apis.pop(port)
        member.process.send_signal(signal.SIGTERM)

        async def replace() -> None:
            await self._end_of(member)
            self.start_api(port)

        task = asyncio.create_task(replace())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def ready(self) -> None:
        """Wait until those told to leave have left, and everybody else is up."""
        await asyncio.gather(*self._leaving)
        async with asyncio.timeout(_START_S), Redis.from_url(self.valkey.url) as store:
            while not await self._is_ready(store):
                await asyncio.sleep(0.05)

    async def _is_ready(self, store: Redis) -> bool:
        beating = {owner.decode() for owner in await store.hkeys(Keys().workers)}
        up = [await self.answers(port) for port in self.ports]
        return beating >= self.workers.keys() and all(up)

    async def answers(self, port: int) -> bool:
        """Whether an API is past its start: told to stop before, it would just be gone."""
        try:
            return (await wire.ask(port, "GET", "/ready")).status == 200
        except wire.Broken:
            return False

    async def stop(self) -> None:
        """SIGTERM to everyone but Valkey; each must end well, the workers' accounts in order."""
        await self.ready()
        await self._stop_watching()
        members = [*self.workers.values(), *self.apis.values()]
        for member in members:
            member.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*map(self._end_of, members))
        self.workers, self.apis = {}, {}

    async def close(self) -> None:
        """Leave nothing behind, however the run went."""
        await self._stop_watching()
        for member in [*self.workers.values(), *self.apis.values()]:
            for process in psutil.Process(member.process.pid).children(recursive=True):
                process.kill()
            member.process.kill()
            member.process.wait()
        await self.kill_valkey()
        self._valkey_thread.shutdown()

    async def _end_of(self, member: Member) -> None:
        try:
            code = await asyncio.to_thread(member.process.wait, _LEAVE_S)
        except subprocess.TimeoutExpired:
            self.faults.append(f"{member.name} had not ended {_LEAVE_S:g} s after SIGTERM")
            member.process.kill()
            member.process.wait()
        else:
            if code != 0 and not self._died_of_poison(member):
                self.faults.append(f"{member.name} ended with {code} after SIGTERM: {_tail(member.log)}")

    # --- watching ---------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            for owner, member in list(self.workers.items()):
                if member.process.poll() is not None:
                    del self.workers[owner]
                    if not self._died_of_poison(member):
                        self._note_end(member)
                    self.start_worker()
            for port, member in list(self.apis.items()):
                if member.process.poll() is not None:
                    del self.apis[port]
                    self._note_end(member)
                    self.start_api(port)
            await asyncio.sleep(_WATCH_S)

    async def _stop_watching(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
            self._watcher = None

    def _died_of_poison(self, member: Member) -> bool:
        died = member.process.returncode == -signal.SIGKILL and _tail(member.log).endswith(POISONED)
        self.suicides += died
        return died

    def _note_end(self, member: Member) -> None:
        code = member.process.returncode
        self.faults.append(f"{member.name} ended by itself with {code}: {_tail(member.log)}")

    def complaints(self) -> list[str]:
        """What the processes logged as an error: each is a case that nobody foresaw."""
        found = []
        for log in sorted(self._folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            found += [f"{log.stem} logged: {line:.300}" for line in lines if _is_complaint(line)]
        return found


async def leases(store: Redis) -> list[Lease]:
    """Who has what."""
    keys = Keys()
    heads = {
        tag.decode(): json.loads(value.partition(b"\n")[0])
        for tag, value in (await store.hgetall(keys.unacked)).items()
    }
    attempts = await store.hmget(keys.deliveries, list(heads)) if heads else []
    return [
        Lease(job, tag, fence.rpartition(":")[0], int(count or 0))
        for (tag, (_, fence, job)), count in zip(heads.items(), attempts, strict=True)
    ]


def _is_complaint(line: str) -> bool:
    return " ERROR " in line or "Traceback" in line or "[ERROR]" in line


def _tail(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-6:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
