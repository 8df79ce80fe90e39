"""Tokens without a completion: /tokenize, /detokenize, /apply-template and vLLM's render endpoints."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from api.llama_server.tokenize import MAX_DETOKENIZED_TOKENS
from api.server.app import create_app
from api.templates.text_tokens import LONG_TEXT_CHARS
from engine.worker_pool import WorkerPool
from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import BOS, END, INFO, START, FakeEngine, app_state
from tests.api.test_refusals import VALUES
from tests.api.test_tools import QWEN, WEATHER

HELLO = [{"role": "user", "content": "hi"}]
CHAT_OF_HELLO = [START, *b"user\nhi", END, *b"\n", START, *b"assistant\n"]


@pytest.fixture
def app_with_bos() -> ASGIApp:
    """Returns an application whose model adds BOS before each text."""
    return create_app(app_state(FakeEngine(info=msgspec.structs.replace(INFO, bos_added=True))))


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"content": "hi"}, [104, 105]),
        ({"content": ""}, []),
        ({"content": "hi", "add_special": True}, [BOS, 104, 105]),
        ({"content": "<s>hi"}, [BOS, 104, 105]),
        ({"content": "<s>h", "parse_special": False}, [*b"<s>h"]),
        ({"content": "<s>h", "parse_special": False, "add_special": True}, [BOS, *b"<s>h"]),
        ({"content": ["h", 7, "<s>"], "add_special": True}, [BOS, 104, 7, BOS]),
        ({"content": [7, "h"], "add_special": True}, [7, 104]),
        ({"content": "hi", "add_special": None, "model": "whatever", "prompt": "x"}, [104, 105]),
    ],
    ids=str,
)
async def test_tokenize_as_llama_server(app_with_bos: ASGIApp, body: dict[str, Any], tokens: list[int]) -> None:
    answer = await post(app_with_bos, "/tokenize", body)
    assert (answer.status, answer.json) == (200, {"tokens": tokens})


async def test_with_pieces(app: ASGIApp) -> None:
    answer = await post(app, "/tokenize", {"content": ["a<|im_end|>", 0xC3], "with_pieces": True})
    pieces = [{"id": 97, "piece": "a"}, {"id": END, "piece": "<|im_end|>"}, {"id": 0xC3, "piece": [0xC3]}]
    assert answer.json == {"tokens": pieces}


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "hi"}, [BOS, 104, 105]),
        ({"prompt": "<s>hi"}, [BOS, 104, 105]),
        ({"prompt": "hi", "add_special_tokens": False, "model": "fake-1"}, [104, 105]),
        ({"prompt": ""}, [BOS]),
        ({"prompt": "", "add_special_tokens": False}, []),
        ({"messages": HELLO}, [BOS, *CHAT_OF_HELLO]),
        ({"messages": HELLO, "add_generation_prompt": False}, [BOS, *CHAT_OF_HELLO[: -len("_assistant\n")]]),
    ],
    ids=str,
)
async def test_tokenize_as_vllm(app_with_bos: ASGIApp, body: dict[str, Any], tokens: list[int]) -> None:
    answer = await post(app_with_bos, "/tokenize", body)
    expected = {"count": len(tokens), "max_model_len": 512, "tokens": tokens, "token_strs": None}
    assert (answer.status, answer.json) == (200, expected)


async def test_token_strings(app: ASGIApp) -> None:
    answer = await post(app, "/tokenize", {"messages": HELLO, "return_token_strs": True})
    assert answer.json["token_strs"][:6] == ["<|im_start|>", "u", "s", "e", "r", "\n"]
    assert (await post(app, "/tokenize", {"prompt": "hi", "return_token_strs": True})).json["token_strs"] == ["h", "i"]


async def test_long_texts_run_on_a_thread(app: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    async def run(self: WorkerPool, function: Any, *arguments: Any) -> Any:
        ran.append(function)
        return function(*arguments)

    monkeypatch.setattr(WorkerPool, "run", run)
    tokens = [104] * LONG_TEXT_CHARS
    assert (await post(app, "/detokenize", {"tokens": tokens})).json["content"] == "h" * LONG_TEXT_CHARS
    assert len(ran) == 1
    for body in (
        {"prompt": "h" * LONG_TEXT_CHARS, "return_token_strs": True},
        {"content": "h" * LONG_TEXT_CHARS, "with_pieces": True},
    ):
        ran.clear()
        assert len((await post(app, "/tokenize", body)).json["tokens"]) == LONG_TEXT_CHARS
        assert len(ran) == 2


async def test_texts_and_chats_that_no_context_holds_are_refused_unread() -> None:
    """The message of the error is that of a prompt that was tokenized, so that clients shorten the conversation."""
    app = create_app(app_state(FakeEngine(info=msgspec.structs.replace(INFO, longest_token=8))))
    limit = 8 * INFO.trained_context
    answer = await post(app, "/tokenize", {"content": "x" * (limit + 1)})
    assert (answer.status, f"at most {limit} are tokenized" in answer.json["error"]["message"]) == (400, True)
    answer = await post(app, "/tokenize", {"content": ["x" * limit, "x"]})
    assert answer.status == 400
    for path, body in (
        ("/v1/completions", {"prompt": "x" * 8 * 600}),
        ("/v1/chat/completions", {"messages": HELLO * 600}),
    ):
        answer = await post(app, path, body)
        assert (answer.status, "600" in answer.json["error"]["message"]) == (400, True)


async def test_too_many_tokens_are_refused(app: ASGIApp) -> None:
    for path, field in (("/detokenize", "tokens"), ("/tokenize", "content")):
        answer = await post(app, path, {field: [1] * (MAX_DETOKENIZED_TOKENS + 1)})
        assert (answer.status, answer.json["error"]["param"]) == (400, field)


async def test_detokenize(app: ASGIApp) -> None:
    for model in ({}, {"model": "fake-1"}):
        answer = await post(app, "/detokenize", {"tokens": [START, *"hé".encode(), 0xC3], **model})
        assert answer.json == {"content": "<|im_start|>hé�", "prompt": "<|im_start|>hé�"}
    assert (await post(app, "/detokenize", {"tokens": []})).json["content"] == ""


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
async def test_round_trip(text: str) -> None:
    app = create_app(app_state(FakeEngine()))
    tokens = (await post(app, "/tokenize", {"content": text, "parse_special": False})).json["tokens"]
    assert (await post(app, "/detokenize", {"tokens": tokens})).json["content"] == text


async def test_apply_template(app: ASGIApp) -> None:
    answer = await post(app, "/apply-template", {"messages": HELLO, "chat_template_kwargs": {"x": 1}})
    assert answer.json == {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}
    messages = [*HELLO, {"role": "assistant", "content": "so"}]
    assert (await post(app, "/apply-template", {"messages": messages})).json["prompt"].endswith("assistant\nso")


RENDERED = {
    "features": None,
    "model": "fake-1",
    "stream": False,
    "stream_options": None,
    "cache_salt": None,
    "priority": 0,
    "kv_transfer_params": None,
}
SAMPLING = {
    "n": 1,
    "temperature": 0.5,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 3,
    "stop": ["x"],
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": None,
    "min_tokens": 0,
}


async def test_render_chat(app: ASGIApp) -> None:
    answer = await post(
        app, "/v1/chat/completions/render", {"messages": HELLO, "temperature": 0.5, "seed": 3, "stop": "x"}
    )
    rendered = answer.json
    assert rendered.pop("request_id").startswith("chatcmpl-")
    assert rendered == {**RENDERED, "token_ids": CHAT_OF_HELLO, "sampling_params": SAMPLING}


async def test_render_text(app: ASGIApp) -> None:
    body = {"prompt": ["hi", "ho"], "temperature": 0.5, "seed": 3, "stop": ["x"], "stream": True, "cache_salt": "me"}
    first, second = (await post(app, "/v1/completions/render", body)).json
    assert (first.pop("request_id")[:5], second["token_ids"]) == ("cmpl-", [104, 111])
    assert first == {
        **RENDERED,
        "stream": True,
        "cache_salt": "me",
        "token_ids": [104, 105],
        "sampling_params": {**SAMPLING, "max_tokens": 16},
    }


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
            "content": st.text(alphabet="a é<|im_end|>", max_size=12)
            | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=5)}), max_size=3),
        }
    ),
    min_size=1,
    max_size=4,
)


CALLED = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "add_generation_prompt": st.booleans(),
    "continue_final_message": st.booleans(),
    "tools": st.sampled_from([[], [WEATHER], [WEATHER, WEATHER], [{"type": "function"}]]),
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", "maybe", {"type": "function", "function": {"name": "weather"}}]
    ),
    "parallel_tool_calls": st.booleans(),
    "enable_thinking": st.booleans(),
    "reasoning_effort": st.sampled_from(["none", "high"]),
    "reasoning_budget": st.sampled_from([0, 5]),
    "reasoning_format": st.sampled_from(["none", "auto"]),
    "chat_template_kwargs": st.sampled_from([{"enable_thinking": False}, {"x": 1}]),
    "json_schema": st.just({"type": "object"}),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "structural_tag"}]),
}


@settings(max_examples=100, deadline=None)
@given(
    messages=MESSAGES,
    called=st.booleans(),
    fields=st.fixed_dictionaries({}, optional=FIELDS),
    bos_added=st.booleans(),
    template=st.sampled_from([None, QWEN]),
)
async def test_all_endpoints_agree_on_the_tokens(
    messages: Any, called: bool, fields: dict[str, Any], bos_added: bool, template: str | None
) -> None:
    """Chat completion, render, /tokenize and /apply-template have equal tokens, and refuse the same bodies."""
    engine = FakeEngine(info=msgspec.structs.replace(INFO, bos_added=bos_added, chat_template=template))
    engine.request_limit = 8192
    app = create_app(app_state(engine))
    if called:
        messages = [*messages, {"role": "assistant", "tool_calls": [CALLED]}, {"role": "tool", "content": "sunny"}]
    body = {"messages": messages, **fields}
    answer = await post(app, "/v1/chat/completions", {**body, "max_tokens": 1})
    others = [await post(app, path, body) for path in ("/v1/chat/completions/render", "/tokenize", "/apply-template")]
    assert {other.status for other in others} == {answer.status}
    if answer.status != 200:
        assert all(other.json == answer.json for other in others)
        return
    (request,) = engine.requests
    rendered, counted, shown = (other.json for other in others)
    assert tuple(rendered["token_ids"]) == tuple(counted["tokens"]) == request.prompt
    assert answer.json["usage"]["prompt_tokens"] == counted["count"]
    await post(app, "/completion", {"prompt": shown["prompt"], "n_predict": 1})
    assert engine.requests[-1].prompt == request.prompt
    if fields.get("tools") and fields.get("tool_choice") != "none":
        assert "weather" in shown["prompt"]


@pytest.mark.parametrize("path", ["/v1/chat/completions/render", "/tokenize", "/apply-template"])
async def test_no_grammar_is_compiled_for_tokens(app: ASGIApp, path: str) -> None:
    """An unsupported schema changes no token; only the completion refuses it."""
    schema = {"type": "object", "not": {"required": ["a"]}}
    strict = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    body = {"messages": HELLO, "response_format": strict}
    assert (await post(app, path, body)).status == 200
    assert (await post(app, "/v1/chat/completions", body)).status == 400


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": None}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": ["a", 999], "with_pieces": True}, "content"),
        ("/tokenize", {"content": "a", "add_special": "yes"}, "add_special"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "chat_template": "chatml"}, "chat_template"),
        ("/tokenize", {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function"),
        ("/apply-template", {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ("/v1/chat/completions/render", {"messages": HELLO, "functions": [{}]}, "functions[0].name"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": "hi"}, "tokens"),
        ("/apply-template", {"prompt": "hi"}, "messages"),
        ("/v1/completions/render", {"prompt": ""}, "prompt"),
        ("/v1/completions/render", {"prompt": "x" * 600}, "prompt"),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ("/v1/chat/completions/render", {"messages": HELLO, "temperature": -1}, "temperature"),
    ],
    ids=str,
)
async def test_refusals(app: ASGIApp, engine: FakeEngine, path: str, body: Any, param: str | None) -> None:
    answer = await post(app, path, body)
    assert answer.status == 400
    assert answer.json["error"]["param"] == param
    assert engine.log == []


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/completions/render"])
async def test_another_model(app_of: Apps, path: str) -> None:
    body = {"prompt": "x", "tokens": [1], "model": "gpt-5"}
    assert (await post(app_of(), path, body)).status == 200
    assert (await post(app_of(strict_model=True), path, body)).status == 404


@settings(max_examples=100, deadline=None)
@given(
    path=st.sampled_from(["/tokenize", "/detokenize", "/apply-template", "/v1/completions/render"]),
    body=st.dictionaries(
        st.sampled_from(["content", "prompt", "messages", "tokens", "model", "with_pieces", "add_special"]),
        VALUES,
        max_size=4,
    ),
)
async def test_no_body_causes_a_server_error(path: str, body: Any) -> None:
    answer = await post(create_app(app_state(FakeEngine())), path, body)
    assert answer.status in (200, 400, 404)


async def test_no_such_method(app: ASGIApp) -> None:
    assert (await call(app, "GET", "/tokenize")).status == 405
