"""A tour with LiteLLM: `python litellm_python.py URL MODEL`. Needs nothing but `litellm`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks for a newer one

import litellm

ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PLACE = {"type": "object", "properties": {"place": {"enum": ["Paris", "Rome"]}}, "required": ["place"]}
STRICT = PLACE | {"additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": STRICT, "strict": True}}]
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


def main() -> None:
    url, model = sys.argv[1:]

    def chat(**asked: Any) -> Any:
        asked = {"messages": ASK, "max_tokens": 8, "temperature": 0, **asked}
        return litellm.completion(model=f"openai/{model}", api_base=url, api_key="none", **asked)

    print("a chat, whole and streamed")
    whole = chat()
    text = "".join(c.choices[0].delta.content or "" for c in chat(stream=True))
    assert text == whole.choices[0].message.content
    assert whole.usage.total_tokens > 8

    print("an image")
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DOT}"}},
        {"type": "text", "text": "What is it?"},
    ]
    shown = chat(messages=[{"role": "user", "content": parts}])
    assert shown.usage.prompt_tokens > 8
    assert shown.choices[0].message.content

    print("choices, logprobs, stop")
    asked: Any = {"n": 2, "temperature": 1, "seed": 1, "logprobs": True, "top_logprobs": 2, "stop": ["###"]}
    assert len(chat(**asked).choices) == 2

    print("a schema")
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": STRICT, "strict": True}}
    content = chat(response_format=form, max_tokens=40).choices[0].message.content
    assert json.loads(content)["place"] in ("Paris", "Rome")

    print("a call and its result, whole and streamed")
    asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    message = chat(**asked).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["place"] in ("Paris", "Rome")
    built = litellm.stream_chunk_builder(list(chat(**asked, stream=True)), messages=ASK)
    assert built.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "clear"}
    assert chat(messages=[*ASK, message, result], tools=TOOLS, tool_choice="none").choices

    print("a completion")
    answer = litellm.text_completion(
        model=f"text-completion-openai/{model}", prompt="Once", api_base=url, api_key="none", max_tokens=4
    )
    assert answer.choices[0].text is not None

    print("an error")
    try:
        chat(temperature=3)
    except litellm.BadRequestError as err:
        assert "temperature" in str(err)
    else:
        raise AssertionError("accepted")
    print(f"litellm {importlib.metadata.version('litellm')}: passed")


if __name__ == "__main__":
    main()
