"""Structured output with the real server and model and the official `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.api.server import serving
from tests.conftest import MODEL

pytestmark = pytest.mark.timeout(180)
NAME = MODEL.stem
SEA: Any = [{"role": "user", "content": "Name a sea, as JSON."}]


class Sea(BaseModel):
    name: str = Field(max_length=24)
    depth: int = Field(ge=1, le=99999)
    salty: bool
    colour: Literal["blue", "green", "grey"]
    fish: list[Literal["cod", "tuna"]] = Field(min_length=1, max_length=2)


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with serving("-np", "4", "--alias", NAME) as server:
        server.ready()
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client
        server.signal()
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines)


def test_parse(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        model=NAME, messages=SEA, response_format=Sea, max_tokens=200, seed=3, temperature=1.0, n=2
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Sea)
    assert reply.choices[0].message.content != reply.choices[1].message.content


def test_parse_a_stream(client: OpenAI) -> None:
    body: dict[str, Any] = {"model": NAME, "messages": SEA, "max_tokens": 200, "temperature": 0.0}
    with client.chat.completions.stream(**body, response_format=Sea) as stream:
        for _ in stream:
            pass
        reply = stream.get_final_completion()
    assert isinstance(reply.choices[0].message.parsed, Sea)
    assert reply.choices[0].finish_reason == "stop"


def test_grammars_with_speculation(client: OpenAI) -> None:
    def complete(speculative: Any, **fields: Any) -> str:
        body = {"seed": 5, "speculative": speculative, **fields}
        reply = client.completions.create(model=NAME, prompt="The answer:", max_tokens=48, extra_body=body)
        return reply.choices[0].text

    assert complete(True, structured_outputs={"regex": "[0-9]{5}"}).isdigit()
    assert complete(True, guided_choice=["north", "south"]) in ("north", "south")
    assert isinstance(json.loads(complete(True, grammar='start: %json {"enum": [true, 17]}')), int)
    schema = {"type": "object", "properties": {"direction": {"enum": ["north"]}}, "required": ["direction"]}
    assert json.loads(complete({"type": "grammar", "order": "fixed"}, json_schema=schema))["direction"] == "north"


class Harbours(BaseModel):
    sea: str = Field(max_length=12, pattern="^[A-Z][a-z]+$")
    names: set[Literal["Oslo", "Lima", "Rome"]] = Field(min_length=2, max_length=2)


def test_a_keyword_that_no_grammar_follows(client: OpenAI) -> None:
    """With strict it is refused by its path; without, the rest is enforced and the output is checked."""
    body: dict[str, Any] = {"model": NAME, "messages": SEA, "max_tokens": 100}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.parse(**body, response_format=Harbours)
    path = "response_format.json_schema.schema/properties/names/uniqueItems"
    assert refusal.value.param == path
    named: Any = {"name": "harbours", "schema": Harbours.model_json_schema()}
    reply = client.chat.completions.create(
        **body, response_format={"type": "json_schema", "json_schema": named}, n=4, seed=1, temperature=1.5
    )
    found = [json.loads(choice.message.content or "") for choice in reply.choices]
    assert all({"sea", "names"} <= set(each) and len(each["names"]) == 2 for each in found)
    assert reply.model_extra is not None
    assert reply.model_extra["unenforced_schema_keywords"] == {
        "keywords": [path],
        "satisfied": [len({*each["names"]}) == 2 for each in found],
    }


def test_json_object_with_an_empty_schema_is_an_object(client: OpenAI) -> None:
    empty: Any = {"type": "json_object", "schema": {}}
    reply = client.chat.completions.create(
        model=NAME, messages=SEA, max_tokens=64, response_format=empty, temperature=0.0
    )
    assert (reply.choices[0].message.content or "").lstrip().startswith("{")
