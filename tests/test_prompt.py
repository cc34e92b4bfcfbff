"""From a job's body to prompt ids: what fits runs, what does not is refused with the fix."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from wicore.errors import InvalidRequest, TooLarge
from wicore.gemma3.checkpoint import Checkpoint
from wicore.gemma3.config import Gemma3Config
from wicore.request import parse_job
from wicore.text.prompt import COMPLETION_MAX_TOKENS, Prompt, prepare
from wicore.text.tokenizer import Tokenizer


@pytest.fixture
def config(tiny: Checkpoint) -> Gemma3Config:
    """The tiny model with a context of 100 tokens."""
    return dataclasses.replace(tiny.config, max_context=100)


def completion(tokenizer: Tokenizer, config: Gemma3Config, context: int | None = None, **body: Any) -> Prompt:
    return prepare(parse_job({"kind": "completion"} | body), tokenizer, config, context)


def chat(tokenizer: Tokenizer, config: Gemma3Config, text: str, **body: Any) -> Prompt:
    messages = [{"role": "user", "content": text}]
    return prepare(parse_job({"kind": "chat", "messages": messages} | body), tokenizer, config)


def test_a_text_prompt_starts_with_bos(tiny_tokenizer: Tokenizer, config: Gemma3Config) -> None:
    prompt = completion(tiny_tokenizer, config, prompt="the oak table")
    assert prompt.token_ids == tiny_tokenizer.encode("the oak table", bos=True)


def test_prompt_ids_are_taken_as_they_are(tiny_tokenizer: Tokenizer, config: Gemma3Config) -> None:
    assert completion(tiny_tokenizer, config, prompt=[7, 4, 511]).token_ids == [7, 4, 511]


def test_a_completion_gets_the_documented_number_of_tokens_or_what_room_there_is(
    tiny_tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    assert completion(tiny_tokenizer, config, prompt=[7]).max_tokens == COMPLETION_MAX_TOKENS == 16
    assert completion(tiny_tokenizer, config, prompt=[7] * 95).max_tokens == 5


def test_a_chat_gets_the_rest_of_the_context(tiny_tokenizer: Tokenizer, config: Gemma3Config) -> None:
    prompt = chat(tiny_tokenizer, config, "Hi")
    assert len(prompt.token_ids) + prompt.max_tokens == 100


def test_prompt_and_answer_may_fill_the_context_exactly(
    tiny_tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    assert completion(tiny_tokenizer, config, prompt=[7] * 60, max_tokens=40).max_tokens == 40
    assert completion(tiny_tokenizer, config, prompt=[7] * 99, max_tokens=1).max_tokens == 1


def test_one_token_too_many_is_refused_with_what_would_fit(
    tiny_tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    with pytest.raises(TooLarge) as caught:
        completion(tiny_tokenizer, config, prompt=[7] * 60, max_tokens=41)
    assert caught.value.param == "max_tokens"
    assert caught.value.message == (
        "max_tokens: 60 prompt tokens and max_tokens 41 make 101, over the context of 100; ask for at most 40"
    )


@pytest.mark.parametrize("length", [100, 101])
def test_a_prompt_that_leaves_no_room_is_refused(
    tiny_tokenizer: Tokenizer, config: Gemma3Config, length: int
) -> None:
    with pytest.raises(TooLarge, match=f"prompt: {length} tokens leave no room .* context of 100") as caught:
        completion(tiny_tokenizer, config, prompt=[7] * length)
    assert caught.value.param == "prompt"


def test_the_context_served_may_be_shorter_than_the_models_but_never_longer(
    tiny_tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    assert chat(tiny_tokenizer, config, "Hi").max_tokens > 50
    with pytest.raises(TooLarge, match="context of 50; ask for at most 49"):
        completion(tiny_tokenizer, config, 50, prompt=[7], max_tokens=50)
    with pytest.raises(TooLarge, match="context of 100; ask for at most 99"):
        completion(tiny_tokenizer, config, 10_000, prompt=[7], max_tokens=100)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("prompt", {"kind": "completion", "prompt": "word " * 1_000_000}),
        ("messages", {"messages": [{"role": "user", "content": "word " * 1_000_000}]}),
    ],
)
def test_megabytes_are_refused_without_being_tokenised(
    tiny_tokenizer: Tokenizer,
    config: Gemma3Config,
    field: str,
    body: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *args, **kwargs: pytest.fail("tokenised"))
    job = parse_job(body)
    with pytest.raises(TooLarge, match=rf"{field}: at least \d+ tokens, over the context of 100") as caught:
        prepare(job, tiny_tokenizer, config)
    assert caught.value.param == field


def test_white_space_that_the_chat_template_strips_does_not_count(
    tiny_tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    padded = chat(tiny_tokenizer, config, " " * 100_000 + "Hi" + "\n" * 100_000)
    assert padded == chat(tiny_tokenizer, config, "Hi")


def test_a_chat_ends_at_the_end_of_turn_even_of_a_base_model(
    tiny_tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    assert chat(tiny_tokenizer, config, "Hi").stop_ids == {1, tiny_tokenizer.end_of_turn}
    assert completion(tiny_tokenizer, config, prompt="Hi").stop_ids == {1}


def test_every_stop_id_of_the_model_ends_a_text_unless_the_job_ignores_them(
    tiny_tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    chat_model = dataclasses.replace(config, stop_token_ids=(1, 106))
    assert completion(tiny_tokenizer, chat_model, prompt="Hi").stop_ids == {1, 106}
    assert completion(tiny_tokenizer, chat_model, prompt="Hi", ignore_eos=True).stop_ids == frozenset()
    assert chat(tiny_tokenizer, chat_model, "Hi", ignore_eos=True).stop_ids == frozenset()


@pytest.mark.parametrize(
    ("body", "param", "token_id"),
    [
        ({"prompt": [7, 512]}, "prompt", 512),
        ({"prompt": [10**12]}, "prompt", 10**12),
        ({"prompt": "x", "logit_bias": {"512": 1.0}}, "logit_bias", 512),
    ],
)
def test_an_id_outside_of_the_vocabulary_is_refused(
    tiny_tokenizer: Tokenizer, config: Gemma3Config, body: dict[str, Any], param: str, token_id: int
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(tiny_tokenizer, config, **body)
    assert caught.value.param == param
    assert caught.value.message == f"{param}: token id {token_id} is outside of the vocabulary, 0 to 511"


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_never_gets_this_far(prompt: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_job({"kind": "completion", "prompt": prompt})
    assert caught.value.param == "prompt"
