"""OpenAI's client over POST /v1/responses, with a real model. `test_agents.py` has OpenAI's agents.

The model is small and picks tools badly, so each request names the tool to call, and the last request forbids calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.api.server import Server, serving
from tests.conftest import MODEL

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
NAME = MODEL.stem
QUESTION = "How warm is it in Bern? Add 2 to it."


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("-np", "4") as server:
        server.ready()
        yield server


def test_create_continue_and_delete(client: OpenAI) -> None:
    ask: Any = {"model": NAME, "temperature": 0, "max_output_tokens": 12}
    first = client.responses.create(**ask, instructions="Answer briefly.", input="Name a color.", metadata={"a": "b"})
    assert first.output_text
    assert first.metadata == {"a": "b"}
    assert first.usage is not None
    second = client.responses.create(**ask, input="And another?", previous_response_id=first.id)
    whole = [*client.responses.input_items.list(second.id, order="asc")]
    assert [item.type for item in whole] == ["message"] * 3
    assert client.responses.input_tokens.count(model=NAME, input="Name a color.").input_tokens > 0
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_stream_of_a_text(client: OpenAI) -> None:
    ask: Any = {"model": NAME, "input": "Name a color.", "temperature": 0, "max_output_tokens": 12}
    with client.responses.stream(**ask) as stream:
        events = [event.type for event in stream if event.type != "response.output_text.delta"]
    assert events[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    whole = client.responses.create(**ask)
    text = "".join(
        e.delta for e in client.responses.create(**ask, stream=True) if e.type == "response.output_text.delta"
    )
    assert text == whole.output_text


class City(BaseModel):
    name: Literal["Bern", "Oslo"]
    temperature: int = Field(ge=0, le=99)


def test_parse(client: OpenAI) -> None:
    ask: Any = {"model": NAME, "input": QUESTION, "text_format": City, "max_output_tokens": 64}
    parsed = client.responses.parse(**ask).output_parsed
    assert parsed is not None
    assert parsed.name in ("Bern", "Oslo")
    with client.responses.stream(**ask) as stream:
        assert isinstance(stream.get_final_response().output_parsed, City)


def test_a_streamed_loop_with_two_tools(client: OpenAI) -> None:
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    tools: Any = [
        openai_tool("temperature", city={"enum": ["Bern", "Oslo"]}),
        openai_tool("add", a=number, b=number),
    ]
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    called: list[tuple[str, dict[str, Any]]] = []
    for name in ("temperature", "add", None):
        choice: Any = {"type": "function", "name": name} if name else "none"
        with client.responses.stream(
            model=NAME, input=items, tools=tools, tool_choice=choice, max_output_tokens=64 if name else 8, store=False
        ) as stream:
            deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
            response = stream.get_final_response() if name else None
        for item in response.output if response else ():
            items.append(item.to_dict(exclude_unset=False, mode="json"))
            if item.type == "function_call":
                assert "".join(deltas) == item.arguments
                called.append((item.name, json.loads(item.arguments)))
                items.append({"type": "function_call_output", "call_id": item.call_id, "output": "7"})
    assert [name for name, _ in called] == ["temperature", "add"]
    assert called[0][1]["city"] in ("Bern", "Oslo")


def openai_tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "name": name, "parameters": parameters, "strict": True}
