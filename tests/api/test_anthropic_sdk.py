"""Anthropic's SDK: messages, streams, counts and structured output of the real server, tools with scripted output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic, AsyncAnthropic, BadRequestError, beta_async_tool
from pydantic import BaseModel

from tests.api.fake import FakeEngine, Step
from tests.api.server import Server, serving
from tests.api.test_tools import app_of
from tests.conftest import MODEL

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
NAME = MODEL.stem
HI: Any = [{"role": "user", "content": "Why is the sky blue?"}]
GREEDY: Any = {"temperature": 0}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 99}
ADD: Any = {
    "name": "add",
    "description": "The sum of two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": DIGIT, "b": DIGIT},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}


class Sum(BaseModel):
    a: bool
    b: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("-np", "2", "--api-key", "secret") as server:
        server.ready()
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
        yield client


def test_create_and_stream(client: Anthropic) -> None:
    ask: Any = {"model": NAME, "messages": HI, "max_tokens": 12, "extra_body": GREEDY, "system": "Be brief."}
    whole = client.messages.create(**ask)
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 12
    assert whole._request_id
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [text] == [block.text for block in whole.content if block.type == "text"]
    assert final.content[0].to_dict()["text"] == text
    assert final.usage.cache_read_input_tokens
    count = client.messages.count_tokens(model=NAME, messages=HI, system="Be brief.")
    for usage in (whole.usage, final.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == count.input_tokens


def test_a_stop_sequence(client: Anthropic) -> None:
    ask: Any = {"model": NAME, "max_tokens": 20, "extra_body": GREEDY}
    ask["messages"] = [*HI, {"role": "assistant", "content": "The sky is"}]
    text = client.messages.create(**ask).content[0].to_dict()["text"]
    stop = str(text).split()[2]
    reply = client.messages.create(**ask, stop_sequences=["no such text", stop])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", stop)
    assert reply.content[0].to_dict()["text"] == str(text).partition(stop)[0]


@pytest.mark.parametrize(
    "choice", [{"type": "tool", "name": "add"}, {"type": "any", "disable_parallel_tool_use": True}]
)
def test_a_streamed_call(client: Anthropic, choice: Any) -> None:
    with client.messages.stream(
        model=NAME, messages=HI, max_tokens=64, tools=[ADD], tool_choice=choice, extra_body=GREEDY
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    (use,) = [block for block in final.content if block.type == "tool_use"]
    assert final.stop_reason == "tool_use"
    assert "input_json" in kinds
    assert isinstance(use.input, dict)
    assert {type(use.input[key]) for key in "ab"} == {int}


def test_an_answer_by_a_model_class(client: Anthropic) -> None:
    reply = client.messages.parse(model=NAME, messages=HI, max_tokens=40, output_format=Sum)
    assert isinstance(reply.parsed_output, Sum)


def test_an_error(client: Anthropic) -> None:
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
    with pytest.raises(BadRequestError, match="image input is not supported") as caught:
        client.messages.create(model=NAME, messages=[{"role": "user", "content": [image]}], max_tokens=5)
    assert caught.value.type == "invalid_request_error"


async def test_the_tool_runner() -> None:
    calls = ['{"name": "temperature", "arguments": {"city": "Bern"}}', '{"name": "add", "arguments": {"a": 7, "b": 2}}']
    outputs = [*(f"<tool_call>\n{call}\n</tool_call>" for call in calls), "9 degrees."]

    def script(request: Any) -> Iterator[Step]:
        yield outputs.pop(0).encode()

    engine = FakeEngine(script)
    engine.request_limit = 4096
    called: list[Any] = []

    @beta_async_tool
    async def temperature(city: str) -> str:
        """The temperature of a city."""
        called.append(city)
        return "7"

    @beta_async_tool
    async def add(a: int, b: int) -> str:
        """The sum of two numbers."""
        called.append((a, b))
        raise ValueError("too warm")

    transport = httpx2.AsyncClient(transport=httpx2.ASGITransport(app_of(engine)))
    async with AsyncAnthropic(base_url="http://127.0.0.1", api_key="none", http_client=transport) as client:
        runner = client.beta.messages.tool_runner(
            model="fake-1", max_tokens=200, messages=[{"role": "user", "content": "hi"}], tools=[temperature, add]
        )
        final = await runner.until_done()
    assert called == ["Bern", (7, 2)]
    assert [block.to_dict() for block in final.content] == [{"type": "text", "text": "9 degrees."}]
    prompt = bytes(token for token in engine.requests[-1].prompt if token < 256).decode()
    assert "<tool_response>\n7\n</tool_response>" in prompt
    assert "Error" in prompt
