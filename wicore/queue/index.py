"""Pages of an index: a sorted set of ids by time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, cast

import redis

Order = Literal["asc", "desc"]
Place = tuple[int, str]
"""(score, id): a place in an index. Equal scores are in the order of their ids."""
Entry = TypeVar("Entry")


def ids_from(
    client: redis.Redis, index: str, after: Place | None, count: int, order: Order = "desc"
) -> list[Place]:
    """The next `count` places of an index after one; "desc" is newest first."""
    newest_first = order == "desc"
    if after is None:
        found = client.zrange(index, 0, count - 1, desc=newest_first, withscores=True)
    else:
        # Ties of `after` come along and are sorted out by id.
        most = count + client.zcount(index, after[0], after[0])
        end = "-inf" if newest_first else "+inf"
        found = client.zrange(
            index, after[0], end, desc=newest_first, byscore=True, offset=0, num=most, withscores=True
        )
    places = [(int(score), member.decode()) for member, score in cast("list[tuple[bytes, float]]", found)]
    if after is not None:
        places = [place for place in places if (place < after if newest_first else place > after)]
    return places[:count]


def page_from(
    client: redis.Redis,
    index: str,
    after: Place | None,
    count: int,
    order: Order,
    load: Callable[[list[str]], list[Entry]],
) -> list[Entry]:
    """`count` entries, or all that are left; `load` leaves out those that are gone, or not wanted."""
    page: list[Entry] = []
    while len(page) < count:
        places = ids_from(client, index, after, count - len(page), order)
        if not places:
            break
        after = places[-1]
        page += load([name for _, name in places])
    return page
