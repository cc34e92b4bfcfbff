"""What fields of bodies are made of, whatever the body. Pure."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _encodable(value: str) -> str:
    # JSON can carry lone surrogates ("\ud800"), which no UTF-8 consumer downstream could.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return value


def _bounded_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise ValueError(f"must nest objects and arrays at most {MAX_SCHEMA_DEPTH} deep")
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    except (TypeError, ValueError):
        raise ValueError("must be JSON, without NaN or infinite numbers") from None
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"must be at most {MAX_SCHEMA_BYTES} bytes of JSON, not {size}")
    return schema


def _depth(value: Any) -> int:
    """How deep objects and arrays nest in a JSON value, counted no further than just over the limit."""
    depth, level = 0, [value]
    while level and depth <= MAX_SCHEMA_DEPTH:
        inner = [part for part in level if isinstance(part, dict | list)]
        level = [part for outer in inner for part in (outer.values() if isinstance(outer, dict) else outer)]
        depth += 1 if inner else 0
    return depth


MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_BYTES = 128 * 1024

Text = Annotated[str, AfterValidator(_encodable)]
Number = Annotated[float, Field(allow_inf_nan=False)]
JsonSchema = Annotated[dict[str, Any], AfterValidator(_bounded_schema)]
"""A JSON schema from a stranger: small enough to be walked and stored. What it says is not checked."""


class Strict(BaseModel):
    """A body that takes no field it does not know, and no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
