"""The exact bodies and events of OpenAI's endpoints."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET
from starlette.types import ASGIApp

from api.schema.replies import TimingsReply
from engine import Finished, FinishReason, PrefillProgress, Timings, Usage, derive_seed
from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
PROMPT_OF_HELLO = 1 + len("user\nhi") + 1 + len("\n") + 1 + len("assistant\n")

TIMINGS = {
    "cache_n": 2,
    "prompt_ms": 500.0,
    "predicted_ms": 2000.0,
    "draft_n": 4,
    "draft_n_accepted": 3,
}

DRAFTED = {
    "metrics": {
        "speculative_decoding": {
            "mean_acceptance_length": 4.0,
            "draft_acceptance_rate": 0.75,
            "acceptance_histogram": [0, 0, 0, 1, 0],
            "num_spec_steps": 1,
            "num_accepted_draft_tokens": 3,
            "num_draft_tokens": 4,
            "num_spec_tokens": 4,
        }
    },
    "speculative": {"type": ["suffix"], "by_type": {"suffix": {"drafts": 1, "drafted": 4, "accepted": 3}}},
}


def without_variable_fields(reply: dict[str, Any], **expected: Any) -> dict[str, Any]:
    """Checks the fields that differ from call to call, and returns `reply` without them."""
    assert reply.pop("id").startswith(expected["id"])
    assert reply.pop("created") > 1_700_000_000
    assert reply.pop("system_fingerprint").startswith("fp_")
    assert reply.pop("model") == "fake-1"
    assert reply.pop("object") == expected["object"]
    return reply


def usage(prompt: int, completion: int, choices: int = 1) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 3 * choices,
            "rejected_prediction_tokens": choices,
        },
    }


def timings(prompt: int, completion: int) -> dict[str, Any]:
    return {
        **TIMINGS,
        "prompt_n": prompt - 2,
        "prompt_per_token_ms": pytest.approx(500.0 / (prompt - 2)),
        "prompt_per_second": pytest.approx((prompt - 2) / 0.5),
        "predicted_n": completion,
        "predicted_per_token_ms": pytest.approx(2000.0 / (completion - 1)),
        "predicted_per_second": pytest.approx((completion - 1) / 2.0),
    }


async def test_chat(app: ASGIApp) -> None:
    answer = await post(app, CHAT, {"messages": HELLO, "seed": 5})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert without_variable_fields(answer.json, id="chatcmpl-", object="chat.completion") == {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello wörld"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": usage(PROMPT_OF_HELLO, 12),
        "timings": timings(PROMPT_OF_HELLO, 12),
        **DRAFTED,
        "seed": 5,
    }


async def test_chat_stream(app: ASGIApp) -> None:
    answer = await post(app, CHAT, {"messages": HELLO, "seed": 5, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.complete
    *chunks, done = answer.events
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    received = [without_variable_fields(chunk, id="chatcmpl-", object="chat.completion.chunk") for chunk in chunks]
    deltas = [{"role": "assistant", "content": None}, {"content": "Hel"}, {"content": "lo"}, {"content": " wörld"}]
    assert received == [
        *({"choices": [{"index": 0, "delta": d, "logprobs": None, "finish_reason": None}]} for d in deltas),
        {
            "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}],
            "timings": timings(PROMPT_OF_HELLO, 12),
            **DRAFTED,
            "seed": 5,
        },
    ]


async def test_each_step_is_one_message_with_one_event_for_its_text(app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"several tokens", 0.01, b" at once"]
    answer = await post(app, CHAT, {"messages": HELLO, "stream": True})
    assert [chunk.count(b"data: ") for chunk in answer.chunks] == [2, 1, 2], "the role first, [DONE] last"


async def test_usage_of_a_stream_is_a_chunk_of_its_own(app: ASGIApp) -> None:
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, _ = (await post(app, CHAT, body)).events
    assert all(chunk["usage"] is None and "timings" not in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == usage(PROMPT_OF_HELLO, 12)
    assert last["timings"] == timings(PROMPT_OF_HELLO, 12)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_stream_without_any_text(app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: []
    chunk, done = (await post(app, CHAT, {"messages": HELLO, "stream": True})).events
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunk["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"


async def test_choices_of_a_stream_are_interleaved(app: ASGIApp, engine: FakeEngine) -> None:
    def script(request: Any) -> Any:
        slow = request.sampling.seed != 9
        return [b"a", 0.03 if slow else 0.01, b"b"]

    engine.script = script
    *chunks, last, done = (await post(app, CHAT, {"messages": HELLO, "stream": True, "n": 2, "seed": 9})).events
    received = [(c["choices"][0]["index"], c["choices"][0]["delta"].get("content")) for c in [*chunks, last]]
    assert received == [(0, None), (0, "a"), (1, None), (1, "a"), (0, "b"), (0, None), (1, "b"), (1, None)]
    assert [c["choices"][0]["delta"].get("role") for c in chunks[:4]] == ["assistant", None] * 2
    assert "timings" not in chunks[-2]
    assert last["timings"]["predicted_n"] == 4
    assert done == "[DONE]"


async def test_choices_sample_with_their_own_seeds(app: ASGIApp, engine: FakeEngine) -> None:
    answer = await post(app, CHAT, {"messages": HELLO, "n": 3, "seed": 7})
    assert [request.sampling.seed for request in engine.requests] == [derive_seed(7, i) for i in range(3)]
    assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2]
    assert answer.json["usage"] == usage(PROMPT_OF_HELLO, 36, choices=3)


@pytest.mark.parametrize("seed", [None, -1])
async def test_a_random_seed_is_in_the_reply(app: ASGIApp, engine: FakeEngine, seed: int | None) -> None:
    received = {(await post(app, CHAT, {"messages": HELLO, "seed": seed})).json["seed"] for _ in range(3)}
    assert received == {request.sampling.seed for request in engine.requests}
    assert len(received) == 3
    assert all(0 <= seed < 2**53 for seed in received)


async def test_chat_logprobs(app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"\xc3", 0.01, b"\xb6z"]
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    content = (await post(app, CHAT, body)).json["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == "�"
    assert content[0]["bytes"] == [0xC3]
    assert content[2] == {
        "token": "z",
        "logprob": -0.5,
        "bytes": [122],
        "top_logprobs": [
            {"token": "z", "logprob": -0.5, "bytes": [122]},
            {"token": "{", "logprob": -9999.0, "bytes": [123]},
        ],
    }
    events = (await post(app, CHAT, {**body, "stream": True})).events
    streamed = [entry for event in events[1:-2] for entry in event["choices"][0]["logprobs"]["content"]]
    assert streamed == content
    assert events[-2]["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(("path", "key"), [(CHAT, "content"), (TEXT, "tokens")])
async def test_text_before_its_token_has_no_logprobs(
    app: ASGIApp, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, path: str, key: str
) -> None:
    """The end of the second token could begin the stop string, so the token is emitted with the third one."""
    piece = engine.vocab.piece
    monkeypatch.setattr(engine.vocab, "piece", lambda token: b"b!" if token == 66 else piece(token))
    engine.script = lambda request: [b"a", 0.01, b"B", 0.01, b"c"]
    logprobs: Any = True if path == CHAT else 1
    body = {"messages": HELLO, "prompt": "x", "stop": "!?", "logprobs": logprobs, "stream": True}
    received = [event["choices"][0]["logprobs"] for event in (await post(app, path, body)).events[:-1]]
    role = [None] if path == CHAT else []
    assert [each and len(each[key]) for each in received] == [*role, 1, None, 2, None]


async def test_text(app: ASGIApp, engine: FakeEngine) -> None:
    answer = await post(app, TEXT, {"prompt": "Say: ", "max_tokens": 6, "seed": 1})
    assert without_variable_fields(answer.json, id="cmpl-", object="text_completion") == {
        "choices": [{"index": 0, "text": "Hello ", "logprobs": None, "finish_reason": "length"}],
        "usage": usage(5, 6),
        "timings": timings(5, 6),
        **DRAFTED,
        "seed": 1,
    }


async def test_text_stream(app: ASGIApp) -> None:
    answer = await post(app, TEXT, {"prompt": "Say: ", "max_tokens": 6, "stream": True, "seed": 1})
    *chunks, done = answer.events
    received = [without_variable_fields(chunk, id="cmpl-", object="text_completion")["choices"] for chunk in chunks]
    assert received == [
        [{"index": 0, "text": "Hel", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "lo", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": " ", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}],
    ]
    assert done == "[DONE]"


async def test_text_has_sixteen_tokens_by_default(app: ASGIApp, engine: FakeEngine) -> None:
    for limit in ({}, {"max_tokens": -1}, {"n_predict": 3}, {"max_tokens": None, "max_completion_tokens": 4}):
        await post(app, TEXT, {"prompt": "x", **limit})
    assert [request.max_tokens for request in engine.requests] == [16, None, 3, 4]


async def test_chat_has_no_limit_by_default(app: ASGIApp, engine: FakeEngine) -> None:
    for limit in ({}, {"max_tokens": 0}, {"max_tokens": 9, "max_completion_tokens": 4}):
        await post(app, CHAT, {"messages": HELLO, **limit})
    assert [request.max_tokens for request in engine.requests] == [None, 0, 4]


@pytest.mark.parametrize("stream", [True, False])
async def test_echo(app: ASGIApp, stream: bool) -> None:
    body = {"prompt": ["One ", "Two "], "echo": True, "stream": stream, "max_tokens": 5, "n": 2}
    answer = await post(app, TEXT, body)
    texts = [""] * 4
    for reply in answer.events[:-1] if stream else [answer.json]:
        for choice in reply["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["One Hello", "One Hello", "Two Hello", "Two Hello"]


async def test_echo_without_new_tokens(app: ASGIApp) -> None:
    answer = await post(app, TEXT, {"prompt": [104, 105], "echo": True, "max_tokens": 0})
    assert answer.json["choices"][0]["text"] == "hi"


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("hi", [(104, 105)]),
        (["hi", "ho"], [(104, 105), (104, 111)]),
        ([104, 105], [(104, 105)]),
        ([[104], [105, 106]], [(104,), (105, 106)]),
    ],
)
async def test_forms_of_prompts(app: ASGIApp, engine: FakeEngine, prompt: Any, tokens: Any) -> None:
    answer = await post(app, TEXT, {"prompt": prompt})
    assert answer.status == 200
    assert [request.prompt for request in engine.requests] == tokens


async def test_text_logprobs(app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"a\xc3", 0.01, b"\xb6z"]
    body = {"prompt": "x", "logprobs": 1}
    logprobs = (await post(app, TEXT, body)).json["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "�", "�", "z"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"a": -0.5}, {"�": -0.5}, {"�": -0.5}, {"z": -0.5}],
        "text_offset": [0, 1, 1, 2],
    }
    events = (await post(app, TEXT, {**body, "stream": True})).events
    offsets = [at for event in events[:-2] for at in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 1, 2]


async def test_stop_strings_never_show(app: ASGIApp, engine: FakeEngine) -> None:
    answer = await post(app, CHAT, {"messages": HELLO, "stop": ["lo w", "never"], "stream": True})
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in answer.events[:-1])
    assert text == "Hel"
    assert answer.events[-2]["choices"][0]["finish_reason"] == "stop"
    assert (await post(app, CHAT, {"messages": HELLO, "stop": "lo"})).json["choices"][0]["message"]["content"] == "Hel"


async def test_the_fields_of_the_engine_request(app: ASGIApp, engine: FakeEngine) -> None:
    body = {
        "prompt": "x",
        "temperature": 0.25,
        "top_k": 3,
        "repetition_penalty": 1.5,
        "dry_sequence_breakers": ["!"],
        "logit_bias": {"65": -100, "66": 5.5},
        "stop": ["a", "b"],
        "stop_token_ids": [9],
        "min_tokens": 2,
        "ignore_eos": True,
        "cache_salt": "me",
        "top_p": None,
        "unheard_of": {"x": 1},
    }
    assert (await post(app, TEXT, body, headers={"x-request-id": "r1"})).status == 200
    (request,) = engine.requests
    assert request.sampling.temperature == 0.25
    assert request.sampling.top_k == 3
    assert request.sampling.top_p == 0.95
    assert request.sampling.repeat_penalty == 1.5
    assert request.sampling.dry_sequence_breakers == ("!",)
    assert request.sampling.logit_bias == ((65, -100.0), (66, 5.5))
    assert (request.stop, request.stop_tokens) == (("a", "b"), (9,))
    assert (request.min_tokens, request.ignore_eos, request.salt, request.id) == (2, True, "me", "r1")


async def test_logit_bias_in_llama_servers_shape(app: ASGIApp, engine: FakeEngine) -> None:
    await post(app, TEXT, {"prompt": "x", "logit_bias": [[65, 1.5], [66, False]]})
    assert engine.requests[0].sampling.logit_bias == ((65, 1.5), (66, -1e9))


async def test_models(app: ASGIApp) -> None:
    (model,) = (await call(app, "GET", "/v1/models")).json["data"]
    assert model.pop("created") > 1_700_000_000
    assert model == {
        "id": "fake-1",
        "object": "model",
        "owned_by": "paceline",
        "max_model_len": 512,
        "meta": {"n_vocab": 260, "n_ctx": 2048, "n_ctx_train": 4096, "n_params": 2000, "size": 1000},
        "aliases": ["fake-1"],
        "tags": [],
    }
    assert (await call(app, "GET", "/v1/models/fake-1")).json["id"] == "fake-1"
    assert (await call(app, "GET", "/v1/models//models/fake-1.gguf")).json["id"] == "fake-1"
    assert (await call(app, "GET", "/v1/models/gpt-5")).status == 404


@pytest.mark.parametrize("model", ["fake-1", "fake-1.gguf", "/models/fake-1.gguf", "", None])
async def test_names_of_the_model(app: ASGIApp, model: str | None) -> None:
    assert (await post(app, CHAT, {"messages": HELLO, "model": model})).status == 200


async def test_chat_path_without_v1(app: ASGIApp) -> None:
    assert (await post(app, "/chat/completions", {"messages": HELLO})).status == 200


def test_timings_count_moved_tokens() -> None:
    def end(moved: int) -> Finished:
        return Finished(FinishReason.STOP, Usage(50, 40, 3, moved=moved), Timings(0.0, 1.0, 2.0), 0)

    assert TimingsReply.of([[end(30), end(20)], [end(5)]]).moved_n == 25
    assert TimingsReply.of([[end(0)]]).moved_n is UNSET


async def test_continuous_usage(app: ASGIApp, engine: FakeEngine) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": HELLO, "prompt": "Say: ", "stream": True, "stream_options": options, "max_tokens": 6}
    for path, prompt, counts in ((CHAT, PROMPT_OF_HELLO, [3, 3, 5, 6, 6]), (TEXT, 5, [3, 5, 6, 6])):
        *chunks, last, _ = (await post(app, path, body)).events
        expected = [{"prompt_tokens": prompt, "completion_tokens": n, "total_tokens": prompt + n} for n in counts]
        assert [chunk["usage"] for chunk in chunks] == expected
        assert last["usage"] == usage(prompt, 6)
    engine.script = lambda request: [b"abc", b"!"]  # the token of the stop string is not streamed
    *_, end, last, _ = (await post(app, TEXT, {**body, "stop": "!"})).events
    assert end["usage"]["completion_tokens"] == last["usage"]["completion_tokens"] == 4
    only_continuous = {**body, "stream_options": {"continuous_usage_stats": True}}
    assert all("usage" not in chunk for chunk in (await post(app, CHAT, only_continuous)).events[:-1])


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_progress_and_timings_of_a_stream(app: ASGIApp, engine: FakeEngine, path: str) -> None:
    engine.script = lambda request: [
        PrefillProgress(100, 20, 60, 0.25),
        0.005,
        PrefillProgress(100, 20, 100, 0.5),
        0.005,
        b"ab",
        0.005,
        b"c",
    ]
    body = {"messages": HELLO, "prompt": "x", "stream": True, "return_progress": True, "timings_per_token": True}
    events = (await post(app, path, body)).events[:-1]
    if path == CHAT:
        role = events.pop(0)
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": None}
        assert not {"timings", "prompt_progress"} & role.keys()
    start = {"total": 100, "cache": 20, "processed": 20, "time_ms": 0}
    steps = [start, {**start, "processed": 60, "time_ms": 250}, {**start, "processed": 100, "time_ms": 500}]
    assert [event.get("prompt_progress") for event in events] == [*steps, None, None, None]
    choices = [event["choices"][0] for event in events]
    assert [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices[3:]] == [
        "ab",
        "c",
        "",
    ]
    assert [event["timings"]["predicted_n"] for event in events] == [0, 0, 0, 2, 3, 3]
    assert [event["timings"]["prompt_n"] for event in events[:5]] == [0, 40, 80, 80, 80]
    quiet = (await post(app, path, {**body, "return_progress": False, "timings_per_token": False})).events[:-2]
    assert not any({"timings", "prompt_progress"} & event.keys() for event in quiet)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_verbose(app: ASGIApp, app_of: Apps, path: str, stream: bool) -> None:
    body = {"messages": HELLO, "prompt": "hi", "stream": stream}
    for served, fields, expected in (
        (app, {"verbose": True}, 1),
        (app, {}, 0),
        (app_of(verbose=True), {}, 1),
        (app_of(verbose=True), {"verbose": False}, 0),
    ):
        answer = await post(served, path, {**body, **fields})
        replies = answer.events[:-1] if stream else [answer.json]
        verbose = [reply["__verbose"] for reply in replies if "__verbose" in reply]
        assert len(verbose) == expected
        for reply in verbose:
            assert "hi" in reply["prompt"]
            assert reply["content"] == ("" if stream else "Hello wörld")
            assert reply["generation_settings"]["stream"] is stream
