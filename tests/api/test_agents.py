"""Third-party agents over loopback: OpenAI's client, OpenAI's agents and pydantic-ai each run a loop with two tools.

The model is small and picks tools badly, so each request names the tool to call, and the last request forbids calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI, OpenAI
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.api.server import Server, serving
from tests.conftest import MODEL

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
NAME = MODEL.stem
QUESTION = "How warm is it in Bern? Add 2 to it."


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


DIGIT = {"type": "integer", "minimum": 0, "maximum": 99}
TOOLS: Any = [tool("temperature", city={"enum": ["Bern", "Oslo"]}), tool("add", a=DIGIT, b=DIGIT)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("-np", "4") as server:
        server.ready()
        yield server


def choice_of(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def test_openai_streaming_helper_and_loop(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    called: list[tuple[str, dict[str, Any]]] = []
    for choice in (choice_of("temperature"), choice_of("add"), "none"):
        kinds: list[str] = []
        with client.chat.completions.stream(
            model=NAME, messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=64, seed=1
        ) as stream:
            kinds += [event.type for event in stream]
            final = stream.get_final_completion().choices[0]
        calls = final.message.tool_calls or []
        assert (final.finish_reason == "tool_calls") == (choice != "none")
        assert ("tool_calls.function.arguments.delta" in kinds) == (choice != "none")
        messages.append(final.message.to_dict())
        for call in calls:
            called.append((call.function.name, json.loads(call.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "7"})
    assert [name for name, _ in called] == ["temperature", "add"]
    assert called[0][1]["city"] in ("Bern", "Oslo")
    assert {type(called[1][1][key]) for key in "ab"} == {int}


def test_a_required_call(client: OpenAI) -> None:
    ask: Any = {"model": NAME, "messages": [{"role": "user", "content": "Tell me a joke."}], "tools": TOOLS, "seed": 3}
    one = client.chat.completions.create(**ask, tool_choice="required", parallel_tool_calls=False, max_tokens=64)
    (call,) = one.choices[0].message.tool_calls
    assert call.function.name in ("temperature", "add")
    json.loads(call.function.arguments)


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
async def test_openai_agents(kind: Any, async_client: AsyncOpenAI) -> None:
    """The Responses model is the default of these agents."""
    called: list[str] = []

    @function_tool
    def temperature(city: str) -> str:
        """The temperature of a city."""
        called.append("temperature")
        agent.model_settings = settings("add")
        return "7"

    @function_tool
    def add(a: int, b: int) -> str:
        """The sum of two numbers."""
        called.append("add")
        agent.model_settings = settings("none")
        return "9"

    def settings(choice: str) -> ModelSettings:
        return ModelSettings(tool_choice=choice, max_tokens=48, temperature=0.0)

    agent = Agent(
        name="sum",
        instructions="Use the tools.",
        model=kind(NAME, async_client),
        tools=[temperature, add],
        model_settings=settings("temperature"),
        reset_tool_choice=False,
    )
    result = Runner.run_streamed(agent, QUESTION, max_turns=6, run_config=RunConfig(tracing_disabled=True))
    async for _ in result.stream_events():
        pass
    assert called == ["temperature", "add"]
    assert isinstance(result.final_output, str)


async def test_pydantic_ai(async_client: AsyncOpenAI) -> None:
    called: list[str] = []
    model = OpenAIChatModel(NAME, provider=OpenAIProvider(openai_client=async_client))

    def choice(context: Any) -> Any:
        steps = {0: "temperature", 1: "add"}
        return {"tool_choice": [steps[len(called)]] if len(called) in steps else "none", "max_tokens": 48}

    agent = PydanticAgent(model, model_settings=choice)

    @agent.tool_plain
    def temperature(city: str) -> str:
        """The temperature of a city."""
        called.append("temperature")
        return "7"

    @agent.tool_plain
    def add(a: int, b: int) -> str:
        """The sum of two numbers."""
        called.append("add")
        return "9"

    result = await agent.run(QUESTION)
    assert called == ["temperature", "add"]
    assert isinstance(result.output, str)
