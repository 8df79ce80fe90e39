"""POST /completion in llama-server's shape: whole replies and events, engine requests, and errors."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from api.llama_server.completion_schema import LlamaCompletionRequest
from api.server.app import create_app
from engine import DEFAULT_SAMPLERS, EngineFault, Finished, FinishReason, PrefillProgress, Timings, Usage, derive_seed
from tests.api.asgi import post
from tests.api.conftest import Apps
from tests.api.fake import BOS, INFO, START, FakeEngine, app_state
from tests.api.test_refusals import VALUES
from tests.api.test_wire import timings

PATH = "/completion"
HELLO = [*"Hello wörld".encode()]


def settings_of(reply: dict[str, Any]) -> dict[str, Any]:
    """Removes the settings from the reply and returns them."""
    taken: dict[str, Any] = reply.pop("generation_settings")
    return taken


@pytest.mark.parametrize("path", [PATH, "/completions"])
async def test_a_body(app: ASGIApp, path: str) -> None:
    reply = (await post(app, path, {"prompt": "Say: ", "seed": 5, "return_tokens": True})).json
    reported = settings_of(reply)
    assert (reported["seed"], reported["n_predict"], reported["temperature"], reported["stream"]) == (5, -1, 0.8, False)
    assert reported["samplers"][-1] == "temperature"
    assert reply == {
        "index": 0,
        "content": "Hello wörld",
        "tokens": HELLO,
        "id_slot": -1,
        "stop": True,
        "model": "fake-1",
        "tokens_predicted": 12,
        "tokens_evaluated": 5,
        "prompt": "Say: ",
        "has_new_line": False,
        "truncated": False,
        "stop_type": "eos",
        "stopping_word": "",
        "tokens_cached": 16,
        "timings": timings(5, 12),
    }


async def test_a_stream(app: ASGIApp) -> None:
    answer = await post(app, PATH, {"prompt": "Say: ", "n_predict": 6, "stream": True, "seed": 1})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last = answer.events
    common = {"index": 0, "stop": False, "id_slot": -1, "tokens_evaluated": 5}
    assert chunks == [
        {**common, "content": "Hel", "tokens": [*b"Hel"], "tokens_predicted": 3},
        {**common, "content": "lo", "tokens": [*b"lo"], "tokens_predicted": 5},
        {**common, "content": " ", "tokens": [*b" "], "tokens_predicted": 6},
    ]
    reported = settings_of(last)
    assert (reported["n_predict"], reported["max_tokens"], reported["stream"]) == (6, 6, True)
    assert last == {
        "index": 0,
        "content": "",
        "tokens": [],
        "id_slot": -1,
        "stop": True,
        "model": "fake-1",
        "tokens_predicted": 6,
        "tokens_evaluated": 5,
        "prompt": "Say: ",
        "has_new_line": False,
        "truncated": False,
        "stop_type": "limit",
        "stopping_word": "",
        "tokens_cached": 10,
        "timings": timings(5, 6),
    }


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", [[BOS, 104, 105]]),
        ("<|im_start|>x", [[BOS, START, 120]]),
        ([104, 105], [[104, 105]]),
        (["a", 7, "b"], [[BOS, 97, 7, 98]]),
        ([7, "b"], [[7, 98]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([[7, "b"], "c"], [[7, 98], [BOS, 99]]),
    ],
    ids=str,
)
async def test_forms_of_prompts(prompt: Any, prompts: list[list[int]]) -> None:
    engine = FakeEngine(info=msgspec.structs.replace(INFO, bos_added=True))
    answer = await post(create_app(app_state(engine)), PATH, {"prompt": prompt, "n_predict": 2})
    assert [list(request.prompt) for request in engine.requests] == prompts
    replies = answer.json if len(prompts) > 1 else [answer.json]
    assert [reply["index"] for reply in replies] == list(range(len(prompts)))
    assert [reply["content"] for reply in replies] == ["He"] * len(prompts)


async def test_several_choices(app: ASGIApp, engine: FakeEngine) -> None:
    replies = (await post(app, PATH, {"prompt": "x", "n_cmpl": 3, "seed": 7, "n_predict": 2})).json
    assert [reply["index"] for reply in replies] == [0, 1, 2]
    assert [request.sampling.seed for request in engine.requests] == [derive_seed(7, i) for i in range(3)]
    events = (await post(app, PATH, {"prompt": ["x", "y"], "stream": True})).events
    texts = {index: "".join(e["content"] for e in events if e["index"] == index) for index in (0, 1)}
    assert texts == {0: "Hello wörld", 1: "Hello wörld"}
    assert sum(each["stop"] for each in events) == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string(app: ASGIApp, stream: bool) -> None:
    answer = await post(app, PATH, {"prompt": "x", "stop": ["never", "o w"], "stream": stream})
    events = answer.events if stream else [answer.json]
    assert "".join(each["content"] for each in events) == "Hell"
    assert (events[-1]["stop_type"], events[-1]["stopping_word"]) == ("word", "o w")


@pytest.mark.parametrize(
    ("end", "stop_type", "word"),
    [
        ((FinishReason.STOP, None), "eos", ""),
        ((FinishReason.STOP, 257), "eos", ""),
        ((FinishReason.STOP, 65), "word", "A"),
        ((FinishReason.LENGTH, None), "limit", ""),
    ],
)
async def test_ends(
    app: ASGIApp,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    end: tuple[FinishReason, int | None],
    stop_type: str,
    word: str,
) -> None:
    finished = Finished(end[0], Usage(10, 2, 502), Timings(0, 1, 1), 0, stop=end[1])
    monkeypatch.setattr(engine, "_finished", lambda request, count, reason: finished)
    reply = (await post(app, PATH, {"prompt": "x", "stop_token_ids": [65]})).json
    assert (reply["stop_type"], reply["stopping_word"]) == (stop_type, word)
    assert reply["truncated"] is (stop_type == "limit")


async def test_probabilities(app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"z\xc3", 0.01, b"\xb6"]
    body = {"prompt": "x", "n_probs": 2}
    reported = (await post(app, PATH, body)).json["completion_probabilities"]
    assert reported[0] == {
        "id": 122,
        "token": "z",
        "bytes": [122],
        "logprob": -0.5,
        "top_logprobs": [
            {"id": 122, "token": "z", "bytes": [122], "logprob": -0.5},
            {"id": 123, "token": "{", "bytes": [123], "logprob": -9999.0},
        ],
    }
    *chunks, last = (await post(app, PATH, {**body, "stream": True})).events
    assert [each for chunk in chunks for each in chunk["completion_probabilities"]] == reported
    assert "completion_probabilities" not in last


async def test_probabilities_after_sampling(app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"z"]
    body = {"prompt": "x", "n_probs": 1, "post_sampling_probs": True}
    answer = (await post(app, PATH, body)).json
    prob = pytest.approx(0.60653066)
    top = [{"id": 122, "token": "z", "bytes": [122], "prob": prob}]
    assert answer["completion_probabilities"] == [
        {"id": 122, "token": "z", "bytes": [122], "prob": prob, "top_probs": top}
    ]
    assert answer["generation_settings"]["post_sampling_probs"] is True
    assert engine.requests[0].post_sampling


async def test_logprobs_is_another_name_of_n_probs(app: ASGIApp, engine: FakeEngine) -> None:
    for fields in ({"logprobs": 3}, {"n_probs": 3, "logprobs": 5}):
        await post(app, PATH, {"prompt": "x", **fields})
    assert [request.logprobs for request in engine.requests] == [3, 3]


async def test_engine_request(app: ASGIApp, engine: FakeEngine) -> None:
    body = {
        "prompt": "x",
        "temperature": 0.25,
        "repeat_penalty": 1.5,
        "logit_bias": [[65, 1.5], ["hi", False]],
        "ignore_eos": True,
        "t_max_predict_ms": 0,
        "min_keep": 1,
        "mirostat": 0,
        "id_slot": -1,
        "cache_prompt": True,
        "return_progress": True,
        "n_keep": 12,
        "speculative": False,
    }
    answer = await post(app, PATH, body)
    assert answer.json["generation_settings"]["logit_bias"][0] == {"token": 65, "bias": 1.5}
    assert answer.json["generation_settings"]["speculative.types"] == "none"
    (request,) = engine.requests
    assert (request.sampling.temperature, request.sampling.repeat_penalty) == (0.25, 1.5)
    assert request.sampling.logit_bias == ((65, 1.5), (104, -1e9), (105, -1e9))
    assert (request.ignore_eos, request.max_tokens, request.logprobs, request.salt) == (True, None, None, "")


async def test_settings_report_the_grammar(app: ASGIApp) -> None:
    for fields in ({"grammar": 'root ::= "a"'}, {"json_schema": {"type": "object"}}, {"grammar_lazy": False}):
        reported = (await post(app, PATH, {"prompt": "x", **fields})).json["generation_settings"]
        assert reported["grammar"] == fields.get("grammar", "")
        assert reported["json_schema"] == fields.get("json_schema")


async def test_cache_prompt_false(app: ASGIApp, engine: FakeEngine) -> None:
    reply = (await post(app, PATH, {"prompt": "x", "cache_prompt": False, "cache_salt": "s"})).json
    assert (engine.requests[0].cache, engine.requests[0].salt) == (False, "s")
    assert reply["tokens_cached"] == 0


async def test_settings_report_banned_tokens(app: ASGIApp, engine: FakeEngine) -> None:
    body = {"prompt": "x", "ignore_eos": True, "logit_bias": {"66": 0.5, "hi": False}}
    reported = (await post(app, PATH, body)).json["generation_settings"]["logit_bias"]
    ends = [{"token": token, "bias": None} for token in sorted(engine.vocab.ends)]
    assert reported == [
        {"token": 66, "bias": 0.5},
        {"token": 104, "bias": None},
        {"token": 105, "bias": None},
        *ends,
    ]
    assert (await post(app, PATH, {"prompt": "x"})).json["generation_settings"]["logit_bias"] == []


async def test_settings_report_inactive_stages_as_off(app: ASGIApp) -> None:
    reported = (await post(app, PATH, {"prompt": "x", "n_keep": 7})).json["generation_settings"]
    assert (reported["mirostat"], reported["adaptive_target"], reported["top_n_sigma"]) == (0, -1.0, -1.0)
    assert (reported["n_keep"], reported["n_discard"], reported["min_keep"]) == (7, 0, 0)


@pytest.mark.parametrize(
    ("samplers", "stages"),
    [
        (["temperature", "top_k"], ("temperature", "top_k")),
        (
            ["Top-K", "nucleus", "typ", "minP", "temp", "top_k"],
            ("top_k", "top_p", "typ_p", "min_p", "temperature", "top_k"),
        ),
        ("tkia", ("temperature", "top_k", "infill", "adaptive_p")),
        ("edskypmxt", DEFAULT_SAMPLERS),
        ("xtc;top_n_sigma", ("xtc", "top_n_sigma")),
        ([], ()),
        (None, DEFAULT_SAMPLERS),
    ],
    ids=str,
)
async def test_samplers(app: ASGIApp, engine: FakeEngine, samplers: Any, stages: tuple[str, ...]) -> None:
    reported = (await post(app, PATH, {"prompt": "x", "samplers": samplers})).json["generation_settings"]
    assert (tuple(reported["samplers"]), engine.requests[0].sampling.samplers) == (stages, stages)


async def test_response_fields(app: ASGIApp) -> None:
    fields = ["content", "generation_settings/n_predict", "timings/predicted_n", "content/x", "nothing"]
    body = {"prompt": "x", "n_predict": 2, "response_fields": fields}
    some = {"content": "He", "generation_settings/n_predict": 2, "timings/predicted_n": 2}
    assert (await post(app, PATH, body)).json == some
    events = (await post(app, PATH, {**body, "stream": True})).events
    assert events[-1] == {**some, "content": ""}
    assert events[0]["tokens_predicted"] == 2


async def test_timings_per_token(app: ASGIApp, engine: FakeEngine) -> None:
    body = {"prompt": "x", "stream": True, "timings_per_token": True, "return_progress": True}
    engine.script = lambda request: [PrefillProgress(10, 4, 10, 0.5), 0.002, b"Hel", 0.002, b"lo", 0.002, b"!"]
    start, progress, *chunks, _ = (await post(app, PATH, body)).events
    assert (start["prompt_progress"]["processed"], progress["prompt_progress"]["processed"]) == (4, 10)
    assert (start["timings"]["prompt_n"], start["timings"]["prompt_ms"]) == (0, 0.0)
    prompt = {"cache_n": 4, "prompt_n": 6, "prompt_ms": 500.0, "prompt_per_second": 12.0}
    for each in (progress, *chunks):
        assert prompt.items() <= each["timings"].items()
    assert [chunk["timings"]["predicted_n"] for chunk in chunks] == [3, 5, 6]
    assert all(chunk["timings"]["predicted_per_second"] > 0 for chunk in chunks[1:])


@pytest.mark.parametrize("fields", [{"return_progress": True}, {"return_progress": False}, {}], ids=str)
async def test_prompt_progress(app: ASGIApp, engine: FakeEngine, fields: Any) -> None:
    engine.script = lambda request: [
        PrefillProgress(100, 20, 20, 0.0),
        0.005,
        PrefillProgress(100, 20, 60, 0.5004),
        0.005,
        b"ab",
    ]
    events = (await post(app, PATH, {"prompt": "x", "stream": True, **fields})).events
    reported = [each["prompt_progress"] for each in events if "prompt_progress" in each]
    assert [each["content"] for each in events] == [*[""] * len(reported), "ab", ""]
    if fields.get("return_progress"):
        first = {"total": 100, "cache": 20, "processed": 20, "time_ms": 0}
        assert reported == [first, {**first, "processed": 60, "time_ms": 500}]
        assert events[0]["tokens_evaluated"] == 1
        assert events[0]["stop"] is False
    else:
        assert reported == []
    assert (await post(app, PATH, {"prompt": "x", **fields})).json["content"] == "ab"


@pytest.mark.parametrize("stream", [True, False])
async def test_time_limit(app: ASGIApp, engine: FakeEngine, stream: bool) -> None:
    engine.script = lambda request: [b"ab", 0.05, b"c\n", 0.05, b"d", asyncio.Event()]
    answer = await post(app, PATH, {"prompt": "x", "t_max_predict_ms": 20, "stream": stream})
    events = answer.events if stream else [answer.json]
    assert "".join(each["content"] for each in events) == "abc\n"
    last = events[-1]
    assert (last["stop_type"], last["has_new_line"], last["tokens_predicted"]) == ("limit", True, 4)
    assert engine.log == ["submit", "cancel"]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error(app: ASGIApp, engine: FakeEngine, stream: bool) -> None:
    engine.script = lambda request: [b"a", 0.01, EngineFault("no luck")]
    answer = await post(app, PATH, {"prompt": "x", "stream": stream})
    reported = answer.events[-1] if stream else answer.json
    assert reported["error"]["message"] == "no luck"
    assert answer.status == (200 if stream else 500)


async def test_a_disconnect_cancels(app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"a", asyncio.Event()]
    await post(app, PATH, {"prompt": "x", "stream": True}, disconnect_after=1)
    assert engine.log == ["submit", "cancel"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": {"prompt_string": "x", "multimodal_data": ["x"]}}, "prompt.multimodal_data"),
        ({"prompt": {"prompt_string": "x", "multimodal_data": [1]}}, "prompt.multimodal_data[0]"),
        ({"prompt": ["a"] * 100, "n_cmpl": 3}, "n"),
        ({"prompt": "x", "n_predict": -2}, "n_predict"),
        ({"prompt": "x", "id_slot": 4}, "id_slot"),
        ({"prompt": "x", "n_probs": 101}, "n_probs"),
        ({"prompt": "x", "mirostat": 3}, "mirostat"),
        ({"prompt": "x", "dynatemp_range": -0.5}, "dynatemp_range"),
        ({"prompt": "x", "adaptive_decay": 1.0}, "adaptive_decay"),
        ({"prompt": "x", "min_keep": -1}, "min_keep"),
        ({"prompt": "x", "n_indent": 1}, "n_indent"),
        ({"prompt": "x", "grammar": 'root ::= "a"', "grammar_lazy": True}, "grammar_lazy"),
        ({"prompt": "x", "grammar": 'root ::= "a"', "json_schema": {}}, "json_schema"),
        ({"prompt": "x", "lora": [{"id": 2, "scale": 1}]}, "lora"),
        ({"prompt": "x", "samplers": ["top_q"]}, "samplers"),
        ({"prompt": "x", "samplers": ["top_k"] * 65}, "samplers"),
        ({"prompt": "x", "samplers": "kz"}, "samplers"),
        ({"prompt": "x", "logit_bias": [[1, True]]}, "logit_bias"),
    ],
    ids=str,
)
async def test_refusals(app: ASGIApp, engine: FakeEngine, body: dict[str, Any], param: str | None) -> None:
    answer = await post(app, PATH, body)
    assert answer.status == 400
    assert answer.json["error"]["param"] == param
    assert engine.log == []


async def test_oversized_bodies_are_refused_before_tokenizing(
    app: ASGIApp, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.vocab, "tokenize", None)
    biases: list[Any] = [
        [[1, 0.5]] * (2**16 + 1),
        [["x" * 2**15, 0.5]] * 3,
        {str(token): 0.5 for token in range(2**16 + 1)},
    ]
    bodies = [{"prompt": ["a"] * 100, "n_cmpl": 3}, *({"prompt": [1], "logit_bias": bias} for bias in biases)]
    for body in bodies:
        answer = await post(app, PATH, body)
        assert (answer.status, answer.json["error"]["param"]) == (400, "n" if "n_cmpl" in body else "logit_bias")


async def test_texts_with_too_many_tokens_for_biases(app: ASGIApp) -> None:
    answer = await post(app, PATH, {"prompt": "x", "logit_bias": [["€" * 11_000, 0.5]] * 2})
    assert (answer.status, answer.json["error"]["param"]) == (400, "logit_bias")


async def test_n_keep_with_context_shift(engine: FakeEngine) -> None:
    app = create_app(app_state(engine, options={"batch": {"context_shift": True, "keep": 8}}))
    reported = [
        (await post(app, PATH, {"prompt": "x", "n_keep": keep, "n_discard": 0})).json["generation_settings"]["n_keep"]
        for keep in (9, -1, None)
    ]
    assert reported == [9, -1, 8]
    assert [request.keep for request in engine.requests] == [9, -1, None]
    assert (await post(app, PATH, {"prompt": "x", "n_discard": 5})).json["error"]["param"] == "n_discard"
    assert (await post(app, PATH, {"prompt": "x", "n_keep": -2})).json["error"]["param"] == "n_keep"


async def test_keys(app_of: Apps) -> None:
    assert (await post(app_of(api_keys=["k"]), PATH, {"prompt": "x"})).status == 401


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(LlamaCompletionRequest.__struct_fields__), VALUES, max_size=4))
async def test_no_body_causes_a_server_error(bodies: dict[str, Any]) -> None:
    answer = await post(create_app(app_state(FakeEngine())), PATH, {"prompt": "hi", **bodies})
    assert answer.status in (200, 400, 404)
