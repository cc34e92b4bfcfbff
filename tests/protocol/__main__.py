"""The command line."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

from tests.protocol.checker import Checker, Report, Violation
from tests.protocol.states import WORLDS
from wicore.queue.connection import connect
from wicore.queue.embedded import EmbeddedValkey


def main() -> int:
    parser = argparse.ArgumentParser(description="Try every order of calls on the queue.")
    parser.add_argument("--depth", type=int, default=8, help="calls in a row (default: 8)")
    parser.add_argument("--world", choices=WORLDS, action="append", help="may be repeated (default: all)")
    parser.add_argument(
        "--drain-every", type=int, default=1, help="bring one new state in so many to its end"
    )
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="wicore-") as folder,
        EmbeddedValkey(folder, appendonly=False) as server,
    ):
        client = connect(server.url)
        for name in options.world or WORLDS:
            started = time.monotonic()

            def show(report: Report, name: str = name, started: float = started) -> None:
                print(f"{name}: {report} in {time.monotonic() - started:.1f} s", flush=True)

            checker = Checker(client, WORLDS[name], options.drain_every)
            try:
                checker.explore(options.depth, show)
            except Violation as err:
                print(f"{name}: {err}")
                return 1
            finally:
                checker.close()
        client.close()
    return 0


sys.exit(main())
