"""Content addresses: a hash chain over the blocks of a token sequence.

The hash of a block covers its tokens, every token before it and the salt (the engine's fingerprint), so
equal hashes mean equal KV: same tokens at the same positions in the same model. Tokens of an image, whose
ids are negative, see those after them in the image: a block that ends within one is hashed with all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Grow:
    """An int32 array with amortised O(1) append. Views taken before an append stay valid."""

    __slots__ = ("_buffer", "_length")

    def __init__(self, values: Sequence[int] | NDArray[np.int32] = ()) -> None:
        self._length = len(values)
        self._buffer: NDArray[np.int32] = np.empty(max(16, 2 * self._length), np.int32)
        self._buffer[: self._length] = values

    def __len__(self) -> int:
        return self._length

    def append(self, value: int) -> None:
        if self._length == len(self._buffer):
            self._buffer = np.concatenate((self._buffer, np.empty_like(self._buffer)))
        self._buffer[self._length] = value
        self._length += 1

    def view(self, first: int = 0, last: int | None = None) -> NDArray[np.int32]:
        """Elements first .. last - 1, without a copy."""
        if last is None or last > self._length:
            last = self._length
        return self._buffer[first:last]


class TokenChain:
    """The tokens of one sequence and the hash of each of its full blocks.

    `salt` must change whenever equal tokens would no longer mean equal KV.
    """

    __slots__ = ("_tokens", "block_tokens", "hashes", "length", "salt")
    # Used for each sequence in each step, so it keeps its tokens itself, as `Grow` would.

    def __init__(self, salt: bytes, block_tokens: int, tokens: Sequence[int] | NDArray[np.int32]) -> None:
        self.salt = hashlib.blake2b(salt, digest_size=16).digest()
        self.block_tokens = block_tokens
        self.length = len(tokens)
        """What `len` gives, without a call."""
        self._tokens: NDArray[np.int32] = np.empty(max(16, 2 * self.length), np.int32)
        self._tokens[: self.length] = tokens
        self.hashes: list[bytes] = []
        """By logical block; full blocks only."""
        self._hash_full_blocks()

    def __len__(self) -> int:
        return self.length

    def append(self, token: int) -> None:
        length = self.length
        if length == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.empty_like(self._tokens)))
        self._tokens[length] = token
        self.length = length + 1
        if not self.length % self.block_tokens:
            self._hash_full_blocks()

    def tokens(self, first: int = 0, last: int | None = None) -> NDArray[np.int32]:
        """Tokens at positions first .. last - 1, without a copy; the view stays valid."""
        if last is None or last > self.length:
            last = self.length
        return self._tokens[first:last]

    def coming(self) -> NDArray[np.int32]:
        """The token that the next `append` will add, [1], to be read after it."""
        if self.length == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.empty_like(self._tokens)))
        return self._tokens[self.length : self.length + 1]

    def parent(self, block: int) -> bytes:
        """The hash before logical block `block`: its parent's, or the salt's for block 0."""
        return self.hashes[block - 1] if block else self.salt

    def shared_blocks(self, other: TokenChain) -> int:
        """Number of leading full blocks that are the same in both, by bisection: O(log n)."""
        low, high = 0, min(len(self.hashes), len(other.hashes))
        while low < high:
            middle = (low + high + 1) // 2
            if self.hashes[middle - 1] == other.hashes[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low

    def _hash_full_blocks(self) -> None:
        size = self.block_tokens
        for block in range(len(self.hashes), self.length // size):
            end = (block + 1) * size
            while end < self.length and self._tokens[end - 1] < 0 and self._tokens[end] < 0:
                end += 1
            content = self._tokens[block * size : end].astype("<i4", copy=False).tobytes()
            self.hashes.append(hashlib.blake2b(self.parent(block) + content, digest_size=16).digest())
