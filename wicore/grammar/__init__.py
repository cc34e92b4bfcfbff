"""What form an output must have: a `Grammar` says it, pure; `compiler.py` turns it into masks of tokens."""

from wicore.grammar.grammar import (
    Grammar,
    grammar_of,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    parts_of,
)

__all__ = ["Grammar", "grammar_of", "json_object_grammar", "json_schema_grammar", "lark_grammar", "parts_of"]
