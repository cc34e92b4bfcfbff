"""Block pools, eviction order, prefix matching and block tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore.config import load_settings
from wicore.engine.base import KVLayout
from wicore.engine.sizing import kv_layout, tier_sizes
from wicore.errors import ConfigError, EngineError, TooLarge
from wicore.gemma3.config import PUBLISHED
from wicore.hmt import LRU, BlockPool, CacheManager, TierSizes, TokenChain
from wicore.hmt.tiers import check_sizes

BLOCK = 4


def manager(blocks=32, window_blocks=None, window=10, **options) -> CacheManager:
    layout = KVLayout(BLOCK, 1, 1, 1, 1, window, "float32")
    sizes = TierSizes({"global": blocks, "window": window_blocks or blocks})
    return CacheManager(layout, sizes, options.pop("salt", "model"), **options)


def serve(cache: CacheManager, key: int, tokens: list[int], step: int = 5) -> TokenChain:
    """Open a sequence and compute all of it, `step` positions at a time."""
    chain = cache.chain(tokens)
    match = cache.match(chain)
    assert cache.can_open(match, len(tokens))
    cache.open(key, chain, match, len(tokens))
    computed = cache.computed(key)
    while computed < len(tokens):
        computed = min(len(tokens), computed + step)
        assert cache.reserve(key, computed)
        cache.commit(key, computed)
        cache.check()
    return chain


def matched(cache: CacheManager, tokens: list[int]) -> int:
    return cache.match(cache.chain(tokens)).blocks * BLOCK


# --- the chain ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_two_chains_share_exactly_the_blocks_of_their_common_prefix(a, b):
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    assert TokenChain(b"s", BLOCK, a).shared_blocks(TokenChain(b"s", BLOCK, b)) == common // BLOCK


@given(st.lists(st.integers(0, 300_000), max_size=60), st.integers(0, 60))
def test_a_chain_that_grew_token_by_token_equals_one_made_at_once(tokens, cut):
    grown = TokenChain(b"s", BLOCK, tokens[:cut])
    views = [grown.tokens()]
    for token in tokens[cut:]:
        grown.append(token)
        views.append(grown.tokens())
    assert grown.hashes == TokenChain(b"s", BLOCK, tokens).hashes
    assert all(view.tolist() == tokens[: len(view)] for view in views)


IMAGES = st.lists(st.lists(st.sampled_from([-2, -1]), min_size=1, max_size=9), max_size=3)


def with_images(images: list[list[int]], text: int) -> tuple[list[int], list[list[int]]]:
    """Images with as much text before and after each, and by full block all that it may depend on."""
    tokens, ends = [7] * text, {}
    for ids in images:
        start, end = len(tokens), len(tokens) + len(ids)
        ends |= dict.fromkeys(range(start + 1, end), end)
        tokens += [*ids, *[7] * text]
    borders = range(BLOCK, len(tokens) + 1, BLOCK)
    return tokens, [tokens[: ends.get(border, border)] for border in borders]


@given(IMAGES, IMAGES, st.integers(1, 5))
def test_two_chains_share_a_block_that_ends_within_an_image_only_if_they_share_all_of_it(a, b, text):
    (first, seen), (second, seen_too) = with_images(a, text), with_images(b, text)
    shared = [x == y for x, y in zip(seen, seen_too, strict=False)]
    expected = shared.index(False) if False in shared else len(shared)
    assert TokenChain(b"s", BLOCK, first).shared_blocks(TokenChain(b"s", BLOCK, second)) == expected


def test_another_salt_gives_other_hashes():
    assert TokenChain(b"a", BLOCK, range(8)).hashes != TokenChain(b"b", BLOCK, range(8)).hashes


# --- the pool -----------------------------------------------------------------------------------------


def block_pool(blocks: int, name: str = "p", *, leaves_first: bool = True) -> BlockPool:
    return BlockPool(name, blocks, LRU, lambda: 0.0, leaves_first=leaves_first)


def cached_chain(pool: BlockPool, names: str) -> dict[str, int]:
    """Blocks that continue one another, named by one letter each, all cached."""
    blocks = {}
    for parent, name in zip("^" + names, names, strict=False):
        blocks[name] = pool.allocate()
        pool.register(blocks[name], name.encode(), parent.encode())
    for block in blocks.values():
        pool.release(block)
    return blocks


def test_free_blocks_go_before_cached_ones():
    pool = block_pool(4, "p", leaves_first=True)
    cached_chain(pool, "ab")
    pool.allocate()
    pool.allocate()
    assert pool.stats().evicted == 0
    assert pool.stats().cached == 2


def test_a_chain_is_evicted_from_its_end():
    pool = block_pool(3, "p", leaves_first=True)
    cached_chain(pool, "abc")
    order = []
    for _ in range(3):
        present = {n for n in "abc" if pool.lookup(n.encode()) is not None}
        pool.allocate()
        order += sorted(present - {n for n in "abc" if pool.lookup(n.encode()) is not None})
    assert order == ["c", "b", "a"]


def test_the_least_recently_used_chain_goes_first_to_its_root():
    pool = block_pool(4, "p", leaves_first=True)
    old = cached_chain(pool, "ab")
    cached_chain(pool, "xy")
    pool.allocate()
    pool.allocate()
    assert pool.lookup(b"a") is None
    assert pool.lookup(b"b") is None
    assert pool.lookup(b"x") is not None
    assert pool.lookup(b"y") is not None
    assert set(old.values()).isdisjoint({pool.lookup(b"x"), pool.lookup(b"y")})


def test_a_window_pool_evicts_the_oldest_whatever_continues_it():
    pool = block_pool(2, "p", leaves_first=False)
    cached_chain(pool, "ab")
    pool.allocate()
    assert pool.lookup(b"a") is None
    assert pool.lookup(b"b") is not None


def test_a_block_taken_up_again_is_used_and_not_evicted():
    pool = block_pool(2, "p", leaves_first=True)
    block = cached_chain(pool, "a")["a"]
    pool.acquire(block)
    pool.allocate()
    with pytest.raises(LookupError):
        pool.allocate()
    assert pool.lookup(b"a") == block


def test_the_second_block_of_equal_content_goes_free_after_use():
    pool = block_pool(2, "p", leaves_first=True)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"a", b"^")
    pool.register(second, b"a", b"^")
    pool.release(first)
    pool.release(second)
    assert pool.lookup(b"a") == first
    stats = pool.stats()
    assert (stats.free, stats.used, stats.cached) == (1, 0, 1)


def test_a_check_that_fails_says_the_numbers():
    pool = block_pool(3, "global", leaves_first=True)
    block = pool.allocate()
    with pytest.raises(EngineError, match=f"block {block} has 1 references, 0 held"):
        pool.check({})
    pool._free.pop()
    with pytest.raises(EngineError, match=r"free 1 \+ used 1 \+ cached 0 != total 3"):
        pool.check({block: 1})


# --- the manager --------------------------------------------------------------------------------------


def test_a_match_is_whole_blocks_and_leaves_a_token_to_compute():
    cache = manager()
    serve(cache, 1, list(range(18)))
    assert matched(cache, list(range(18))) == 16
    assert matched(cache, list(range(17))) == 16
    assert matched(cache, list(range(16))) == 12
    assert matched(cache, [*range(9), 99, *range(10, 18)]) == 8
    assert matched(cache, [99]) == 0


def test_blocks_can_be_matched_as_soon_as_they_are_committed_and_after_close():
    cache = manager(window=64)
    chain = cache.chain(list(range(20)))
    cache.open(1, chain, cache.match(chain), 20)
    cache.reserve(1, 20)
    assert matched(cache, list(range(20))) == 0
    cache.commit(1, 7)
    assert matched(cache, list(range(20))) == 4
    cache.commit(1, 12)
    assert matched(cache, list(range(20))) == 12
    cache.close(1)
    assert matched(cache, list(range(20))) == 12


def test_a_match_may_end_within_an_image_that_is_wholly_the_same():
    cache = manager()
    tokens, other = [1, 2, 3, *[-5] * 6, -6, 4, 5], [1, 2, 3, *[-5] * 6, -7, 4, 5]
    serve(cache, 1, tokens, step=10)
    assert matched(cache, [*tokens[:10], 8]) == 8
    assert matched(cache, tokens[:9]) == 0
    assert matched(cache, other) == 0


def test_a_match_needs_the_window_before_its_end():
    # The window pool keeps only the end of the first sequence, so a shorter prefix cannot be resumed.
    cache = manager(blocks=32, window_blocks=4, window=9)
    serve(cache, 1, list(range(40)), step=4)
    cache.close(1)
    assert matched(cache, list(range(40))) == 36
    assert matched(cache, [*range(12), 99]) == 0


def test_a_sequence_holds_only_its_window_of_the_window_pool():
    cache = manager(window=10)
    serve(cache, 1, list(range(60)), step=4)
    _, window_table, first, _ = cache.tables(1)
    assert first == (60 - 10 + 1) // BLOCK
    assert len(window_table) == 15 - first
    assert cache.stats.window_pool.used == 15 - first
    assert cache.stats.global_pool.used == 15


def test_reserve_takes_all_or_nothing_of_both_pools():
    cache = manager(blocks=8, window_blocks=5, window=30)
    chain = cache.chain([1])
    cache.open(1, chain, cache.match(chain), 1)
    before = cache.stats
    assert cache.room(1) == 20
    assert not cache.reserve(1, 21)
    assert cache.stats == before
    assert cache.reserve(1, 20)
    assert cache.stats.window_pool.used == 5


@pytest.mark.parametrize("pool", ["global", "window"])
def test_cached_blocks_of_the_match_are_not_counted_as_room_for_the_rest(pool):
    sizes = {"blocks": 10, "window_blocks": 10} if pool == "global" else {"blocks": 40, "window_blocks": 10}
    cache = manager(**sizes, window=200)
    serve(cache, 1, list(range(20)))
    cache.close(1)
    serve(cache, 2, [50] * 12)
    match = cache.match(cache.chain(list(range(20)) * 2))
    assert match.blocks == 5
    assert cache.can_open(match, 28)
    assert not cache.can_open(match, 28, spare=1)
    assert not cache.can_open(match, 29)
    assert cache.can_open(match, 40, closing=[2])


def test_what_the_match_shares_with_a_closing_sequence_is_not_counted_twice():
    cache = manager(blocks=8, window=200)
    serve(cache, 1, list(range(21)))
    match = cache.match(cache.chain([*range(20), 98, 99]))
    assert match.blocks == 5
    assert cache.can_open(match, 32, closing=[1])
    assert not cache.can_open(match, 33, closing=[1])


def test_without_a_prefix_cache_nothing_stays():
    cache = manager(prefix_cache=False)
    serve(cache, 1, list(range(20)))
    cache.close(1)
    assert matched(cache, list(range(20))) == 0
    assert cache.stats.global_pool.free == cache.stats.global_pool.total


def test_a_sequence_closed_without_caching_leaves_nothing_to_match():
    cache = manager()
    serve(cache, 1, list(range(20)))
    cache.close(1, cache=False)
    cache.check()
    assert matched(cache, list(range(20))) == 0
    assert cache.stats.global_pool.cached == cache.stats.window_pool.cached == 0


def test_tables_handed_out_do_not_change_while_the_sequence_grows():
    cache = manager(blocks=64, window=10)
    serve(cache, 1, list(range(30)))
    global_table, window_table, first, _ = cache.tables(1)
    copies = global_table.copy(), window_table.copy()
    chain = cache._open[1].chain
    for token in range(100):
        chain.append(token)
    cache.reserve(1, 130)
    cache.commit(1, 130)
    np.testing.assert_array_equal(global_table, copies[0])
    np.testing.assert_array_equal(window_table, copies[1])
    assert cache.tables(1).window_first > first


def test_another_model_never_matches():
    first, second = manager(salt="a"), manager(salt="b")
    chain = serve(first, 1, list(range(20)))
    assert set(chain.hashes).isdisjoint(second.chain(list(range(20))).hashes)


def test_a_sequence_of_128k_tokens_takes_what_its_global_layers_and_one_window_take():
    config = PUBLISHED["gemma-3-27b"]
    heads = (config.kv_heads, config.head_dim)
    layout = KVLayout(32, config.global_layers, config.window_layers, *heads, 1024, "float16")
    blocks = 131_072 // 32
    cache = CacheManager(layout, TierSizes({"global": blocks, "window": 200}), "27b", prefix_cache=False)
    chain = cache.chain(np.arange(131_072, dtype=np.int32))
    cache.open(1, chain, cache.match(chain), len(chain))
    for computed in range(2048, 131_073, 2048):
        assert cache.reserve(1, computed)
        cache.commit(1, computed)
    stats = cache.stats
    used = stats.global_pool.used * layout.block_bytes("global")
    used += stats.window_pool.used * layout.block_bytes("window")
    assert used == pytest.approx(11.2e9, rel=0.01)
    every_layer = blocks * (layout.block_bytes("global") + layout.block_bytes("window"))
    assert every_layer == pytest.approx(66.6e9, rel=0.01)


@pytest.mark.parametrize(
    ("host", "nvme", "words"),
    [
        (None, {"global": 9, "window": 9}, r"hmt\.host_bytes"),
        ({"global": 9, "window": 2}, None, r"2 window blocks, and one window takes 4"),
        ({"global": 0, "window": 0}, None, r"hmt\.host_bytes: leaves 0 window blocks"),
    ],
    ids=["a file without host memory", "less than a window", "less than a block"],
)
def test_tiers_that_cannot_work_are_refused_naming_the_setting(host, nvme, words):
    layout = KVLayout(BLOCK, 1, 1, 1, 1, 10, "float32")
    with pytest.raises(ConfigError, match=words):
        CacheManager(layout, TierSizes({"global": 8, "window": 8}, host, nvme), "model")


def test_pools_and_sequences_that_cannot_work_are_refused_naming_the_setting():
    with pytest.raises(ConfigError, match=r"hmt\.device_tokens"):
        manager(blocks=0, window_blocks=4)
    with pytest.raises(TooLarge, match=r"hmt\.device_tokens"):
        manager(blocks=4).require(17)
    manager(blocks=4).require(16)


def test_opening_a_key_twice_is_refused():
    cache = manager()
    chain = serve(cache, 1, [1, 2, 3])
    with pytest.raises(ValueError, match="open already"):
        cache.open(1, chain, cache.match(chain), 3)


def test_stats_tell_what_reuse_saved():
    cache = manager(window=100)
    serve(cache, 1, list(range(20)))
    serve(cache, 2, list(range(20)))
    assert (cache.stats.opened_tokens, cache.stats.matched_tokens) == (40, 16)


@settings(deadline=None)
@given(
    st.integers(3, 12),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30), st.booleans()), max_size=30),
)
def test_blocks_always_add_up(blocks, window, arrivals):
    cache = manager(blocks=blocks, window=window)
    open_keys: list[int] = []
    for key, (family, length, close_first) in enumerate(arrivals):
        if close_first and open_keys:
            cache.close(open_keys.pop(0))
        tokens = [family] * min(length, blocks * BLOCK)
        while not cache.can_open(cache.match(cache.chain(tokens)), len(tokens)):
            cache.close(open_keys.pop())
        chain = cache.chain(tokens)
        cache.open(key, chain, cache.match(chain), len(tokens))
        computed = cache.computed(key)
        open_keys.append(key)
        while computed < len(tokens) and cache.reserve(key, computed + 1):
            computed += 1
            cache.commit(key, computed)
        cache.check()
    for key in open_keys:
        cache.close(key)
    cache.check()
    assert cache.stats.global_pool.used == cache.stats.window_pool.used == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_default_settings_have_room_for_a_window_of_every_published_model(name):
    given = load_settings([], environ={})
    layout = kv_layout(given, PUBLISHED[name])
    check_sizes(layout, tier_sizes(given, layout))
