"""The rows of images that a worker keeps: those used last, in so many bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.vision import RowCache

USES = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), max_size=40)


@given(limit=st.integers(0, 12), uses=USES)
def test_what_was_used_last_is_kept_in_so_many_bytes(limit: int, uses: list[tuple[int, int]]) -> None:
    """Against a list, the least recently used first; the sizes are of four bytes."""
    cache, kept, sizes = RowCache(4 * limit), [], {}
    for name, size in uses:
        sizes.setdefault(name, size)
        found = cache.get(bytes([name]))
        assert (found is not None) == (name in kept)
        if name in kept:
            kept.remove(name)
        elif sizes[name] > limit:
            cache.put(bytes([name]), np.zeros(sizes[name], np.float32))
            continue
        cache.put(bytes([name]), np.zeros(sizes[name], np.float32))
        kept.append(name)
        while sum(sizes[one] for one in kept) > limit:
            kept.pop(0)
        assert cache.bytes == 4 * sum(sizes[one] for one in kept)
