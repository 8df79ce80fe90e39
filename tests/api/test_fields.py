"""Every request field of a completion endpoint acts the same at the others, or is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import inspect
from starlette.types import ASGIApp

from api.llama_server.completion_schema import LlamaCompletionRequest
from api.schema.requests import ChatRequest, TextRequest
from api.server.app import create_app
from engine import Request
from tests.api.asgi import post
from tests.api.fake import FakeEngine, app_state

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LLAMA = "/completion"
INPUT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    TEXT: {"prompt": "hi"},
    LLAMA: {"prompt": "hi"},
}

# Fields with the same effect on the engine's request at every endpoint, with a value other than the default.
SAME: dict[str, Any] = {
    "stop": ["x"],
    "stop_token_ids": [65],
    "max_tokens": 7,
    "max_completion_tokens": 7,
    "n_predict": 7,
    "min_tokens": 3,
    "ignore_eos": True,
    "cache_salt": "s",
    "user": "someone",
    "priority": 3,
    "timeout_ms": 5000,
    "cache_prompt": False,
    "id_slot": 2,
    "n_keep": 5,
    "speculative": {"type": "suffix"},
    "speculative.type": "suffix",
    "speculative.n_max": 4,
    "speculative.n_min": 2,
    "speculative.p_min": 0.5,
    "speculative.ngram_size_n": 4,
    "speculative.ngram_min_hits": 2,
    "prediction": {"type": "content", "content": "x"},
    "seed": 9,
    "temperature": 0.25,
    "top_k": 7,
    "top_p": 0.25,
    "min_p": 0.25,
    "typical_p": 0.5,
    "repeat_penalty": 1.5,
    "repetition_penalty": 1.5,
    "repeat_last_n": 9,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "dry_multiplier": 0.5,
    "dry_base": 2.0,
    "dry_allowed_length": 5,
    "dry_penalty_last_n": 9,
    "dry_sequence_breakers": ["x"],
    "xtc_probability": 0.5,
    "xtc_threshold": 0.25,
    "dynatemp_range": 0.5,
    "dynatemp_exponent": 2.0,
    "top_n_sigma": 1.5,
    "mirostat": 2,
    "mirostat_tau": 4.0,
    "mirostat_eta": 0.2,
    "adaptive_target": 0.5,
    "adaptive_decay": 0.5,
    "min_keep": 2,
    "samplers": ["temperature", "top_k"],
    "logit_bias": {"hi": False, "65": 1.5},
    "lora": [{"id": 1, "scale": 0.5}],
    "n_probs": 2,
    "post_sampling_probs": True,
    "timings_per_token": True,
    "return_progress": True,
    "token_origins": True,
    "response_format": {"type": "json_object"},
    "grammar": 'root ::= "a"',
    "json_schema": {"type": "integer"},
    "structured_outputs": {"regex": "a"},
    "guided_json": {"type": "integer"},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": 'root ::= "a"',
}

# Fields that some endpoints refuse, with a value other than off and the endpoints that refuse it.
REFUSED: dict[str, tuple[Any, set[str]]] = {
    "n_indent": (1, {CHAT, TEXT, LLAMA}),
    "grammar_lazy": (True, {CHAT, TEXT, LLAMA}),
    "best_of": (2, {CHAT, TEXT, LLAMA}),
    "n_discard": (5, {CHAT, TEXT, LLAMA}),
    "return_tokens": (True, {CHAT, TEXT}),
    "response_fields": (["content"], {CHAT, TEXT}),
    "echo": (True, {CHAT, LLAMA}),
    "suffix": ("x", {CHAT, TEXT, LLAMA}),  # the fake model cannot insert text
    "tools": ([{"type": "function", "function": {"name": "f"}}], {TEXT, LLAMA}),
    "tool_choice": ("required", {CHAT, TEXT, LLAMA}),  # there are no tools
    "functions": ([{"name": "f"}], {TEXT, LLAMA}),
    "function_call": ({"name": "f"}, {CHAT, TEXT, LLAMA}),
    "top_logprobs": (2, {CHAT, TEXT, LLAMA}),  # without logprobs
    "documents": ([{"text": "x"}], {TEXT, LLAMA}),
    "reasoning_format": ("deepseek", {TEXT, LLAMA}),
    "reasoning_effort": ("high", {TEXT, LLAMA}),
    "enable_thinking": (True, {TEXT, LLAMA}),
    "reasoning_budget": (5, {TEXT, LLAMA}),
    "reasoning_budget_tokens": (5, {TEXT, LLAMA}),
    "thinking_budget_tokens": (5, {TEXT, LLAMA}),
    "reasoning_budget_message": ("x", {TEXT, LLAMA}),
    "add_generation_prompt": (True, {TEXT, LLAMA}),
    "continue_final_message": (True, {TEXT, LLAMA}),
    "chat_template": ("x", {CHAT, TEXT, LLAMA}),  # chats need a flag
    "chat_template_kwargs": ({"x": 1}, {TEXT, LLAMA}),
}

# Fields that change the reply only, checked below or in the tests of the reply.
REPLY = {"stream", "stream_options", "n", "n_cmpl", "verbose", "t_max_predict_ms", "logprobs"}
# The input of an endpoint; the name of the model; fields without effect on any output.
OTHER = {"messages", "prompt", "model", "backend_sampling", "parallel_tool_calls"}


@pytest.fixture
def app(engine: FakeEngine) -> ASGIApp:
    """An application with context shift, for the fields that apply to it."""
    return create_app(app_state(engine, options={"batch": {"context_shift": True}}))


def test_the_tables_have_every_field() -> None:
    names: set[str] = set()
    for body in (ChatRequest, TextRequest, LlamaCompletionRequest):
        kind = inspect.type_info(body)
        assert isinstance(kind, inspect.StructType)
        names |= {field.encode_name for field in kind.fields}
    assert names == SAME.keys() | REFUSED.keys() | REPLY | OTHER


def values(request: Request) -> dict[str, Any]:
    """Returns the fields of an engine request, with those of its sampling parameters among them."""
    fields = msgspec.structs.asdict(request)
    sampling = msgspec.structs.asdict(fields.pop("sampling"))
    grammar = fields.pop("grammar") is not None
    without = {"prompt", "id", "stop_scope"}
    return {name: value for name, value in (fields | sampling).items() if name not in without} | {"grammar": grammar}


@pytest.mark.parametrize("field", SAME)
async def test_a_field_acts_the_same_everywhere(app: ASGIApp, engine: FakeEngine, field: str) -> None:
    effects = []
    for path, given in INPUT.items():
        body = {**given, "seed": 1, "max_tokens": 5, "stream": True}
        if field in ("max_completion_tokens", "n_predict"):
            del body["max_tokens"]
        await post(app, path, {**given, "seed": 1, "max_tokens": 5, "stream": True})
        assert (await post(app, path, {**body, field: SAME[field]})).status == 200
        before, after = map(values, engine.requests[-2:])
        effects.append({name: value for name, value in after.items() if value != before[name]})
    assert effects[0], "the field has an effect"
    assert effects[1:] == effects[:1] * 2


@pytest.mark.parametrize("field", REFUSED)
async def test_a_field_is_refused_with_its_name(app: ASGIApp, engine: FakeEngine, field: str) -> None:
    value, refusing = REFUSED[field]
    for path, given in INPUT.items():
        answer = await post(app, path, {**given, field: value})
        assert answer.status == (400 if path in refusing else 200), path
        assert path not in refusing or answer.json["error"]["param"] == field
        assert (await post(app, path, {**given, field: None})).status == 200


@pytest.mark.parametrize("path", INPUT)
@pytest.mark.parametrize(
    ("fields", "choices"), [({"n": 2}, 2), ({"n_cmpl": 3}, 3), ({"n": 2, "n_cmpl": 3}, 2)], ids=str
)
async def test_numbers_of_choices(
    app: ASGIApp, engine: FakeEngine, path: str, fields: dict[str, Any], choices: int
) -> None:
    await post(app, path, {**INPUT[path], **fields})
    assert len(engine.requests) == choices


@pytest.mark.parametrize("path", INPUT)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_time_limit_ends_after_the_first_line(
    app: ASGIApp, engine: FakeEngine, path: str, stream: bool
) -> None:
    engine.script = lambda request: [b"ab", 0.05, b"c\n", 0.05, b"d", 60.0]
    answer = await post(app, path, {**INPUT[path], "t_max_predict_ms": 20, "stream": stream, "max_tokens": 9})
    assert answer.status == 200
    assert engine.log == ["submit", "cancel"]


@pytest.mark.parametrize("path", INPUT)
async def test_automatic_values_of_chat_fields_are_accepted(app: ASGIApp, path: str) -> None:
    off = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "function_call": "none", "top_logprobs": 0}
    assert (await post(app, path, {**INPUT[path], **off})).status == 200


@pytest.mark.parametrize("path", [TEXT, LLAMA])
async def test_prompts_as_objects(app: ASGIApp, engine: FakeEngine, path: str) -> None:
    for prompt in ({"prompt_string": "hi"}, [{"prompt_string": "hi", "multimodal_data": []}], ["hi"]):
        assert (await post(app, path, {"prompt": prompt})).status == 200
    assert {request.prompt for request in engine.requests} == {tuple(b"hi")}
    answer = await post(app, path, {"prompt": {"prompt_string": "hi", "multimodal_data": ["aGk="]}})
    param = "prompt" if path == TEXT else "prompt.multimodal_data"
    assert (answer.status, answer.json["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "speculates"),
    [
        ({"speculative.n_max": 0}, False),
        ({"speculative": False, "speculative.n_max": 5}, False),
        ({"speculative": {"n_max": 3}, "speculative.n_max": 5}, True),
        ({"speculative": "suffix", "speculative.p_min": 0.5}, True),
    ],
    ids=str,
)
async def test_dotted_fields_of_speculation(
    app: ASGIApp, engine: FakeEngine, fields: dict[str, Any], speculates: bool
) -> None:
    assert (await post(app, TEXT, {"prompt": "x", **fields})).status == 200
    speculation = engine.requests[0].speculation
    assert speculation is not None
    assert bool(speculation.type) is speculates
    assert speculation.n_max in (None, 3)


async def test_a_wrong_dotted_field_is_named(app: ASGIApp) -> None:
    for value in (-1, "5", 5.5):
        answer = await post(app, CHAT, {**INPUT[CHAT], "speculative.n_max": value})
        assert (answer.status, answer.json["error"]["param"]) == (400, "speculative.n_max")
