"""What fields of bodies are made of, whatever the body. Pure."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _encodable(value: str) -> str:
    # JSON can carry lone surrogates ("\ud800"), which no UTF-8 consumer downstream could.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return value


def _encodable_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        _encodable(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Number = Annotated[float, AfterValidator(_finite)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_encodable_json)]


class Strict(BaseModel):
    """A body that takes no field it does not know, and no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
