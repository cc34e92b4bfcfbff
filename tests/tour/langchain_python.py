"""A tour with LangChain's ChatOpenAI: `python langchain_python.py URL MODEL`. Needs `langchain-openai`."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


class Weather(BaseModel):
    """The weather of a place."""

    sky: Literal["clear", "grey"]
    wet: bool


@tool
def get_weather(place: Literal["Paris", "Rome"]) -> str:
    """Weather of a place."""
    return f"clear in {place}"


def main() -> None:
    url, model = sys.argv[1:]
    settings: Any = {"base_url": url, "api_key": "none", "model": model, "max_retries": 0, "temperature": 0}
    chat = ChatOpenAI(**settings, max_tokens=60)
    messages: list[Any] = [SystemMessage("Be brief."), HumanMessage("What is the weather in Paris?")]

    print("a chat, whole and streamed")
    whole = chat.invoke(messages)
    chunks = list(chat.stream(messages))
    assert "".join(c.content for c in chunks) == whole.content
    assert whole.usage_metadata["total_tokens"] > 0

    print("an image")
    parts: list[Any] = [
        {"type": "image", "base64": DOT, "mime_type": "image/png"},
        {"type": "text", "text": "What is it?"},
    ]
    assert chat.invoke([HumanMessage(parts)]).usage_metadata["input_tokens"] > 8

    print("a schema")
    for method in ("json_schema", "function_calling"):
        answer = chat.with_structured_output(Weather, method=method, strict=True).invoke(messages)
        assert isinstance(answer, Weather), method

    print("a call and its result, whole and streamed")
    strict = chat.bind_tools([get_weather], tool_choice="any", strict=True, parallel_tool_calls=False)
    message = strict.invoke(messages)
    (call,) = message.tool_calls
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"], name="get_weather")
    gathered: Any = None
    for chunk in strict.stream(messages):
        gathered = chunk if gathered is None else gathered + chunk
    assert [c["args"] for c in gathered.tool_calls] == [call["args"]]
    answer = chat.bind_tools([get_weather]).invoke([*messages, message, result])
    assert answer.usage_metadata["output_tokens"] > 0
    assert not (answer.content and answer.tool_calls)

    print("logprobs, choices, seed")
    asked: Any = {"temperature": 1, "max_tokens": 4, "n": 2, "seed": 3, "logprobs": True, "top_logprobs": 2}
    generated = ChatOpenAI(**settings | asked).generate([messages])
    assert len(generated.generations[0]) == 2

    print("completions")
    completion = OpenAI(**settings, max_tokens=4, n=2, best_of=2)
    assert len(completion.generate(["Once", "Upon"]).generations) == 2
    print(f"langchain-openai {importlib.metadata.version('langchain-openai')}: passed")


if __name__ == "__main__":
    main()
