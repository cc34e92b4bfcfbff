"""llguidance, as WiCore uses it: which options, which bounds, and what is said when it declines.

The library parses output by an Earley parser over lexemes whose automata are built as they are needed, so
that compiling takes about a millisecond and a mask some microseconds, whatever the vocabulary
(docs/structured-output.md has the figures). It refuses what it cannot honour instead of passing over it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from wicore.errors import InvalidRequest
from wicore.grammar.grammar import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_OPTIONS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": None,
    "json_allow_general_unicode_escapes": False,
}
"""All of them, so that `x-guidance` in a schema changes none."""
_MESSAGE = 300


def limits() -> LLParserLimits:
    """Bounds of what a compilation and a mask may take. The library's own, but for errors: its report of the
    parser's state would hold the client's schema and text. More than 2,000 alternatives at one place end in
    an error."""
    return LLParserLimits(verbose_errors=False, max_grammar_size=100_000)


def matcher_of(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """Compile. Raises InvalidRequest, naming the field, for what cannot be honoured. Lets go of the
    interpreter while it works."""
    try:
        if grammar.kind == "lark":
            text = LLMatcher.grammar_from_lark(grammar.text)
        else:
            text = LLMatcher.grammar_from_json_schema(grammar.text, overrides=_OPTIONS)
    except ValueError as err:
        raise refusal(grammar, str(err)) from None
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits())
    if matcher.is_error():
        raise refusal(grammar, matcher.get_error())
    return matcher


def refusal(grammar: Grammar, why: str) -> InvalidRequest:
    """The error for a grammar that cannot be honoured."""
    return InvalidRequest(f"{grammar.param}: {reason(why)}", param=grammar.param)


def reason(why: str) -> str:
    """What the library says, in a sentence that follows a field's name."""
    why = why.replace("<non-verbose/>", "").strip()
    return "cannot be honoured: " + (why if len(why) <= _MESSAGE else why[:_MESSAGE] + "...")
