"""JSON schemas made at random, of the kinds that clients send: what structured output is measured with.

Every schema is valid, has an instance, and bounds every string, array and number of digits, but not the depth
of recursion, so that an answer at temperature 1 ends: a model that was not taught to answer in JSON goes on
with a number or an e-mail address as long as it may.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]

KEYS = ["name", "größe", "価格", "city", "état", "n_1", "クラス", "tags", "id", "🌍", "with space", 'quo"te']
WORDS = ["red", "grün", "青い", "a b", "", "x/y", "tab\t", "naïve", "🙂", 'say "hi"', "back\\slash"]
PATTERNS = [
    r"^[A-Z][a-z]{2,8}$",
    r"^\d{4}-\d{2}$",
    r"^(foo|bar|baz)+$",
    r"^[^@\s]{1,8}@[a-z]{1,8}\.(com|org)$",
    r"^#[0-9a-f]{6}$",
    r"^\w{1,6}$",
    r"^[ぁ-ん]{1,5}$",
    r"^v\d+(\.\d+){0,2}$",
]
FORMATS = ["date", "date-time", "time", "uuid", "email", "ipv4", "hostname"]


def schemas(count: int, seed: int = 0) -> Iterator[Schema]:
    """`count` schemas, each an object at its top: the same for the same seed, whatever the count."""
    for index in range(count):
        yield Maker(random.Random(f"{seed}/{index}")).top()


class Maker:
    """Makes one schema."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._defs: Schema = {}

    def top(self) -> Schema:
        schema = self._object(3)
        if self._defs:
            schema["$defs"] = self._defs
        return schema

    def value(self, depth: int) -> Schema:
        rng = self._rng
        leaves: list[Callable[[], Schema]] = [
            self._string,
            self._pattern,
            self._integer,
            self._number,
            self._enum,
            self._const,
            lambda: {"type": rng.choice(["boolean", "null"])},
            lambda: {"type": "string", "format": rng.choice(FORMATS), "maxLength": 40},
        ]
        inner: list[Callable[[], Schema]] = [
            lambda: self._object(depth - 1),
            lambda: self._array(depth - 1),
            lambda: {"anyOf": [self.value(depth - 1) for _ in range(rng.randint(2, 3))]},
            lambda: self._nullable(depth - 1),
            lambda: self._reference(depth - 1),
            self._recursive,
            self._tagged,
        ]
        return rng.choice(leaves if depth <= 0 or rng.random() < 0.5 else inner)()

    def _object(self, depth: int) -> Schema:
        rng = self._rng
        keys = rng.sample(KEYS, rng.randint(1, 5))
        return {
            "type": "object",
            "properties": {key: self.value(depth) for key in keys},
            "required": [key for key in keys if rng.random() < 0.6],
            "additionalProperties": False,
        }

    def _array(self, depth: int) -> Schema:
        rng = self._rng
        least = rng.randint(0, 3)
        schema: Schema = {"type": "array", "items": self.value(depth), "minItems": least}
        if rng.random() < 0.2:
            schema["prefixItems"] = [self.value(0), self.value(0)]
        return {**schema, "maxItems": least + rng.randint(1, 3)}

    def _string(self) -> Schema:
        least = self._rng.choice([0, 0, 1, 5])
        return {"type": "string", "minLength": least, "maxLength": least + self._rng.randint(0, 20)}

    def _pattern(self) -> Schema:
        return {"type": "string", "pattern": self._rng.choice(PATTERNS), "maxLength": 24}

    def _integer(self) -> Schema:
        rng = self._rng
        least = rng.randint(-1000, 1000)
        schema: Schema = {"type": "integer", "minimum": least, "maximum": least + rng.randint(10, 100_000)}
        if rng.random() < 0.3:
            schema["multipleOf"] = rng.choice([2, 5, 10])
        return schema

    def _number(self) -> Schema:
        rng = self._rng
        low = round(rng.uniform(-100, 100), 2)
        least, most = rng.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
        bounds = {least: low, most: round(low + rng.uniform(1, 50), 2)}
        # Exact in binary, so that the validator divides without a rest.
        return {"type": "number", **bounds, "multipleOf": rng.choice([0.5, 0.25, 0.125])}

    def _enum(self) -> Schema:
        values: list[Any] = [*self._rng.sample(WORDS, 3), self._rng.randint(-9, 9), None, True]
        return {"enum": self._rng.sample(values, self._rng.randint(1, 5))}

    def _const(self) -> Schema:
        return {"const": self._rng.choice([*WORDS, 0, -1.5, None, {"k": ["ö", 1]}, [], {}])}

    def _nullable(self, depth: int) -> Schema:
        return {"anyOf": [self.value(depth), {"type": "null"}]}

    def _reference(self, depth: int) -> Schema:
        name = f"part{len(self._defs)}"
        self._defs[name] = {}
        self._defs[name] = self.value(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _recursive(self) -> Schema:
        """A list or a tree; where it goes on is up to the model, and short branches are likelier."""
        name = f"node{len(self._defs)}"
        again = {"$ref": f"#/$defs/{name}"}
        if self._rng.random() < 0.5:
            more: Schema = {"anyOf": [{"type": "null"}, again]}
        else:
            more = {"type": "array", "items": again, "maxItems": 1}
        self._defs[name] = {
            "type": "object",
            "properties": {"value": self._enum(), "next": more},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        return again

    def _tagged(self) -> Schema:
        """Two kinds of object that a tag tells apart."""
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "of": self.value(0)},
                    "required": ["kind", "of"],
                    "additionalProperties": False,
                }
                for kind in ("circle", "carré")
            ]
        }
