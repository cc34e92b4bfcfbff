"""OpenAI's doors: their request bodies to jobs, and results and events to their responses. Pure."""

from wicore.openai.requests import OpenAIRequest, chat_request, completion_request
from wicore.openai.responses import (
    ChoiceResult,
    ChunkWriter,
    completion_id,
    logprob_entry,
    merged,
    result_object,
    summed_usage,
)

__all__ = [
    "ChoiceResult",
    "ChunkWriter",
    "OpenAIRequest",
    "chat_request",
    "completion_id",
    "completion_request",
    "logprob_entry",
    "merged",
    "result_object",
    "summed_usage",
]
