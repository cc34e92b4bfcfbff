"""OpenAI's Responses API: its request bodies to jobs, and records and events to its responses. Pure."""

from wicore.openai.responses_api.events import EventWriter
from wicore.openai.responses_api.items import Item, numbered
from wicore.openai.responses_api.request import (
    LOGPROBS,
    NEUTRAL,
    ResponseBody,
    ResponseRequest,
    Stored,
    own_words,
    response_request,
)
from wicore.openai.responses_api.response import (
    PREFIX,
    output_items,
    response_id,
    response_of,
    response_usage,
)

__all__ = [
    "LOGPROBS",
    "NEUTRAL",
    "PREFIX",
    "EventWriter",
    "Item",
    "ResponseBody",
    "ResponseRequest",
    "Stored",
    "numbered",
    "output_items",
    "own_words",
    "response_id",
    "response_of",
    "response_request",
    "response_usage",
]
