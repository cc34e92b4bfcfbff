"""Incremental detokenisation: which text is certain after each token.

Two things can make the newest text uncertain: a token may hold part of a UTF-8 character, and its
text may begin a stop string. Both wait until later tokens decide. Stop strings are searched as
Knuth, Morris and Pratt (1977) do, character by character, so that neither the result nor the cost
depends on how the text is cut into tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from wicore.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one choice, token by token.

    What `push` and then `flush` return, joined, is `tokenizer.decode` of all ids, or with a stop
    string found, the text before it. Cost is O(stop strings) a character, whatever came before.

    Attributes:
        stopped: a stop string was found; later tokens add nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """`stop` strings are not empty. The one that ends first in the text wins."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_Matcher(pattern) for pattern in stop]
        self._held = ""
        """The end of the text so far that may turn out to begin a stop string."""

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is now certain and not yet returned."""
        return self._add(self._characters.decode(self._tokenizer.piece_bytes(token_id)))

    def flush(self) -> str:
        """The text held back; call once, after the last token."""
        text = self._add(self._characters.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _add(self, text: str) -> str:
        if self.stopped:
            return ""
        known = self._held + text
        for end in range(len(self._held) + 1, len(known) + 1):
            found = [m.length for m in self._matchers if m.advance(known[end - 1])]
            if found:
                self.stopped = True
                self._held = ""
                return known[: end - max(found)]
        certain = len(known) - max((matcher.matched for matcher in self._matchers), default=0)
        self._held = known[certain:]
        return known[:certain]


class _Matcher:
    """Finds one pattern in a stream of characters.

    Attributes:
        matched: length of the longest prefix of the pattern that the stream now ends with.
    """

    def __init__(self, pattern: str) -> None:
        self.length = len(pattern)
        self.matched = 0
        self._pattern = pattern
        self._borders = _borders(pattern)

    def advance(self, character: str) -> bool:
        """Take the next character; whether the pattern is now complete (then do not go on)."""
        while self.matched and self._pattern[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        if self._pattern[self.matched] == character:
            self.matched += 1
        return self.matched == self.length


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        borders[i] = length
    return borders
