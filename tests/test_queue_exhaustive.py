"""Every order of a few calls keeps the queue's rules; and the search that says so finds what is broken."""

from __future__ import annotations

import hashlib

import pytest
import redis

from tests.protocol.checker import Checker, Violation
from tests.protocol.states import WORLDS
from wicore.queue import scripts

pytestmark = pytest.mark.valkey


def explore(client: redis.Redis, world: str, depth: int, drain_every: int) -> int:
    checker = Checker(client, WORLDS[world], drain_every)
    try:
        return checker.explore(depth).states
    finally:
        checker.close()


@pytest.mark.parametrize(
    ("world", "depth", "least_states"),
    [("one", 7, 700), ("late", 5, 300), ("foreign", 6, 600), ("two", 4, 280), ("suspect", 2, 100)],
)
def test_every_order_of_calls_keeps_the_rules(
    redis_client: redis.Redis, world: str, depth: int, least_states: int
) -> None:
    assert explore(redis_client, world, depth, drain_every=5) >= least_states


@pytest.mark.parametrize(
    ("script", "sound", "broken", "last_step"),
    [
        ("append", "if record.fence ~= fence then", "if false then", "wA (j1 wA:1, stale) appends"),
        ("hand_back", "redis.call('HDEL', K.job .. id, 'fence')", "", "wA (j1 wA:1) hands back"),
        ("reap", "join_suspects(id, raw)\n", "\n", "all leases run out, another worker does the rest"),
    ],
)
def test_a_broken_script_is_found_with_the_shortest_way_to_it(
    redis_client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    sound: str,
    broken: str,
    last_step: str,
) -> None:
    genuine = scripts._text

    def text(header: str, name: str) -> tuple[str, str]:
        lua, digest = genuine(header, name)
        if name == script:
            assert sound in lua
            lua = lua.replace(sound, broken)
            digest = hashlib.sha1(lua.encode()).hexdigest()
        return lua, digest

    monkeypatch.setattr(scripts, "_text", text)
    with pytest.raises(Violation) as caught:
        explore(redis_client, "one", depth=6, drain_every=1)
    assert caught.value.trace[:2] == ("send j1", "wA pops 1")
    assert caught.value.trace[-1] == last_step
    assert len(caught.value.trace) <= 5
