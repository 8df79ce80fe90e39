"""Events that are written without a task switch, and events that merge for `--sse-coalesce-ms`."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from starlette.types import ASGIApp

from engine import EngineFault
from tests.api.asgi import Writer, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine, Step

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
STEPS: list[Step] = [
    b"<think>",
    b"a b\xc3",
    b"\xb6",
    0.001,
    b"</think>",
    b"one",
    b"",
    b"STO",
    0.001,
    b"L",
    b"ast\n",
    b"STOP",
]
# Ids, times and durations, which differ from call to call.
VARIABLE = re.compile(rb'"(\w*id|created\w*|completed_at|signature|\w+_ms|\w+_per_second)":("[^"]*"|[\d.]+)')

CASES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HI}),
    ("/v1/chat/completions", {"messages": HI, "n": 2, "stop": "STOP", "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"messages": HI, "tools": [TOOL], "stop": ["STOP"], "token_origins": True}),
    ("/v1/chat/completions", {"messages": HI, "logprobs": True, "timings_per_token": True}),
    ("/v1/completions", {"prompt": ["hi", "ho"], "echo": True, "stop": ["STOP", "x"], "max_tokens": 100}),
    ("/v1/completions", {"prompt": "hi", "logprobs": 1, "stream_options": {"continuous_usage_stats": True}}),
    ("/completion", {"prompt": "hi", "n_predict": 20}),
    ("/v1/messages", {"messages": HI, "max_tokens": 20}),
    ("/v1/responses", {"input": "hi", "store": False}),
]


def events(body: bytes) -> list[bytes]:
    """Returns the events of each choice in order, without variable fields."""
    found = [VARIABLE.sub(rb"\1", event) for event in body.split(b"\n\n")]
    return sorted(found, key=lambda event: b'"index":1' in event)


@pytest.mark.parametrize(("path", "fields"), CASES)
async def test_both_ways_to_send_events_have_equal_bytes(
    app: ASGIApp, engine: FakeEngine, path: str, fields: dict[str, Any]
) -> None:
    engine.script = lambda request: STEPS
    body = {**fields, "seed": 5, "stream": True}
    plain, direct = await post(app, path, body), await post(app, path, body, writer=Writer)
    assert direct.written
    assert not plain.written
    assert plain.complete
    assert direct.complete
    assert events(b"".join(direct.chunks)) == events(b"".join(plain.chunks))


async def test_an_error_of_a_written_event_ends_the_stream(
    app: ASGIApp, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.script = lambda request: [b"a", 0.001, b"b", 0.001, b"c", asyncio.Event()]

    def fail(self: Writer, body: bytes) -> None:
        raise EngineFault("broken")

    monkeypatch.setattr(Writer, "write", fail)
    answer = await post(app, "/v1/chat/completions", {"messages": HI, "stream": True}, writer=Writer)
    assert answer.complete
    assert answer.events[-1]["error"]["message"] == "broken"
    assert engine.log == ["submit", "cancel"]


async def test_events_within_the_time_merge(app_of: Apps, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"a", 0.001, b"b", 0.001, b"c", 0.001, b"d"]
    answer = await post(
        app_of(sse_coalesce_ms=1000), "/v1/completions", {"prompt": "hi", "stream": True}, writer=Writer
    )
    assert [chunk["choices"][0]["text"] for chunk in answer.events[:-1]] == ["a", "bcd", ""]
    assert answer.complete


async def test_merged_events_come_after_the_time(app_of: Apps, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"a", 0.001, b"b", 0.001, b"c", asyncio.Event()]
    request = post(app_of(sse_coalesce_ms=20), "/v1/completions", {"prompt": "hi", "stream": True}, disconnect_after=2)
    assert [chunk["choices"][0]["text"] for chunk in (await request).events] == ["a", "bc"]
