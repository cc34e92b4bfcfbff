"""From the body of a job to what an engine is given: prompt ids, length limit, stop ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wicore.errors import InvalidRequest, TooLarge
from wicore.gemma3.config import Gemma3Config
from wicore.request import JobBody
from wicore.text.calls import preamble
from wicore.text.images import ImageLimits, shown_images
from wicore.text.template import PromptImage, chat_turns, render
from wicore.text.tokenizer import Tokenizer

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A job, ready to run."""

    token_ids: list[int]
    """Those of images are negative: they name content (`wicore.vision.identity`)."""
    max_tokens: int
    """Tokens to generate at most; prompt and these fit the context together."""
    stop_ids: frozenset[int]
    """Tokens that end the text and are not part of it; empty when the job ignores them."""
    images: tuple[PromptImage, ...] = ()
    """By position."""


def prepare(
    body: JobBody,
    tokenizer: Tokenizer,
    config: Gemma3Config,
    context: int | None = None,
    limits: ImageLimits | None = None,
) -> Prompt:
    """Tokenise and bound a job. Pure.

    `context` is the longest sequence served, in tokens; None: the model's. A body with images needs a model
    that takes them. Raises InvalidRequest for a token id outside of the vocabulary, a chat whose roles do not
    alternate or what is no image, TooLarge when images exceed `limits`, or the prompt, or prompt and
    max_tokens, the context.
    """
    limit = config.max_context if context is None else min(context, config.max_context)
    _check_ids(body.logit_bias, config.vocab_size, "logit_bias")
    token_ids, images = prompt_ids(body, tokenizer, config, limit, limits)
    room = limit - len(token_ids)
    if room < 1:
        field = _field(body)
        raise TooLarge(
            f"{field}: {len(token_ids)} tokens leave no room for an answer in the context of {limit}; "
            "shorten it",
            param=field,
        )
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = room if body.kind == "chat" else min(COMPLETION_MAX_TOKENS, room)
    if max_tokens > room:
        raise TooLarge(
            f"max_tokens: {len(token_ids)} prompt tokens and max_tokens {max_tokens} make "
            f"{len(token_ids) + max_tokens}, over the context of {limit}; ask for at most {room}",
            param="max_tokens",
        )
    stop_ids = frozenset() if body.ignore_eos else _stop_ids(body, tokenizer, config)
    return Prompt(token_ids, max_tokens, stop_ids, tuple(images))


def prompt_ids(
    body: JobBody,
    tokenizer: Tokenizer,
    config: Gemma3Config,
    limit: int,
    limits: ImageLimits | None = None,
) -> tuple[list[int], list[PromptImage]]:
    """Token ids of a body's prompt or chat, somewhat more than `limit` perhaps, and its pictures. Pure.

    A body may hold megabytes: what is sure to exceed `limit` raises TooLarge, without the seconds of
    tokenising it. Raises InvalidRequest as `prepare` does.
    """
    if body.kind == "chat":
        use = body.tool_use()
        messages = body.messages or []
        images = shown_images(messages, limits or ImageLimits())
        turns = chat_turns(messages, "" if use is None else preamble(use), images)
        _check_length(body, sum(len(turn.text) for turn in turns), tokenizer, limit)
        return render(turns, tokenizer, config.vision)
    if isinstance(body.prompt, str):
        _check_length(body, len(body.prompt), tokenizer, limit)
        return tokenizer.encode(body.prompt, bos=True), []
    token_ids = list(body.prompt or [])
    _check_ids(token_ids, tokenizer.vocab_size, "prompt")
    return token_ids, []


def prompt_text(body: JobBody, tokenizer: Tokenizer) -> str:
    """The prompt of a completion, as `echo` gives it back."""
    return body.prompt if isinstance(body.prompt, str) else tokenizer.decode(body.prompt or [])


def _check_length(body: JobBody, characters: int, tokenizer: Tokenizer, limit: int) -> None:
    at_least = characters // tokenizer.longest_piece
    if at_least > limit:
        field = _field(body)
        raise TooLarge(f"{field}: at least {at_least} tokens, over the context of {limit}", param=field)


def _field(body: JobBody) -> str:
    return "messages" if body.kind == "chat" else "prompt"


def _stop_ids(body: JobBody, tokenizer: Tokenizer, config: Gemma3Config) -> frozenset[int]:
    # A base model's configuration does not name <end_of_turn>, but the template taught by a chat
    # does: whatever the model, a turn ends there.
    turn_end = {tokenizer.end_of_turn} if body.kind == "chat" else set()
    return frozenset(config.stop_token_ids) | turn_end


def _check_ids(ids: Iterable[int], vocab_size: int, field: str) -> None:
    for token_id in ids:
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"{field}: token id {token_id} is outside of the vocabulary, 0 to {vocab_size - 1}",
                param=field,
            )
