"""What durability costs, and what it gives: `python -m benchmarks.durability`, one JSON line a measurement.

Cost: jobs a second of a saturated worker that writes, fences and numbers every token, against one that only
publishes them, in turns. Recovery: seconds from the end of a worker to the next token of each of its
sixteen streams, seen by a listener; what died, and how the other worker could know, vary.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

from redis import Redis

from wicore.bench.processes import Line, Setting, embedded_redis, service_process
from wicore.bench.service import saturated
from wicore.config import load_settings
from wicore.queue.connection import connect
from wicore.queue.producer import Producer
from wicore.queue.registry import alive_workers
from wicore.request import Priority, parse_job
from wicore.stream.relay import Relay

SEEN_TOKENS = 20
"""Of each stream, before the worker dies."""


def cost(setting: Setting, jobs: int, rounds: int) -> Line:
    """Median of the rounds' ratios, both workers measured in each round."""
    durable, forgetful = [], []
    for _ in range(rounds):
        durable.append(float(str(saturated(setting, jobs)["jobs_s"])))
        forgetful.append(float(str(saturated(setting, jobs, "benchmarks.fire_and_forget")["jobs_s"])))
    ratios = [a / b for a, b in zip(durable, forgetful, strict=True)]
    return {
        "measurement": "cost of durability",
        "durable_jobs_s": durable,
        "fire_and_forget_jobs_s": forgetful,
        "ideal_jobs_s": setting.ideal_jobs_s,
        "cost_median": round(1 - statistics.median(ratios), 3),
        "rounds": rounds,
        **setting.describe(),
    }


def recovery(setting: Setting, name: str, lease_s: float, signum: signal.Signals, *, lifelines: bool) -> Line:
    """`lifelines`: whether workers may look at each other's connections (else leases alone decide)."""
    with ExitStack() as stack:
        admin = stack.enter_context(embedded_redis())
        url = admin if lifelines else _without_client_list(admin)

        def start_worker() -> None:
            settings = {"queue__lease_s": lease_s, "hmt__device_tokens": 2**16}
            stack.enter_context(service_process(setting, url, "workers.gpu", **settings))

        client = connect(admin)
        producer = Producer(client)
        start_worker()
        first = _workers(client, 1)[0]
        body = parse_job(
            {"kind": "completion", "prompt": "Once", "max_tokens": setting.tokens, "ignore_eos": True}
        )
        jobs = [producer.submit(body, Priority.INTERACTIVE).id for _ in range(setting.slots)]
        streams = [_Stream(client, job) for job in jobs]
        for stream in streams:
            stream.wait(SEEN_TOKENS)
        start_worker()
        _workers(client, 2)
        died = time.monotonic()
        os.kill(int(first["pid"]), signum)
        waits = sorted(stream.resumed(died) for stream in streams)
        faults = sum(stream.faults for stream in streams)
        os.kill(int(first["pid"]), signal.SIGKILL)
        for stream in streams:
            producer.cancel(stream.job)
    return {
        "measurement": f"recovery: {name}",
        "lease_s": lease_s,
        "streams": len(waits),
        "first_stream_s": round(waits[0], 2),
        "median_stream_s": round(statistics.median(waits), 2),
        "last_stream_s": round(waits[-1], 2),
        "gaps_or_repeats": faults,
        **setting.describe(),
    }


class _Stream:
    """A listener of one job, on a thread: when its events came, and whether their numbers were right."""

    def __init__(self, client: Redis, job: str) -> None:
        self.job = job
        self.faults = 0
        self._seen = 0
        self._resumed_s: float | None = None
        self._changed = threading.Condition()
        self._relay = Relay(client)
        threading.Thread(target=self._listen, daemon=True).start()

    def wait(self, seq: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._seen >= seq)

    def resumed(self, since: float) -> float:
        """Seconds from `since` to the first token of the next attempt."""
        with self._changed:
            self._changed.wait_for(lambda: self._resumed_s is not None)
            assert self._resumed_s is not None
            return self._resumed_s - since

    def _listen(self) -> None:
        again = False
        for batch in self._relay.follow(self.job):
            with self._changed:
                for event in batch:
                    self.faults += event["seq"] != self._seen + 1
                    self._seen = event["seq"]
                    if again and event["type"] == "token" and self._resumed_s is None:
                        self._resumed_s = time.monotonic()
                    again = again or event["type"] == "resumed"
                self._changed.notify_all()
        self._relay.close()


def _workers(client: Redis, count: int) -> list[dict[str, object]]:
    while len(workers := alive_workers(client)) < count:
        time.sleep(0.05)
    return workers


def _without_client_list(url: str) -> str:
    """The server for a user that may not look at connections, as on many managed services."""
    rights = ("on", "nopass", "~*", "&*", "+@all", "-client|list")
    connect(url).execute_command("ACL", "SETUSER", "worker", *rights)
    return url.replace("unix://", "unix://worker@", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=400, help="of each run of the cost")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    setting = Setting(model=load_settings().model.path, tokens=100)
    print(json.dumps(cost(setting, options.jobs, options.rounds)), flush=True)
    # Steps shorter than any large model's, in which the host has no time to hide anything.
    print(json.dumps(cost(replace(setting, step_ms=1.0), 2 * options.jobs, options.rounds)), flush=True)
    long = replace(setting, tokens=3000)
    kill, stop = signal.SIGKILL, signal.SIGSTOP
    for name, lease_s, signum, lifelines in (
        ("kill -9, connection gone", 20.0, kill, True),
        ("kill -9, leases alone", 20.0, kill, False),
        ("kill -9, leases alone", 3.0, kill, False),
        ("hung (SIGSTOP)", 3.0, stop, True),
    ):
        print(json.dumps(recovery(long, name, lease_s, signum, lifelines=lifelines)), flush=True)


if __name__ == "__main__":
    main()
