"""Invalid requests get a status and a message that names the field, and never reach the engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from starlette.types import ASGIApp

from api.schema.requests import ChatRequest, TextRequest
from api.server.app import create_app
from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine, app_state

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi", **fields}]}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hi", **fields}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        (message(role=1), "messages[0].role"),
        (message(role=""), "messages[0].role"),
        (message(content=5), "messages[0].content"),
        (message(content=None), "messages[0].content"),
        (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0].type"),
        (message(content=[{"type": "text", "text": "a"}, {"type": "text"}]), "messages[0].content[1].text"),
        (chat(max_tokens=-2), "max_tokens"),
        (chat(max_tokens=10**30), "max_tokens"),
        (chat(max_tokens="5"), "max_tokens"),
        (chat(max_tokens=1.5), "max_tokens"),
        (chat(n=0), "n"),
        (chat(n=129), "n"),
        (chat(seed=2**63), "seed"),
        (chat(temperature=-0.1), "temperature"),
        (chat(temperature="hot"), "temperature"),
        (chat(temperature=1e300), "temperature"),
        (chat(top_p=1.1), "top_p"),
        (chat(top_k=10**12), "top_k"),
        (chat(top_k=-2), "top_k"),
        (chat(frequency_penalty=101), "frequency_penalty"),
        (chat(repetition_penalty=0), "repeat_penalty"),
        (chat(min_tokens=-1), "min_tokens"),
        (chat(stop=7), "stop"),
        (chat(stop=["a", 7]), "stop[1]"),
        (chat(stop="x" * 513), "stop"),
        (chat(stop=["x"] * 65), "stop"),
        (chat(stream="yes"), "stream"),
        (chat(stream_options=[]), "stream_options"),
        (chat(logprobs=3), "logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (chat(top_logprobs=2), "top_logprobs"),
        (chat(logit_bias={"1": "x"}), "logit_bias[...]"),
        (chat(logit_bias=[[1, True]]), "logit_bias"),
        (chat(logit_bias={"9" * 5000: 1}), "logit_bias"),
        (message(tool_calls=[{}]), "messages[0].tool_calls[0].function"),
        (message(tool_calls=[{"function": {"name": "f"}}, {"function": "f"}]), "messages[0].tool_calls[1].function"),
        (chat(tools=[{"type": "function"}]), "tools[0].function"),
        (chat(function_call={"name": "f"}), "function_call"),
        (chat(tool_choice="required"), "tool_choice"),
        (chat(response_format={"type": "yaml"}), "response_format.type"),
        (chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
            "response_format.json_schema.schema",
        ),
        (chat(response_format="json"), "response_format"),
        (chat(grammar="root ::= x"), "grammar"),
        (chat(grammar="start: x"), "grammar"),
        (chat(grammar={}), "grammar"),
        (chat(grammar="\n" * 300_000), "grammar"),
        (chat(guided_json="{"), "guided_json"),
        (chat(guided_json=[]), "guided_json"),
        (chat(guided_regex="("), "guided_regex"),
        (chat(guided_choice=[]), "guided_choice"),
        (chat(guided_choice=[1]), "guided_choice[0]"),
        (chat(structured_outputs={"structural_tag": "{}"}), "structured_outputs.structural_tag"),
        (chat(structured_outputs={"grammar": "root ::= ("}), "structured_outputs.grammar"),
        (chat(guided_regex="a", guided_choice=["a"]), "guided_choice"),
        (chat(response_format={"type": "json_object"}, grammar='root ::= "a"'), "grammar"),
        (chat(logit_bias={"x": True}), "logit_bias"),
        (chat(logit_bias=[[-1, 1]]), "logit_bias"),
        (chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message"),
        (chat(chat_template_kwargs=[]), "chat_template_kwargs"),
        (chat(speculative=5), "speculative"),
        (chat(speculative=[]), "speculative"),
        (chat(speculative="sufix"), "speculative"),
        (chat(speculative={"type": "sufix"}), "speculative.type"),
        (chat(speculative={"type": 5}), "speculative.type"),
        (chat(speculative={"type": ["suffix", "sufix"]}), "speculative.type[1]"),
        (chat(speculative={"type": ["suffix", {}]}), "speculative.type[1]"),
        (chat(speculative={"type": "draft"}), "speculative.type"),
        (chat(speculative={"n_mex": 5}), "speculative.n_mex"),
        (chat(speculative={"n_max": 0}), "speculative.n_max"),
        (chat(speculative={"n_max": 5.5}), "speculative.n_max"),
        (chat(speculative={"n_max": 5, "n_min": 6}), "speculative.n_min"),
        (chat(speculative={"n_min": -1}), "speculative.n_min"),
        (chat(speculative={"p_min": 1.5}), "speculative.p_min"),
        (chat(speculative={"size_n": 0}), "speculative.size_n"),
        (chat(speculative={"min_hits": "2"}), "speculative.min_hits"),
        (chat(prediction="hi"), "prediction"),
        (chat(prediction={"type": "content"}), "prediction.content"),
        (chat(prediction={"content": "hi"}), "prediction.type"),
        (chat(prediction={"type": "text", "content": "hi"}), "prediction.type"),
        (chat(prediction={"type": "content", "content": 5}), "prediction.content"),
        (chat(prediction={"type": "content", "content": ["hi"]}), "prediction.content[0]"),
        (chat(prediction={"type": "content", "content": [{"type": "image"}]}), "prediction.content[0].type"),
        (chat(prediction={"type": "content", "content": [{"type": "text"}]}), "prediction.content[0].text"),
    ],
    ids=lambda value: str(value)[:200],
)
async def test_chat_names_the_field(app: ASGIApp, engine: FakeEngine, body: dict[str, Any], param: str | None) -> None:
    answer = await post(app, CHAT, body)
    assert answer.status == 400
    error = answer.json["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10
    assert engine.log == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt.prompt_string"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        (text(logprobs=True), "logprobs"),
        (text(logprobs=21), "logprobs"),
        (text(echo=True, logprobs=1), "echo"),
        (text(suffix="x"), "suffix"),
        (text(best_of=2), "best_of"),
        ({"prompt": ["a"] * 100, "n": 3}, "n"),
        ({"prompt": ["a"] * 1000}, "prompt"),
        (text(speculative={"type": "sufix"}), "speculative.type"),
        (text(prediction={"type": "text", "content": "hi"}), "prediction.type"),
    ],
    ids=lambda value: str(value)[:200],
)
async def test_text_names_the_field(app: ASGIApp, engine: FakeEngine, body: dict[str, Any], param: str | None) -> None:
    answer = await post(app, TEXT, body)
    assert answer.status == 400
    assert answer.json["error"]["param"] == param
    assert engine.log == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"[]",
        b"null",
        b"[" * 10_000,
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_not_json(app: ASGIApp, engine: FakeEngine, path: str, body: bytes) -> None:
    answer = await post(app, path, body)
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    path=st.sampled_from([(CHAT, ChatRequest), (TEXT, TextRequest)]),
    data=st.data(),
)
async def test_no_json_causes_a_fault(path: tuple[str, type[Struct]], data: st.DataObject) -> None:
    """Every JSON body gets 200 or a refusal."""
    names = st.sampled_from(path[1].__struct_fields__)
    fields = data.draw(st.dictionaries(names, VALUES, max_size=4))
    app = create_app(app_state(FakeEngine()))
    answer = await post(app, path[0], {"messages": HELLO, "prompt": "hi", **fields})
    assert answer.status in (200, 400, 404)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: the field is missing; expected a list of at least 1 item"),
        ({"messages": "hi"}, "messages: expected a list of at least 1 item, not 'hi'"),
        (message(role=""), "messages[0].role: expected a string of 1 to 64 characters, not ''"),
        (chat(temperature=-1), "temperature: expected a number from 0 to 100, not -1"),
        (chat(temperature="hot"), "temperature: expected a number from 0 to 100, not 'hot'"),
        (chat(top_k=10**12), "top_k: expected a whole number from -2^31 to 2^31 - 1, not 1000000000000"),
        (chat(repeat_penalty=0), "repeat_penalty: expected a number above 0, up to 100, not 0"),
        (chat(n=True), "n: expected a whole number from 1 to 128, not true"),
        (chat(stop=["x"] * 65), "stop: expected a string of at most 512 characters or a list of at most 64 items, not"),
        (chat(stop=["a", 7]), "stop[1]: expected a string of at most 512 characters, not 7"),
        (chat(speculative={"n_max": 0}), "speculative.n_max: expected a whole number from 1 to 1024, not 0"),
        (chat(tools=[{"type": "function"}]), "tools[0].function: the field is missing; expected an object"),
        (chat(reasoning_format="x"), "reasoning_format: expected one of auto, deepseek, none, not 'x'"),
        (
            chat(structured_outputs={"regx": "a"}),
            "structured_outputs.regx: there is no such field; the nearest is regex",
        ),
    ],
    ids=lambda value: str(value)[:100],
)
async def test_messages_name_the_expected_and_the_given_value(app: ASGIApp, body: dict[str, Any], message: str) -> None:
    assert (await post(app, CHAT, body)).json["error"]["message"].startswith(message)


async def test_errors_name_the_nearest_valid_name(app: ASGIApp) -> None:
    for field, close in (({"type": "sufix"}, "suffix"), ({"n_mex": 5}, "n_max")):
        message = (await post(app, CHAT, chat(speculative=field))).json["error"]["message"]
        assert message.endswith(f"; the nearest is {close}")


async def test_unused_tools_are_not_checked(app: ASGIApp) -> None:
    for body in (chat(tools=[]), chat(tools=[{"type": "function"}], tool_choice="none"), chat(tool_choice="auto")):
        assert (await post(app, CHAT, body)).status == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_unknown_model(app_of: Apps, path: str) -> None:
    answer = await post(app_of(strict_model=True), path, {"messages": HELLO, "prompt": "hi", "model": "gpt-5"})
    assert answer.status == 404
    error = answer.json["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'fake-1'" in error["message"]


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (TEXT, "prompt")])
async def test_a_prompt_longer_than_the_context(app: ASGIApp, path: str, param: str) -> None:
    long = "x" * 600
    answer = await post(app, path, {"messages": [{"role": "user", "content": long}], "prompt": long})
    assert answer.status == 400
    error = answer.json["error"]
    assert (error["type"], error["code"]) == ("exceed_context_size_error", "context_length_exceeded")
    assert error["param"] == param
    assert error["n_prompt_tokens"] >= 600
    assert error["n_ctx"] == 512


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large(app_of: Apps, announced: bool) -> None:
    app, body = app_of(), b"x" * 10_000_000
    body_chunks = None if announced else [body[at : at + 65536] for at in range(0, len(body), 65536)]
    answer = await call(app, "POST", CHAT, body, body_chunks=body_chunks)
    assert answer.status == 413
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert "8388608" in answer.json["error"]["message"]


async def test_a_body_of_the_maximum_size(app_of: Apps) -> None:
    body = b'{"prompt": "hi"}'
    padded = body + b" " * (1024 - len(body))
    assert (await post(app_of(max_body=1024), TEXT, padded)).status == 200
    assert (await post(app_of(max_body=1024), TEXT, padded + b" ")).status == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("POST", "/", 405), ("GET", CHAT, 405), ("PUT", "/v1/models", 405)],
)
async def test_unknown_paths_and_methods(app: ASGIApp, method: str, path: str, status: int) -> None:
    answer = await call(app, method, path)
    assert answer.status == status
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert path in answer.json["error"]["message"]
    assert ("allow" in answer.headers) is (status == 405)
