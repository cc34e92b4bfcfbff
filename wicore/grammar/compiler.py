"""From grammars to masks over a vocabulary.

A token is its UTF-8 bytes, perhaps part of a character; control pieces and the rows that pad a model's table
have none, and no grammar ever allows them. Where the output may end, the tokens that end the job's text are
allowed besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from wicore.errors import WicoreError
from wicore.grammar.grammar import Grammar
from wicore.grammar.library import matcher_of, refusal
from wicore.text.tokenizer import Tokenizer

_CACHED = 128
"""Compiled grammars kept: from tens of kilobytes to some megabytes each."""


class Compiler:
    """Compiles grammars for one vocabulary, each once while it is in use. Thread-safe.

    Making one takes about a second for 262,144 tokens, and holds the interpreter.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: tokens that a row of logits has; those beyond the tokenizer's are never allowed."""
        self._vocab_size = vocab_size
        self._eos = tokenizer.eos
        self._tokens = LLTokenizer(
            TokenizerWrapper(_Pieces(tokenizer, vocab_size)),
            n_vocab=vocab_size,
            eos_token=tokenizer.eos,
            slices=LLTokenizer.json_slices(),
        )
        self._compiled = lru_cache(_CACHED)(self._compile)

    def constraint(self, grammar: Grammar, stop_ids: Iterable[int]) -> GrammarConstraint:
        """What one output may be, from its beginning; it ends with one of `stop_ids`.

        Raises InvalidRequest, naming the field, for a grammar that cannot be honoured.
        """
        matcher = self._compiled(grammar).deep_copy()
        return GrammarConstraint(grammar, matcher, self._vocab_size, self._eos, sorted(stop_ids))

    def _compile(self, grammar: Grammar) -> LLMatcher:
        return matcher_of(grammar, self._tokens)


class GrammarConstraint:
    """`wicore.sampling.Constraint` of one output. Not thread-safe, but for any one thread at a time."""

    def __init__(
        self, grammar: Grammar, matcher: LLMatcher, vocab_size: int, eos: int, stop_ids: Sequence[int]
    ) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._eos = eos
        self._ends = np.zeros(-(-vocab_size // 32), np.uint32)
        for token in stop_ids:
            self._ends[token // 32] |= np.uint32(1 << token % 32)
        self._stop_ids = frozenset(stop_ids)
        self._mask = np.empty_like(self._ends)
        self._known = False
        """Whether the mask is that of the next token."""
        self.error: WicoreError | None = None

    @property
    def complete(self) -> bool:
        return self.error is None and bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.uint32]:
        if not self._known:
            self._find_mask()
            self._known = True
        return self._mask

    def observe(self, token: int) -> None:
        self._known = False
        if self.error is not None or token in self._stop_ids:
            return
        if not self._matcher.consume_token(token):
            self._fail()

    def _find_mask(self) -> None:
        if self.error is None and not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            word, bit = self._eos // 32, np.uint32(1 << self._eos % 32)
            may_end = bool(self._mask[word] & bit)
            self._mask[word] &= ~bit
            if may_end:
                self._mask |= self._ends
            if not self._matcher.is_error() and self._mask.any():
                return
            self._fail()
        self._mask[:] = self._ends

    def _fail(self) -> None:
        self.error = refusal(self._grammar, self._matcher.get_error() or "no token can follow")


class _Pieces:
    """The vocabulary in the form that `TokenizerWrapper` takes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        self.tokens = [tokenizer.piece_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = [token for token, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, bos=False)
