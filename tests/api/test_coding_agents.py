"""What coding agents send beyond plain functions: custom tools, namespaces, opaque reasoning and deferred tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
import pytest

from api.anthropic.client_tools import client_tool_definition
from api.openai.responses.conversation import ChatConversation
from api.openai.responses.tools import CallableTools
from engine import RequestRefused
from tests.api.test_messages import WEATHER, create
from tests.api.test_responses import kinds, respond, streamed
from tests.api.test_tools import engine_with_output, prompt_of

PATCH: Any = {"type": "custom", "name": "apply_patch", "format": {"type": "text"}}
INPUT = '*** Begin\n+"é😀\\'


def output_of(name: str, arguments: Mapping[str, Any], *, thinking: str = "hm") -> str:
    return f"{thinking}\n</think>\n\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# ── Responses API ──


async def test_a_call_of_a_custom_tool() -> None:
    events = await streamed(engine_with_output(output_of("apply_patch", {"input": INPUT})), tools=[PATCH])
    assert kinds(events)[-5:] == [
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
        "completed",
    ]
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert (len(deltas) > 3, "".join(deltas)) == (True, INPUT)
    added, done = [event["item"] for event in events if "item" in event][-2:]
    assert (added["input"], added["status"]) == ("", "in_progress")
    assert done.pop("id") == added["id"]
    assert added["id"].startswith("ctc_")
    assert done.pop("call_id").startswith("call_")
    assert done == {"type": "custom_tool_call", "name": "apply_patch", "input": INPUT, "status": "completed"}
    assert next(event["input"] for event in events if event["type"].endswith("input.done")) == INPUT
    assert events[-1]["response"]["tools"] == [PATCH]


async def test_a_named_custom_tool_whose_input_is_a_regular_expression() -> None:
    digits = {**PATCH, "format": {"type": "grammar", "syntax": "regex", "definition": "[0-9]+"}}
    engine = engine_with_output('{"input": "12"}')
    choice = {"type": "custom", "name": "apply_patch"}
    reply = await respond(engine, tools=[digits], tool_choice=choice, reasoning={"effort": "none"})
    assert "unenforced_schema_keywords" not in reply
    assert engine.requests[-1].grammar is not None
    assert "^(?:[0-9]+)$" in prompt_of(engine)
    unsupported = {**digits, "format": {**digits["format"], "definition": "(?=a)"}}
    reply = await respond(engine, tools=[unsupported])
    assert reply["unenforced_schema_keywords"]["keywords"] == ["tools[0].format.definition"]


async def test_a_lark_grammar_is_shown_and_not_enforced() -> None:
    engine = engine_with_output("</think>x")
    format = {"type": "grammar", "syntax": "lark", "definition": "start: LINE"}
    (warning,) = (await respond(engine, tools=[{**PATCH, "format": format}]))["warnings"]
    assert (warning["type"], warning["param"]) == ("unenforced_grammar", "tools[0].format")
    assert "start: LINE" in prompt_of(engine)


async def test_tools_of_a_namespace() -> None:
    function = {"type": "function", "name": "spawn", "parameters": {"type": "object", "properties": {}}}
    group = {"type": "namespace", "name": "agents", "description": "Agents.", "tools": [function, {"type": "mcp"}]}
    engine = engine_with_output(output_of("agents.spawn", {}))
    reply = await respond(engine, tools=[group])
    call = reply["output"][-1]
    assert (call["type"], call["namespace"], call["name"]) == ("function_call", "agents", "spawn")
    assert [warning["param"] for warning in reply["warnings"]] == ["tools[0].tools[1].type"]
    await respond(engine, input=[{"role": "user", "content": "hi"}, call])
    conversation = ChatConversation(None)
    conversation.add([call], "input")
    assert conversation.messages[0].tool_calls is not None
    assert conversation.messages[0].tool_calls[0]["function"]["name"] == "agents.spawn"


def test_a_custom_call_and_its_result_in_the_input() -> None:
    conversation = ChatConversation(None)
    conversation.add(
        [
            {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": INPUT},
            {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
        ],
        "input",
    )
    assistant, result = conversation.messages
    assert assistant.tool_calls is not None
    assert json.loads(assistant.tool_calls[0]["function"]["arguments"]) == {"input": INPUT}
    assert (result.role, result.content, result.tool_call_id) == ("tool", "done", "c1")


@pytest.mark.parametrize("summary", [None, "auto"])
async def test_reasoning_returns_in_encrypted_content(summary: str | None) -> None:
    fields: Any = {"include": ["reasoning.encrypted_content"], "store": False, "reasoning": {"summary": summary}}
    reasoning = (await respond(engine_with_output("hm é\n</think>\n\nSo."), **fields))["output"][0]
    conversation = ChatConversation(None)
    conversation.add(
        [{"type": "reasoning", "summary": [], **{k: reasoning[k] for k in ("encrypted_content",)}}], "input"
    )
    assert conversation.messages[0].reasoning_content == "hm é"
    assert "encrypted_content" not in (await respond(engine_with_output("hm\n</think>\n\nSo.")))["output"][0]
    for foreign in ("gAAAA", "paceline.é", "paceline.x"):
        other = ChatConversation(None)
        other.add([{"type": "reasoning", "summary": [], "encrypted_content": foreign}], "input")
        assert other.messages == []


@pytest.mark.parametrize(
    ("tool", "field"),
    [
        ({"type": "custom"}, "tools[0].name"),
        ({**PATCH, "format": {"type": "grammar", "syntax": "regex"}}, "tools[0].format.definition"),
        ({**PATCH, "format": {"type": "xml"}}, "tools[0].format.type"),
        ({"type": "namespace", "name": "x"}, "tools[0].tools"),
    ],
)
def test_refused_tools(tool: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestRefused) as error:
        CallableTools([tool])
    assert error.value.field == field


# ── Messages API ──

REFERENCE: Any = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "ToolSearch", "input": {}}]},
    {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": "t1",
                "content": [{"type": "tool_reference", "tool_name": "weather"}],
            }
        ],
    },
]


async def test_deferred_tools_are_shown_after_a_reference() -> None:
    engine = engine_with_output("</think>x")
    search = {"name": "ToolSearch", "input_schema": {"type": "object"}}
    tools = [{**WEATHER, "defer_loading": True}, search]
    await create(engine, tools=tools)
    assert '"ToolSearch"' in prompt_of(engine)
    assert '"weather"' not in prompt_of(engine)
    await create(engine, tools=tools, messages=REFERENCE)
    assert '"weather"' in prompt_of(engine)
    assert "The tool weather is available." in prompt_of(engine)
    unique = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    reply = await create(engine, tools=[tools[0], {**search, "input_schema": unique}])
    assert reply["unenforced_schema_keywords"]["keywords"] == ["tools[1].input_schema/properties/x/uniqueItems"]


@pytest.mark.parametrize(
    ("type", "arguments"),
    [
        ("bash_20250124", {"command": "ls"}),
        ("text_editor_20250728", {"command": "view", "path": "a"}),
        ("text_editor_20250124", {"command": "undo_edit", "path": "a"}),
        ("memory_20250818", {"command": "delete", "path": "/memories/a"}),
    ],
)
def test_tools_that_anthropic_defines_and_the_client_runs(type: str, arguments: dict[str, Any]) -> None:
    definition = client_tool_definition(type)
    assert definition is not None
    validator = jsonschema_rs.validator_for(definition["parameters"])
    assert validator.is_valid(arguments)
    assert not validator.is_valid({**arguments, "other": 1})


async def test_a_call_of_a_tool_that_anthropic_defines() -> None:
    engine = engine_with_output(output_of("bash", {"command": "ls"}))
    reply = await create(engine, tools=[{"type": "bash_20250124", "name": "bash"}])
    assert reply["content"][-1]["input"] == {"command": "ls"}


async def test_fields_of_claude_code_have_no_effect() -> None:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    reply = await create(
        engine_with_output("</think>x"),
        system=system,
        messages=[{"role": "user", "content": "hi"}, {"role": "system", "content": system}],
        metadata={"user_id": "{}"},
        thinking={"type": "adaptive", "display": "omitted"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
    )
    assert (reply["type"], reply["stop_reason"]) == ("message", "end_turn")
