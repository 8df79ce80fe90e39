"""Errors of POST /v1/messages: refusals with the path of the field, and other errors in Anthropic's shape."""

from __future__ import annotations

from typing import Any

import pytest

from api.server.app import create_app
from engine import EngineFault, Overloaded
from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine, app_state
from tests.api.test_messages import HI, PLAIN, UNIQUE, WEATHER, events_of
from tests.api.test_tools import app_of, engine_with_output


def block_error(block: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [block]}]}


@pytest.mark.parametrize(
    ("fields", "beginning"),
    [
        ({"messages": []}, "messages: expected a list of at least 1 item"),
        (
            {"messages": [{"role": "human", "content": "hi"}]},
            "messages[0].role: expected one of assistant, system, user",
        ),
        (
            block_error({"type": "image", "source": {"type": "base64"}}),
            "messages[0].content[0].source.data: the field is missing",
        ),
        (
            block_error({"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}),
            "messages[0].content[0].content[0].source: expected an object",
        ),
        (
            block_error({"type": "document", "source": {"type": "base64", "data": ""}}),
            "messages[0].content[0].source.type: Blocks of type 'document' with a source of type 'base64'",
        ),
        (block_error({"type": "text"}), "messages[0].content[0].text: the field is missing"),
        (
            block_error({"type": "document", "source": {"type": "text"}}),
            "messages[0].content[0].source.data: the field is missing",
        ),
        (block_error({"type": "tool_result"}), "messages[0].content[0].tool_use_id: the field is missing"),
        (
            block_error({"type": "tool_use", "id": "x"}, "assistant"),
            "messages[0].content[0].name: the field is missing",
        ),
        (block_error({"type": "server_tool_use"}, "assistant"), "messages[0].content[0].type: Blocks of type 'server_"),
        ({"system": [{"type": "image"}]}, "system[0].type: Blocks of type 'image'"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0].type: Tools of type 'web_search_20250305' are not supported",
        ),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema: the field is missing"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name: expected a string"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type: The type"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name: Two tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: type 'any' needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name: the field is missing"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name: No tool is named 'x'"),
        ({"temperature": -1}, "temperature: expected a number from 0 to 100, not -1"),
        ({"n": 2}, "n: a message has one choice"),
        ({"thread": {"type": "create"}}, "thread: this server holds no conversations"),
        ({"compaction": {"type": "summarize"}}, "compaction: this server summarizes no conversations"),
        ({"reasoning_effort": "low"}, "reasoning_effort: a message has no such field"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers: this server calls no MCP servers"),
        (
            {"tools": [{"name": "f", "strict": True, "input_schema": {"properties": {"x": UNIQUE}}}]},
            "tools[0].input_schema/properties/x/uniqueItems",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            "prompt is too long: 608 tokens > 511 maximum. This model's",
        ),
    ],
)
async def test_refusals(fields: Any, beginning: str) -> None:
    body = {"messages": HI, "max_tokens": 10, **fields}
    response = await post(app_of(engine_with_output("ok", PLAIN)), "/v1/messages", body)
    error = response.json
    assert (response.status, error["type"]) == (400, "error")
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"].startswith(beginning)
    assert error["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]


async def test_other_errors(app_of: Apps, engine: FakeEngine) -> None:
    async def error_of(app: Any, path: str = "/v1/messages", method: str = "POST", **fields: str) -> tuple[Any, str]:
        response = await call(app, method, path, {"messages": HI, **fields})
        assert response.json["type"] == "error"
        return response.status, response.json["error"]["type"]

    protected = app_of(api_keys=["one"])
    assert await error_of(protected) == (401, "authentication_error")
    assert await error_of(app_of(), "/v1/messages/batches") == (404, "not_found_error")
    assert await error_of(app_of(), method="GET") == (405, "invalid_request_error")
    assert await error_of(app_of(max_body=1024), padding="x" * 1024) == (413, "request_too_large")
    accepted = await call(protected, "POST", "/v1/messages", {"messages": HI}, headers={"x-api-key": "one"})
    assert accepted.status == 200
    engine.refusal = Overloaded(2.0)
    assert await error_of(app_of()) == (429, "rate_limit_error")


async def test_an_unavailable_server_is_overloaded(engine: FakeEngine) -> None:
    state = app_state(engine)
    state.draining = True
    response = await post(create_app(state), "/v1/messages", {"messages": HI})
    assert (response.status, response.json["error"]["type"]) == (529, "overloaded_error")
    assert response.headers["retry-after"] == "5"


async def test_an_error_after_the_first_event_is_the_last_event(engine: FakeEngine) -> None:
    engine.script = lambda request: [b"a", EngineFault("broken")]
    events = await events_of(engine)
    assert events[-1]["error"] == {"type": "api_error", "message": "broken"}
    assert "message_stop" not in [event["type"] for event in events]
