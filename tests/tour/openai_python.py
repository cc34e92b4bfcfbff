"""A tour with OpenAI's Python client: `python openai_python.py URL MODEL`. Needs nothing but `openai`.

Prints each stop; the first that fails ends the tour. For a model of any quality: no stop depends on what is
said, only on what must be so whatever is said.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

import openai
import pydantic

ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "place": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": PARAMETERS,
        "strict": True,
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}


class Weather(pydantic.BaseModel):
    sky: Literal["clear", "grey"]
    wet: bool


class Tour:
    """The stops, in the order in which they are written. `model` answers with few tokens unless told."""

    def __init__(self, client: openai.OpenAI, model: str) -> None:
        self.client, self.model = client, model

    def chat(self, messages: Any = ASK, **asked: Any) -> Any:
        asked = {"max_completion_tokens": 8, "temperature": 0, **asked}
        return self.client.chat.completions.create(model=self.model, messages=messages, **asked)

    def complete(self, prompt: Any = "Once", **asked: Any) -> Any:
        asked = {"max_tokens": 6, "temperature": 0, **asked}
        return self.client.completions.create(model=self.model, prompt=prompt, **asked)

    # --- models -----------------------------------------------------------------------------------

    def models(self) -> None:
        (served,) = self.client.models.list().data
        assert self.client.models.retrieve(self.model) == served
        assert (served.id, served.object) == (self.model, "model")
        assert served.created > 0

    # --- chat completions -------------------------------------------------------------------------

    def a_chat_whole_and_streamed(self) -> None:
        whole = self.chat()
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [getattr(chunks[-1].usage, c) for c in counts] == [getattr(whole.usage, c) for c in counts]
        assert chunks[0].system_fingerprint == whole.system_fingerprint
        assert whole.system_fingerprint
        assert whole.usage.prompt_tokens_details.cached_tokens >= 0

    def the_clients_own_helper_for_streams(self) -> None:
        whole = self.chat()
        with self.client.chat.completions.stream(
            model=self.model, messages=ASK, max_completion_tokens=8, temperature=0
        ) as stream:
            stream.until_done()
            streamed = (
                stream.current_completion_snapshot
            )  # the final one is not to be had of a cut-off answer
        assert streamed.choices[0].message.content == whole.choices[0].message.content

    def choices_seeds_and_logprobs(self) -> None:
        asked: Any = {"n": 2, "seed": 7, "temperature": 1.0, "logprobs": True, "top_logprobs": 3}
        one, two = self.chat(**asked), self.chat(**asked)
        assert [c.message.content for c in one.choices] == [c.message.content for c in two.choices]
        entry = one.choices[1].logprobs.content[0]
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob >= entry.logprob

    def stop_strings(self) -> None:
        text = self.chat(max_completion_tokens=20).choices[0].message.content
        stop = text[len(text) // 2 :][:2]
        cut = self.chat(max_completion_tokens=20, stop=[stop, *("#" * i for i in range(5, 20))]).choices[0]
        assert (cut.message.content, cut.finish_reason) == (text.partition(stop)[0], "stop")

    def roles_names_and_parts(self) -> None:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": None, "refusal": "No."},
            {"role": "user", "content": "Please."},
        ]
        assert self.chat(messages).usage.prompt_tokens > 20

    def an_answer_sent_back(self) -> None:
        message = self.chat().choices[0].message
        assert self.chat([*ASK, message, {"role": "user", "content": "And tomorrow?"}]).choices

    def what_comes_along(self) -> None:
        answer = self.chat(
            user="ann",
            metadata={"order": "17"},
            logit_bias={"7": -100},
            presence_penalty=0.5,
            frequency_penalty=0.5,
            top_p=0.9,
            service_tier="flex",
            extra_body={"top_k": 5, "timeout_s": 60, "prompt_cache_key": "a", "safety_identifier": "b"},
        )
        assert answer.service_tier == "flex"

    def the_id_of_the_job(self) -> None:
        raw = self.client.chat.completions.with_raw_response.create(
            model=self.model, messages=ASK, max_completion_tokens=2
        )
        assert raw.parse().id == f"chatcmpl-{raw.headers['X-Job-Id']}"

    # --- images -----------------------------------------------------------------------------------

    def an_image(self) -> None:
        (served,) = self.client.models.list().data
        if "image" in served.input_modalities:
            assert self.chat(IMAGE).choices
            asked = [{"type": "input_image", "image_url": f"data:image/png;base64,{DOT}", "detail": "auto"}]
            items: Any = [{"role": "user", "content": asked}]
            assert self.client.responses.create(model=self.model, input=items, max_output_tokens=4).output
            return
        try:
            self.chat(IMAGE)
        except openai.BadRequestError as err:
            assert err.param == "messages.0.content.0.type", err
            assert "served for text alone" in err.message
        else:
            raise AssertionError("an image was accepted by a model that takes none")

    # --- output that has a form -------------------------------------------------------------------

    def json_mode(self) -> None:
        choice = self.chat(max_completion_tokens=40, response_format={"type": "json_object"}).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            json.loads(choice.message.content)

    def a_schema_from_a_class(self) -> None:
        answer = self.client.chat.completions.parse(
            model=self.model, messages=ASK, max_completion_tokens=80, response_format=Weather
        )
        assert answer.choices[0].message.parsed.sky in ("clear", "grey")

    # --- tools ------------------------------------------------------------------------------------

    def calls(self, **asked: Any) -> Any:
        return self.chat(tools=[WEATHER, TIME], max_completion_tokens=120, **asked)

    def a_required_call_whole_and_streamed(self) -> None:
        choice = self.calls(tool_choice="required", parallel_tool_calls=False).choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        check_arguments(call.function)
        name, arguments, ids = "", "", []
        for chunk in self.calls(tool_choice="required", parallel_tool_calls=False, stream=True):
            for delta in chunk.choices[0].delta.tool_calls or []:
                ids += [delta.id] if delta.id else []
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
            end = chunk.choices[0].finish_reason
        assert (name, arguments, end) == (call.function.name, call.function.arguments, "tool_calls")
        assert len(ids) == 1

    def several_calls(self) -> None:
        choice = self.calls(tool_choice="required", temperature=1, seed=3).choices[0]
        for call in choice.message.tool_calls if choice.finish_reason == "tool_calls" else []:
            check_arguments(call.function)

    def a_named_call_and_its_result(self) -> None:
        named: Any = {"type": "function", "function": {"name": "get_weather"}}
        message = self.calls(tool_choice=named).choices[0].message
        (call,) = message.tool_calls
        assert call.function.name == "get_weather"
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'}
        answer = self.calls(messages=[*ASK, message, result], tool_choice="none")
        assert answer.choices[0].message.tool_calls is None

    def text_or_a_call(self) -> None:
        for seed in range(3):
            message = self.calls(tool_choice="auto", temperature=1, seed=seed).choices[0].message
            assert not (message.content and message.tool_calls)

    def tools_by_the_clients_helper(self) -> None:
        with self.client.chat.completions.stream(
            model=self.model,
            messages=ASK,
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            max_completion_tokens=120,
        ) as stream:
            message = stream.get_final_completion().choices[0].message
        for call in message.tool_calls:
            assert call.function.parsed_arguments["place"] in ("Paris", "Rome")

    # --- completions ------------------------------------------------------------------------------

    def a_completion_whole_and_streamed(self) -> None:
        whole = self.complete(logprobs=2)
        chunks = list(self.complete(logprobs=2, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
        tokens = [
            t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.tokens
        ]
        assert tokens == whole.choices[0].logprobs.tokens
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens

    def several_prompts(self) -> None:
        whole = self.complete(["Once", "Upon"], n=2, seed=1, temperature=1)
        texts = [""] * 4
        for chunk in self.complete(["Once", "Upon"], n=2, seed=1, temperature=1, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert [c.text for c in whole.choices] == texts
        ids = self.complete([[7, 8, 9], [7, 8]]).choices
        assert [c.index for c in ids] == [0, 1]

    def echo_and_best_of(self) -> None:
        assert self.complete("Once upon", echo=True).choices[0].text.startswith("Once upon")
        (best,) = self.complete(best_of=3, temperature=1, seed=5).choices
        assert best.finish_reason in ("stop", "length")

    # --- errors -----------------------------------------------------------------------------------

    def errors(self) -> None:
        for kind, param, call in (
            (openai.BadRequestError, "temperature", lambda: self.chat(temperature=3)),
            (openai.BadRequestError, "audio", lambda: self.chat(audio={"voice": "ash", "format": "wav"})),
            (openai.BadRequestError, "suffix", lambda: self.complete(suffix="end")),
            (openai.BadRequestError, "messages.0.content.0.image_url.url", lambda: self.chat(ELSEWHERE)),
            (openai.NotFoundError, "model", lambda: self.client.models.retrieve("gpt-6")),
        ):
            try:
                call()
            except kind as err:
                assert err.param == param, err
                assert err.code
            else:
                raise AssertionError(f"{param} was accepted")

    # --- asynchronous -----------------------------------------------------------------------------

    def the_asynchronous_client(self) -> None:
        async def both() -> None:
            async with openai.AsyncOpenAI(base_url=str(self.client.base_url), api_key="none") as client:
                asked: Any = {"model": self.model, "messages": ASK, "max_tokens": 4, "temperature": 0}
                whole = await client.chat.completions.create(**asked)
                text = ""
                async for chunk in await client.chat.completions.create(**asked, stream=True):
                    text += chunk.choices[0].delta.content or ""
                assert text == whole.choices[0].message.content

        asyncio.run(both())


def shown(url: str) -> Any:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


ELSEWHERE = shown("https://a.example/b.png")
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
IMAGE = shown(f"data:image/png;base64,{DOT}")


def check_arguments(function: Any) -> None:
    arguments = json.loads(function.arguments)
    if function.name == "get_weather":
        assert arguments.keys() == {"place", "days"}, arguments
        assert arguments["place"] in ("Paris", "Rome")
        assert 1 <= arguments["days"] <= 9
    else:
        assert (function.name, arguments) == ("get_time", {})


def main() -> None:
    url, model = sys.argv[1:]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        tour = Tour(client, model)
        stops = [name for name in vars(Tour) if name[0] != "_" and name not in ("chat", "complete", "calls")]
        for name in stops:
            print(name, flush=True)
            getattr(tour, name)()
    print(f"openai {openai.__version__}: {len(stops)} stops passed")


if __name__ == "__main__":
    main()
