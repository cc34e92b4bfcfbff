"""A worker that only publishes its events, with no log and no fence: what durability is measured against.

`python -m benchmarks.fire_and_forget` is `python -m workers.gpu` with this one difference.
"""

from __future__ import annotations

import sys
from typing import Any

from redis import Redis

from wicore.queue.schema import Keys
from wicore.queue.scripts import Call
from wicore.stream.publisher import Publisher
from workers import gpu, worker


class FireAndForget(Publisher):
    """PUBLISH for each event, all of a batch in one pipeline; a job's end is stored as ever."""

    def __init__(self, client: Redis, prefix: str, *args: Any, **options: Any) -> None:
        super().__init__(client, prefix, *args, **options)
        self._client = client
        self._keys = Keys(prefix)

    def _send(self, calls: list[Call]) -> list[Any]:
        ends: list[Call] = []
        with self._client.pipeline(transaction=False) as pipe:
            for name, args in calls:
                if name == "append":
                    for text in args[5:]:
                        pipe.publish(self._keys.events(str(args[0])), text)
                else:
                    # Without a log the event has no number; the script makes one.
                    ends.append((name, [*args[:3], "", "", *args[5:]]))
            if pipe:
                pipe.execute()
        replies = iter(self._scripts.call_many(ends) if ends else ())
        return [1 if name == "append" else next(replies) for name, _ in calls]


if __name__ == "__main__":
    worker.Publisher = FireAndForget  # type: ignore[misc]
    sys.exit(gpu.main())
