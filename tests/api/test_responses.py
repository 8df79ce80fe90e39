"""POST /v1/responses over raw ASGI: items, events in order, stored responses, and errors with the paths of fields."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

import pytest
from starlette.types import ASGIApp

from api.openai.responses.conversation import ChatConversation
from api.openai.responses.reply import MessageItem, ReasoningReply, ResponseReply
from api.openai.responses.request import TextOptions
from api.openai.responses.store import ResponseStore
from api.server.app import create_app
from engine import EngineFault, Request
from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine, Step, app_state, hello
from tests.api.test_tools import CALL, WEATHER, engine_with_output, prompt_of

PATH = "/v1/responses"
TOOL: dict[str, Any] = {"type": "function", **cast("dict[str, Any]", WEATHER["function"])}
TURN = f"hm\n</think>\n\nSo.\n{CALL}"


async def respond(engine: FakeEngine, path: str = PATH, **fields: Any) -> Any:
    answer = await post(create_app(app_state(engine)), path, {"input": "hi", **fields})
    return answer.json


async def streamed(engine: FakeEngine, **fields: Any) -> list[Any]:
    """Returns the data of the events, after checking their names and numbers."""
    answer = await post(create_app(app_state(engine)), PATH, {"input": "hi", "stream": True, **fields})
    blocks = [block for block in b"".join(answer.chunks).decode().split("\n\n") if block]
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def kinds(events: Iterable[Any]) -> list[str]:
    """Returns the types without their prefix; repeated deltas count once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for at, name in enumerate(names) if at == 0 or name != names[at - 1]]


async def test_a_text() -> None:
    reply = await respond(FakeEngine(hello), instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=99)
    assert reply["id"].startswith("resp_")
    assert reply["object"] == "response"
    assert (reply["status"], reply["error"], reply["incomplete_details"]) == ("completed", None, None)
    (item,) = reply["output"]
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "Hello wörld", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert reply["usage"].pop("input_tokens_details") == {"cached_tokens": 2}
    assert reply["usage"].pop("output_tokens_details") == {"reasoning_tokens": 0}
    assert reply["usage"]["total_tokens"] == reply["usage"]["input_tokens"] + reply["usage"]["output_tokens"]
    echoed = ("instructions", "metadata", "max_output_tokens", "store", "tool_choice", "truncation", "text")
    assert [reply[name] for name in echoed] == [
        "Be brief.",
        {"a": "b"},
        99,
        True,
        "auto",
        "disabled",
        {"format": {"type": "text"}},
    ]
    assert reply["temperature"] == 0.8


async def test_the_events_of_a_text() -> None:
    events = await streamed(FakeEngine(hello))
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    added = next(event for event in events if event["type"] == "response.output_item.added")
    assert (added["item"]["content"], added["item"]["status"]) == ([], "in_progress")
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "Hello wörld"
    assert {event["item_id"] for event in events if "item_id" in event} == {added["item"]["id"]}
    final = events[-1]["response"]
    assert final["output"] == [events[-2]["item"]]
    assert final["usage"]["output_tokens"] > 0
    assert "predicted_n" in events[-1]["timings"]
    assert (events[0]["response"]["status"], events[0]["response"]["usage"]) == ("in_progress", None)


async def test_reasoning_and_a_call() -> None:
    reply = await respond(engine_with_output(TURN), tools=[TOOL])
    reasoning, message, function_call = reply["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
    assert message["content"][0]["text"] == "So."
    assert function_call["id"].startswith("fc_")
    assert function_call["call_id"].startswith("call_")
    assert (function_call["name"], json.loads(function_call["arguments"])) == ("weather", {"city": "Bern"})
    assert reply["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert reply["tools"] == [{"description": None, "strict": False, **TOOL}]


@pytest.mark.parametrize("summary", [None, "auto"])
async def test_the_events_of_reasoning_and_a_call(summary: str | None) -> None:
    events = await streamed(engine_with_output(TURN), tools=[TOOL], reasoning={"summary": summary})
    part, text = ("content_part", "reasoning_text")
    if summary:
        part, text = "reasoning_summary_part", "reasoning_summary_text"
    assert kinds(events)[2:-1] == [
        "output_item.added",
        f"{part}.added",
        f"{text}.delta",
        f"{text}.done",
        f"{part}.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert [e["output_index"] for e in events if e["type"] == "response.output_item.done"] == [0, 1, 2]
    arguments = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(arguments) == '{"city": "Bern"}'
    assert len(arguments) > 2


async def test_an_output_that_reaches_the_limit() -> None:
    events = await streamed(FakeEngine(hello), max_output_tokens=3)
    final = events[-1]
    assert final["type"] == "response.incomplete"
    assert final["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert final["response"]["output"][0]["status"] == "incomplete"
    assert final["response"]["completed_at"] is None


async def test_a_call_that_is_cut_is_incomplete() -> None:
    output = f"</think>{CALL}"
    events = await streamed(engine_with_output(output), tools=[TOOL], max_output_tokens=len(output) - 20)
    item = events[-1]["response"]["output"][-1]
    assert (item["type"], item["status"]) == ("function_call", "incomplete")
    (done,) = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert done["arguments"] == item["arguments"]
    broken = await respond(engine_with_output(output[:-20]), tools=[TOOL])
    assert (broken["status"], broken["output"][-1]["status"]) == ("completed", "incomplete")


async def test_an_empty_output_is_an_empty_message() -> None:
    reply = await respond(FakeEngine(lambda request: []))
    assert [item["content"][0]["text"] for item in reply["output"]] == [""]


async def test_an_error_in_a_stream() -> None:
    def fails(request: Request) -> Iterable[Step]:
        return [b"Hel", 0.001, EngineFault("broken")]

    events = await streamed(FakeEngine(fails))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "broken"}
    answer = await post(
        create_app(app_state(FakeEngine(lambda request: [EngineFault("broken")]))), PATH, {"input": "x"}
    )
    assert (answer.status, answer.json["error"]["type"]) == (500, "server_error")


async def test_log_probabilities_belong_to_the_text() -> None:
    reply = await respond(FakeEngine(hello), include=["message.output_text.logprobs"], top_logprobs=1)
    entries = reply["output"][0]["content"][0]["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "Hello wörld"
    assert [len(entry["top_logprobs"]) for entry in entries] == [1] * len(entries)
    events = await streamed(engine_with_output("hm\n</think>\n\nSo."), top_logprobs=1, tools=[TOOL])
    texts = [e for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(entry["token"] for e in texts for entry in e["logprobs"]).endswith("So.")
    assert "hm" not in json.dumps(texts)


# ── input ──


def messages_of(*items: dict[str, Any], instructions: str | None = None) -> list[Any]:
    conversation = ChatConversation(instructions)
    conversation.add(items, "input")
    return [(message.role, message.content) for message in conversation.messages]


def test_items_of_one_turn_become_one_message() -> None:
    conversation = ChatConversation("Be brief.")
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "In German."},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "So.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "7"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "8"}]},
    ]
    conversation.add(items, "input")
    system, user, assistant, *results = conversation.messages
    assert (system.role, system.content) == ("system", "Be brief.\n\nIn German.")
    assert isinstance(user.content, list)
    assert [part.text for part in user.content] == ["one", "two"]
    assert (assistant.reasoning_content, assistant.content) == ("hm", "So.")
    assert assistant.tool_calls is not None
    assert [each["id"] for each in assistant.tool_calls] == ["c1", "c2"]
    assert [(each.tool_call_id, each.content) for each in results] == [("c1", "7"), ("c2", "8")]
    assert conversation.paths == ["instructions", "input[1]", "input[2]", "input[6]", "input[7]"]


def test_a_summary_is_reasoning_too_and_encrypted_reasoning_is_dropped() -> None:
    conversation = ChatConversation(None)
    conversation.add([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}], "input")
    assert conversation.messages[0].reasoning_content == "hm"
    assert messages_of({"type": "reasoning", "summary": [], "encrypted_content": "x"}) == []


def test_the_reasoning_items_of_one_turn_are_joined() -> None:
    thoughts = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]} for text in ("a", "b")]
    conversation = ChatConversation(None)
    conversation.add([thoughts[0], {"role": "assistant", "content": "So."}, thoughts[1]], "input")
    (message,) = conversation.messages
    assert (message.reasoning_content, message.content) == ("a\n\nb", "So.")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 1}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [{"role": "user", "content": "hi", "id": 5}]}, "input[0].id"),
        ({"input": [{}]}, "input[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"n": 2}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"truncation": "never"}, "truncation"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": {"pattern": "(?=a)"}}}},
            "text.format.schema/pattern",
        ),
        ({"tools": [{"type": "web_search"}, {"type": "function"}]}, "tools[1].name"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": None}]}, "tools[0].type"),
        ({"tools": [None]}, "tools[0]"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tool_choice": {}}, "tool_choice.type"),
        ({"top_logprobs": 1.5}, "top_logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"documents": 5}, "documents"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"enable_thinking": "x"}, "enable_thinking"),
        ({"reasoning_budget": 1.5}, "reasoning_budget"),
        ({"tools": [{"type": "computer_use", "strict": True}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]},
            },
            "tool_choice.tools",
        ),
        ({"input": "x" * 600}, "input"),
    ],
)
async def test_refusals_name_the_field_of_this_api(
    app: ASGIApp, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    answer = await post(app, PATH, {"input": "hi", **fields})
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert engine.log == []


async def test_other_tools_are_dropped_with_a_warning() -> None:
    engine = engine_with_output("</think>x")
    reply = await respond(engine, tools=[{"type": "web_search"}, TOOL])
    (warning,) = reply["warnings"]
    assert (warning["type"], warning["param"]) == ("unsupported_tool", "tools[0].type")
    assert "web_search" in warning["message"]
    assert "weather" in prompt_of(engine)
    assert "web_search" not in prompt_of(engine)
    assert "warnings" not in await respond(engine, tools=[TOOL])


async def test_fields_act_as_in_a_chat() -> None:
    engine = engine_with_output("</think>x")
    await respond(engine, reasoning={"effort": "none"}, stop="y", seed=4, top_p=0.5, max_output_tokens=7)
    request = engine.requests[-1]
    assert prompt_of(engine).endswith("[assistant]<think>\n\n</think>\n")
    assert (request.stop, request.sampling.top_p, request.max_tokens) == (("y",), 0.5, 7)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    await respond(engine, text={"format": {"type": "json_schema", "name": "x", "schema": schema}})
    assert engine.requests[-1].grammar is not None
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    await respond(engine, tools=[{**TOOL, "name": "other"}, TOOL], tool_choice=allowed)
    assert '"other"' not in prompt_of(engine)
    assert engine.requests[-1].grammar is not None


async def test_keywords_that_are_not_enforced_have_paths_of_this_api() -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    reply = await respond(
        engine_with_output("</think>x"), tools=[{"type": "web_search"}, {**TOOL, "parameters": parameters}]
    )
    assert reply["unenforced_schema_keywords"]["keywords"] == ["tools[1].parameters/properties/x/uniqueItems"]


async def test_automatic_truncation_drops_the_oldest_turns() -> None:
    engine = FakeEngine(hello)
    turns = [{"role": "user", "content": f"question {number}"} for number in range(40)]
    body: dict[str, Any] = {"input": [{"role": "system", "content": "Be brief."}, *turns], "max_output_tokens": 20}
    assert (await respond(engine, **body))["error"]["code"] == "context_length_exceeded"
    reply = await respond(engine, **body, truncation="auto")
    assert reply["status"] == "completed"
    prompt = prompt_of(engine)
    assert "Be brief." in prompt
    assert "question 39" in prompt
    assert "question 0\n" not in prompt
    longest = len(engine.requests[-1].prompt)
    assert 450 < longest <= engine.request_limit - 20


# ── stored responses ──


async def test_a_response_continues_another(app: ASGIApp, engine: FakeEngine) -> None:
    first = (await post(app, PATH, {"input": "one", "instructions": "Only here."})).json
    second = (await post(app, PATH, {"input": "two", "previous_response_id": first["id"], "stream": True})).chunks
    prompt = prompt_of(engine)
    assert prompt.index("one") < prompt.index("Hello wörld") < prompt.index("two")
    assert "Only here." not in prompt
    final = json.loads(b"".join(second).decode().split("data: ")[-1])["response"]
    assert final["previous_response_id"] == first["id"]
    assert (await call(app, "GET", f"{PATH}/{final['id']}")).json == final
    items = (await call(app, "GET", f"{PATH}/{final['id']}/input_items?order=asc&limit=2")).json
    assert [item["role"] for item in items["data"]] == ["user", "assistant"]
    assert (items["has_more"], items["last_id"]) == (True, first["output"][0]["id"])
    rest = (await call(app, "GET", f"{PATH}/{final['id']}/input_items?order=asc&after={items['last_id']}")).json
    assert [item["content"][0]["text"] for item in rest["data"]] == ["two"]


async def test_items_are_referenced_by_id(app: ASGIApp, engine: FakeEngine) -> None:
    first = (await post(app, PATH, {"input": "one"})).json
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    await post(app, PATH, {"input": [{"role": "user", "content": "x"}, reference, {"role": "user", "content": "y"}]})
    assert "Hello wörld" in prompt_of(engine)


async def test_a_response_is_deleted(app: ASGIApp) -> None:
    id = (await post(app, PATH, {"input": "one"})).json["id"]
    assert (await call(app, "DELETE", f"{PATH}/{id}")).json == {"id": id, "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        assert (await call(app, method, f"{PATH}/{id}")).status == 404
    assert (await post(app, PATH, {"input": "two", "previous_response_id": id})).status == 400


@pytest.mark.parametrize(("config", "fields"), [({}, {"store": False}), ({"response_store": 0}, {})])
async def test_responses_that_are_not_stored(app_of: Apps, config: dict[str, Any], fields: dict[str, Any]) -> None:
    app = app_of(**config)
    reply = (await post(app, PATH, {"input": "one", **fields})).json
    assert reply["store"] is False
    answer = await call(app, "GET", f"{PATH}/{reply['id']}")
    assert answer.status == 404
    assert ("--response-store" in answer.json["error"]["message"]) == bool(config)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_response_that_the_store_cannot_hold_says_so(app_of: Apps, stream: bool) -> None:
    app = app_of(response_store=1)
    answer = await post(app, PATH, {"input": "x", "stream": stream, "metadata": {"a": "b"}, "user": "y" * 2**20})
    last = b"".join(answer.chunks).decode().rpartition("data: ")[2]
    reply = json.loads(last)["response"] if stream else answer.json
    assert (reply["status"], reply["store"]) == ("completed", False)
    assert (await call(app, "GET", f"{PATH}/{reply['id']}")).status == 404


async def test_a_path_with_a_slash_names_no_response(app_of: Apps) -> None:
    assert (await call(app_of(), "GET", f"{PATH}/")).status == 404


async def test_keys_with_namespaces_find_only_their_own_responses(app_of: Apps) -> None:
    app = app_of(api_keys=["a", "b"], cache_salt_by_key=True)
    headers = [{"authorization": f"Bearer {key}"} for key in "ab"]
    id = (await post(app, PATH, {"input": "one"}, headers=headers[0])).json["id"]
    answers = [await call(app, "GET", f"{PATH}/{id}", headers=each) for each in headers]
    assert [answer.status for answer in answers] == [200, 404]


def test_the_store_drops_the_least_recently_used() -> None:
    store = ResponseStore(10_000)
    fields: dict[str, Any] = dict.fromkeys(
        ("instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt_cache_key",
         "safety_identifier", "user")
    )  # fmt: skip

    def reply(id: str) -> ResponseReply:
        return ResponseReply(
            id=id, created_at=1, metadata={}, model="m", output=(MessageItem(f"msg_{id}", "completed", ()),),
            parallel_tool_calls=True, reasoning=ReasoningReply(), store=True, temperature=1.0, text=TextOptions(),
            tool_choice="auto", tools=[], top_logprobs=0, top_p=1.0, truncation="disabled", seed=1, **fields,
        )  # fmt: skip

    for id in "abc":
        assert store.put("", reply(id), [], [{"id": id, "x": "x" * 2000}])
    assert len(store) == 3
    store.get("", "a")
    store.put("", reply("d"), [], [{"id": "d", "x": "x" * 2000}])
    assert store.previous("", "a")
    with pytest.raises(Exception, match="not found"):
        store.previous("", "b")
    assert not store.put("", reply("e"), [], [{"id": "e", "x": "x" * 20_000}])
    assert len(store) == 3
    known = {"type": "item_reference"}
    assert store.resolved_items("", [{**known, "id": "a"}, {**known, "id": "msg_d"}])[0]["x"] == "x" * 2000
    with pytest.raises(Exception, match="not found"):
        store.resolved_items("", [{**known, "id": "b"}])


# ── other endpoints ──


async def test_input_tokens(engine: FakeEngine) -> None:
    counted = await respond(engine, f"{PATH}/input_tokens", instructions="Be brief.", tools=[TOOL])
    assert counted["object"] == "response.input_tokens"
    await respond(engine, instructions="Be brief.", tools=[TOOL])
    assert counted["input_tokens"] == len(engine.requests[-1].prompt)
    body = {"messages": [{"role": "user", "content": "hi"}]}
    chat = (await post(create_app(app_state(engine)), "/v1/chat/completions/input_tokens", body)).json
    await respond(engine)
    assert chat == {"object": "response.input_tokens", "input_tokens": len(engine.requests[-1].prompt)}


async def test_llama_servers_telemetry(engine: FakeEngine) -> None:
    events = await streamed(engine, timings_per_token=True, return_progress=True)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert all("predicted_n" in event["timings"] for event in deltas)
