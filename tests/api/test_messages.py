"""POST /v1/messages without a model: requests as chats, whole replies, events, and errors in Anthropic's shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import ASGIApp

from api.anthropic.blocks import BlockEvents, content_blocks
from api.tools.formats import ArgumentsDelta, ContentDelta, MessageDelta, ReasoningDelta, ToolCallStart
from engine import Finished, FinishReason, PrefillProgress, Request, Timings, Usage
from tests.api.asgi import CapturedResponse, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine, Step, endless, silence
from tests.api.test_tools import CALL, QWEN, app_of, engine_with_output, prompt_of

WEATHER: Any = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
UNIQUE: Any = {"type": "array", "uniqueItems": True}
HI: Any = [{"role": "user", "content": "hi"}]
# Shows the parts of messages that the conversion sets.
PLAIN = (
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}] "
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>{% endfor %}"
    "{{ '\n' }}{% endfor %}"
)
ANSWER = f"hm\n</think>\n\nSo.\n{CALL}"


async def create(engine: FakeEngine, **fields: Any) -> Any:
    reply = await post(app_of(engine), "/v1/messages", {"messages": HI, "max_tokens": 200, **fields})
    return reply.json


async def events_of(engine: FakeEngine, **fields: Any) -> list[Any]:
    """Returns the events of a stream. The name of each is its type."""
    body = {"messages": HI, "max_tokens": 200, "stream": True, **fields}
    response = await post(app_of(engine), "/v1/messages", body)
    return parse_events(response)


def parse_events(response: CapturedResponse) -> list[Any]:
    events = []
    for text in b"".join(response.chunks).decode().split("\n\n")[:-1]:
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


async def test_a_whole_message() -> None:
    reply = await create(engine_with_output(ANSWER), tools=[WEATHER])
    thinking, text, use = reply.pop("content")
    assert thinking.pop("signature")
    assert thinking == {"type": "thinking", "thinking": "hm"}
    assert text == {"type": "text", "text": "So."}
    assert use.pop("id")
    assert use == {"type": "tool_use", "name": "weather", "input": {"city": "Bern"}}
    assert reply.pop("id").startswith("msg_")
    prompt = reply["usage"].pop("input_tokens")
    assert prompt > 0
    assert reply == {
        "type": "message",
        "role": "assistant",
        "model": "fake-1",
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "output_tokens": len(ANSWER),
            "cache_read_input_tokens": 2,
            "cache_creation_input_tokens": 0,
        },
    }


async def test_a_streamed_message_has_the_same_content() -> None:
    events = await events_of(engine_with_output(ANSWER), tools=[WEATHER])
    whole = await create(engine_with_output(ANSWER), tools=[WEATHER])
    assert events[0]["type"] == "message_start"
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"] + 2
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [event["content_block"]["type"] for event in starts] == ["thinking", "text", "tool_use"]
    assert [event["index"] for event in starts] == [0, 1, 2]
    assert starts[2]["content_block"]["input"] == {}
    grown: list[dict[str, str]] = [{} for _ in starts]
    for event in events:
        if event["type"] == "content_block_delta":
            (field,) = event["delta"].keys() - {"type"}
            block = grown[event["index"]]
            block[field] = block.get(field, "") + event["delta"][field]
            assert event["delta"]["type"] == ("input_json" if field == "partial_json" else field) + "_delta"
    assert grown[0] == {key: whole["content"][0][key] for key in ("thinking", "signature")}
    assert grown[1] == {"text": "So."}
    assert json.loads(grown[2]["partial_json"]) == {"city": "Bern"}
    assert [event["type"] for event in events if event["type"].endswith("stop")] == ["content_block_stop"] * 3 + [
        "message_stop"
    ]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"] == whole["usage"]


def test_whole_blocks_and_events_group_deltas_equally() -> None:
    deltas: list[MessageDelta] = [
        ReasoningDelta("a"),
        ReasoningDelta("b"),
        ContentDelta("c"),
        ToolCallStart(0, "x", "f"),
        ArgumentsDelta(0, '{"n": '),
        ArgumentsDelta(0, "1}"),
        ToolCallStart(1, "y", "f"),
        ContentDelta("d"),
    ]
    blocks = content_blocks(deltas, shows_thinking=True)
    assert [str(block.__struct_config__.tag) for block in blocks] == [
        "thinking",
        "text",
        "tool_use",
        "tool_use",
        "text",
    ]
    for size in (1, 2, len(deltas)):
        stream = BlockEvents(shows_thinking=True)
        steps = [deltas[at : at + size] for at in range(0, len(deltas), size)]
        events = [event for step in steps for event in stream.feed(step)] + list(stream.finish())
        kinds = [str(event.__struct_config__.tag) for event in events]
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(blocks)
        assert kinds[0] == "content_block_start"
        assert kinds[-1] == "content_block_stop"


async def test_the_first_event_has_the_cached_tokens_of_the_prefill() -> None:
    def script(request: Request) -> Iterator[Step]:
        yield PrefillProgress(len(request.prompt), 5, 5, 0.1)
        yield PrefillProgress(len(request.prompt), 5, len(request.prompt), 0.2)
        yield b"ok"

    events = await events_of(FakeEngine(script))
    usage = events[0]["message"]["usage"]
    assert usage["cache_read_input_tokens"] == 5
    assert usage["output_tokens"] == 0
    assert [event["type"] for event in events].count("message_start") == 1


async def test_an_idle_stream_has_pings(app_of: Apps, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"a", 0.03, b"b"]
    response = await post(app_of(sse_ping=0.01), "/v1/messages", {"messages": HI, "stream": True})
    assert {"type": "ping"} in parse_events(response)


@pytest.mark.parametrize(
    ("reason", "stop", "tokens", "expected"),
    [
        ("stop", None, (5, 3), ("end_turn", None)),
        ("stop", 257, (5, 3), ("end_turn", None)),
        ("stop", "END", (5, 3), ("stop_sequence", "END")),
        ("length", None, (502, 10), ("max_tokens", None)),
        ("length", None, (509, 3), ("model_context_window_exceeded", None)),
    ],
)
async def test_stop_reasons(reason: str, stop: Any, tokens: tuple[int, int], expected: tuple[str, str | None]) -> None:
    engine = FakeEngine()
    end = Finished(FinishReason(reason), Usage(tokens[0], 0, tokens[1]), Timings(0.1, 0.1, 0.1), 0, stop=stop)
    engine._finished = lambda *_: end  # type: ignore[method-assign]
    reply = await create(engine, max_tokens=10, stop_sequences=["END"])
    assert (reply["stop_reason"], reply["stop_sequence"]) == expected


async def test_the_arguments_before_a_cut_are_the_input() -> None:
    cut = '</think><tool_call>\n{"name": "weather", "arguments": {"city": "Be'
    reply = await create(engine_with_output(cut), tools=[WEATHER], max_tokens=len(cut))
    assert reply["stop_reason"] == "max_tokens"
    assert reply["content"][0]["input"] == {"city": "Be"}


async def test_a_conversation_of_blocks() -> None:
    engine = engine_with_output("ok", PLAIN)
    text = {"type": "text", "cache_control": {"type": "ephemeral"}}
    uses = [{"type": "tool_use", "id": name, "name": name, "input": {"n": 1}} for name in ("one", "two")]
    results = [
        {"type": "tool_result", "tool_use_id": "one", "content": [{"type": "text", "text": "1"}]},
        {"type": "tool_result", "tool_use_id": "two", "content": "no such file", "is_error": True},
        {"type": "tool_result", "tool_use_id": "other"},
    ]
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    messages = [
        {"role": "user", "content": [{**text, "text": "a"}, document]},
        {"role": "user", "content": "b"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {**text, "text": "c"},
                *uses,
            ],
        },
        {"role": "user", "content": [*results, {**text, "text": "go"}]},
    ]
    system = [
        {**text, "text": "x-anthropic-billing-header: cc_version=1; cch=12345;"},
        {**text, "text": "Be brief."},
    ]
    await create(engine, system=system, messages=messages, metadata={"user_id": "u"})
    assert prompt_of(engine).splitlines() == [
        "[system] Be brief.",
        "[user] a",
        "T",
        "D",
        "b",
        '[assistant] (hm)c<one {"n": 1}><two {"n": 1}>',
        "[tool one] 1",
        "[tool two] Error: no such file",
        "[tool] ",
        "[user] go",
    ]


async def test_fields_become_those_of_a_chat() -> None:
    engine = engine_with_output("</think>ok")
    await create(engine, temperature=0.5, top_p=0.7, top_k=7, stop_sequences=["a"], stop="b", seed=3, max_tokens=9)
    request = engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.7, 7)
    assert (request.stop, request.max_tokens) == (("b", "a"), 9)
    await post(app_of(engine), "/v1/messages?beta=true", {"messages": HI})
    assert engine.requests[-1].max_tokens == 4096


@pytest.mark.parametrize(
    ("thinking", "tokens"),
    [
        (None, None),
        ({"type": "adaptive"}, None),
        ({"type": "enabled", "budget_tokens": 5}, 5),
        ({"type": "disabled"}, None),
    ],
)
async def test_thinking(thinking: Any, tokens: int | None) -> None:
    engine = engine_with_output("ok", QWEN)
    await create(engine, thinking=thinking)
    assert prompt_of(engine).endswith("</think>\n") == (thinking == {"type": "disabled"})
    reasoning = engine.requests[-1].reasoning
    if thinking != {"type": "disabled"}:
        assert (reasoning and reasoning.tokens) == tokens


async def test_omitted_thinking_has_a_signature_and_no_text() -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    reply = await create(engine_with_output("hm</think>ok"), thinking=thinking)
    assert reply["content"][0]["thinking"] == ""
    events = await events_of(engine_with_output("hm</think>ok"), thinking=thinking)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert deltas[0] == {"type": "signature_delta", "signature": reply["content"][0]["signature"]}
    assert "thinking_delta" not in [delta["type"] for delta in deltas]


@pytest.mark.parametrize(
    ("choice", "same_as"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"parallel_tool_calls": False}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "weather"},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        ),
    ],
)
async def test_tool_choice_and_prompt_are_those_of_a_chat(choice: Any, same_as: Any) -> None:
    engine = engine_with_output("</think>ok")
    await create(engine, tools=[{**WEATHER, "type": "custom", "description": "d"}], tool_choice=choice)
    function = {"name": "weather", "description": "d", "parameters": WEATHER["input_schema"]}
    body = {"messages": HI, "tools": [{"type": "function", "function": function}], **same_as}
    await post(app_of(engine), "/v1/chat/completions", body)
    first, second = engine.requests
    assert first.prompt == second.prompt
    assert first.grammar is not None
    assert second.grammar is not None
    assert first.grammar.spec == second.grammar.spec


@pytest.mark.parametrize("field", ["output_format", "output_config"])
async def test_an_answer_by_a_schema(field: str) -> None:
    engine = engine_with_output('{"a": 1}', PLAIN)
    output_format = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    value = output_format if field == "output_format" else {"format": output_format, "effort": "low"}
    reply = await create(engine, **{field: value})
    assert json.loads(reply["content"][0]["text"]) == {"a": 1}
    assert engine.requests[-1].grammar is not None


async def test_keywords_that_are_not_enforced_are_reported() -> None:
    schema = {"type": "object", "properties": {"a": UNIQUE}}
    fields = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    reply = await create(engine_with_output('{"a": [1, 1]}', PLAIN), **fields)
    found = {"keywords": ["output_config.format.schema/properties/a/uniqueItems"], "satisfied": [False]}
    assert reply["unenforced_schema_keywords"] == found
    events = await events_of(engine_with_output('{"a": [1, 1]}', PLAIN), **fields)
    assert events[-2]["unenforced_schema_keywords"] == found


async def test_count_tokens() -> None:
    engine = engine_with_output("ok")
    body = {"messages": HI, "tools": [WEATHER], "system": "s" * 600}
    reply = await post(app_of(engine), "/v1/messages/count_tokens", body)
    assert reply.json["input_tokens"] > 600, "the prompt may be longer than the context"
    assert engine.requests == []
    body["system"] = "s"
    short = await post(app_of(engine), "/v1/messages/count_tokens", body)
    usage = (await create(engine, **body))["usage"]
    assert short.json == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_cancels_the_message(engine: FakeEngine, app: ASGIApp, stream: bool) -> None:
    engine.script = endless if stream else silence
    gone = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, gone.set)
    await post(app, "/v1/messages", {"messages": HI, "stream": stream}, disconnect=gone)
    assert engine.log == ["submit", "cancel"]
