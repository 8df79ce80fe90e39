"""Speculative decoding in requests, replies and GET /props."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs
from starlette.types import ASGIApp

from api.server.app import create_app
from engine import PROPOSER_TYPES, DraftStats, Speculation
from tests.api.asgi import call, post
from tests.api.fake import FakeEngine, app_state

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
MIXED = (DraftStats("suffix", 7, (1, 0, 2)), DraftStats("ngram-mod", 3, (0, 0, 0, 1)), DraftStats("ngram-cache", 0, ()))


def app_with(engine: FakeEngine, *types: str) -> ASGIApp:
    """Returns an application with the default proposer types `types`."""
    return create_app(app_state(engine, options={"speculation": {"types": types}}))


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (None, None),
        (False, Speculation()),
        ("none", Speculation()),
        ({"type": "none"}, Speculation()),
        ({"type": []}, Speculation()),
        ({"type": ["suffix", "none"], "n_max": 3}, Speculation(n_max=3)),
        ("auto", Speculation(type=("auto",))),
        ("suffix", Speculation(type=("suffix",))),
        ({"type": ["suffix", "ngram-mod", "suffix"]}, Speculation(type=("suffix", "ngram-mod"))),
        (
            {"type": "suffix", "n_max": 9, "n_min": 2, "p_min": 0.5, "size_n": 4, "min_hits": 2, "order": "fixed"},
            Speculation(type=("suffix",), n_max=9, n_min=2, p_min=0.5, size_n=4, min_hits=2, order="fixed"),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_speculation_of_the_engine_request(
    engine: FakeEngine, path: str, field: Any, expected: Speculation | None
) -> None:
    answer = await post(app_with(engine, "ngram-mod"), path, {**HELLO, "prompt": "hi", "speculative": field})
    assert answer.status == 200
    assert engine.requests[0].speculation == expected


@pytest.mark.parametrize("field", [True, {}, {"type": None, "n_max": None}], ids=str)
@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([], ("auto",)),
        (["none", "suffix"], ("auto",)),
        (["suffix", "ngram-mod"], ("ngram-mod", "suffix")),
        (["draft"], ("auto",)),
        (["draft", "suffix"], ("suffix",)),
    ],
    ids=str,
)
async def test_true_means_the_default_types_or_all_types(
    engine: FakeEngine, field: Any, types: Any, expected: Any
) -> None:
    assert (await post(app_with(engine, *types), TEXT, {"prompt": "x", "speculative": field})).status == 200
    assert engine.requests[0].speculation == Speculation(type=expected)


async def test_llama_servers_name_of_the_draft_model(engine: FakeEngine) -> None:
    engine.unavailable_proposers = {}
    await post(app_with(engine), TEXT, {"prompt": "x", "speculative": {"type": ["draft-simple", "draft"]}})
    assert engine.requests[0].speculation == Speculation(type=("draft",))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_statistics_of_a_reply(app: ASGIApp, engine: FakeEngine, path: str, stream: bool) -> None:
    engine.drafts = MIXED
    field = {"type": ["suffix", "ngram-mod", "ngram-cache"], "n_max": 5, "p_min": 0.25}
    answer = await post(app, path, {**HELLO, "prompt": "hi", "speculative": field, "stream": stream})
    *others, last = answer.events[:-1] if stream else [answer.json]
    assert not any({"metrics", "speculative", "timings"} & other.keys() for other in others)
    assert last["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 1 + 7 / 4,
        "draft_acceptance_rate": 7 / 10,
        "acceptance_histogram": [1, 0, 2, 1],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 7,
        "num_draft_tokens": 10,
        "num_spec_tokens": 3,
    }
    assert last["speculative"] == {
        "type": ["suffix", "ngram-mod", "ngram-cache"],
        "n_max": 5,
        "p_min": 0.25,
        "by_type": {
            "suffix": {"drafts": 3, "drafted": 7, "accepted": 4},
            "ngram-mod": {"drafts": 1, "drafted": 3, "accepted": 3},
            "ngram-cache": {"drafts": 0, "drafted": 0, "accepted": 0},
        },
    }
    assert (last["timings"]["draft_n"], last["timings"]["draft_n_accepted"]) == (10, 7)


async def test_the_usage_chunk_has_the_statistics(app: ASGIApp, engine: FakeEngine) -> None:
    engine.drafts = MIXED
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 9}
    *chunks, last, _ = (await post(app, CHAT, body)).events
    assert not any({"metrics", "speculative"} & chunk.keys() for chunk in chunks)
    assert last["metrics"]["speculative_decoding"]["num_draft_tokens"] == 10
    assert list(last["speculative"]) == ["type", "by_type"]
    usage = last["usage"]
    assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 7, "rejected_prediction_tokens": 3}
    assert usage["completion_tokens"] == 9
    assert usage["total_tokens"] == usage["prompt_tokens"] + 9


async def test_several_choices_have_counts_by_type_only(app: ASGIApp, engine: FakeEngine) -> None:
    engine.drafts = MIXED
    for body in ({"prompt": "x", "n": 2}, {"prompt": ["x", "y"]}):
        reply = (await post(app, TEXT, body)).json
        assert "metrics" not in reply
        assert reply["speculative"]["by_type"]["suffix"] == {"drafts": 6, "drafted": 14, "accepted": 8}


@pytest.mark.parametrize("drafts", [(), (DraftStats("suffix", 0, ()),)])
async def test_nothing_drafted(app: ASGIApp, engine: FakeEngine, drafts: tuple[DraftStats, ...]) -> None:
    engine.drafts = drafts
    reply = (await post(app, TEXT, {"prompt": "x"})).json
    assert not {"metrics", "speculative"} & reply.keys()
    assert "draft_n" not in reply["timings"]
    reply = (await post(app, TEXT, {"prompt": "x", "speculative": True})).json
    assert "metrics" not in reply
    assert reply["speculative"]["type"] == [each.type for each in drafts]


async def test_disabled_speculation_is_in_the_reply(app: ASGIApp) -> None:
    reply = (await post(app, TEXT, {"prompt": "x", "speculative": False})).json
    assert reply["speculative"] == {"type": [], "by_type": {}}


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ("hi</s>", tuple(b"hi</s>")),
        ([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}], tuple(b"hi")),
        ("", ()),
        ([], ()),
        ("x" * 600, tuple(b"x" * 512)),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_predictions(app: ASGIApp, engine: FakeEngine, path: str, content: Any, tokens: tuple[int, ...]) -> None:
    prediction = {"type": "content", "content": content}
    answer = await post(app, path, {**HELLO, "prompt": "hi", "n": 2, "prediction": prediction})
    assert answer.status == 200
    assert [request.prediction for request in engine.requests] == [tokens] * 2


async def test_props(engine: FakeEngine) -> None:
    options = {
        "speculation": {"types": ["suffix", "draft"]},
        "sampling": {"temperature": 0.5},
        "generation": {"n_predict": 64, "ignore_eos": True, "reverse_prompt": ["User:"]},
        "batch": {"keep": 7},
    }
    app = create_app(app_state(engine, options=options, alias=["me"]))
    props = (await call(app, "GET", "/props")).json
    settings = props.pop("default_generation_settings")
    assert settings["n_ctx"] == 512
    assert (settings["params"]["temperature"], settings["params"]["seed"]) == (0.5, -1)
    assert "logit_bias" not in settings["params"]
    defaults = ("n_predict", "max_tokens", "n_keep", "ignore_eos", "stop")
    assert [settings["params"][name] for name in defaults] == [64, 64, 7, True, ["User:"]]
    assert settings["params"]["samplers"][0] == "penalties"
    assert props.pop("chat_template").startswith("{% for message in messages %}<|im_start|>")
    assert props.pop("build_info").startswith("paceline ")
    assert props.pop("deterministic") is False
    assert props.pop("system_fingerprint").startswith("fp_")
    supported = {name for name, value in props.pop("chat_template_caps").items() if value}
    assert supported == {"supports_string_content", "supports_system_role"}
    assert props == {
        "total_slots": 4,
        "media_marker": "<__media__>",
        "model_alias": "me",
        "model_path": "/models/fake-1.gguf",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "speculative": {
            "types": ["suffix"],
            "available": list(engine.proposers),
            "unavailable": {
                "draft": "there is no draft model, see --model-draft",
                "draft-mtp": "the model has no MTP layer that can be used",
            },
        },
        "memory": {
            "kv_unified": False,
            "kv_reason": "each slot has 512 tokens",
            "sharing": "any token",
            "window": 0,
            "ram_bytes": 2**30,
            "disk": False,
            "disk_bytes": 0,
            "moved_from": 0,
            "by_key": False,
        },
        "endpoint_slots": True,
        "endpoint_props": False,
        "endpoint_metrics": True,
        "modalities": {"vision": False, "audio": False, "video": False},
        "model_ftype": "no model",
        "is_sleeping": False,
    }
    assert (await call(app, "POST", "/props", {})).status == 501


async def test_props_of_a_model_that_cannot_cut(engine: FakeEngine) -> None:
    reason = "the model cannot roll back single tokens"
    engine.unavailable_proposers = dict.fromkeys(PROPOSER_TYPES, reason)
    engine.memory = structs.replace(engine.memory, partial=False)
    app = create_app(app_state(engine, options={"speculation": {"types": ["auto"]}}, cache_salt_by_key=True))
    props = (await call(app, "GET", "/props")).json
    assert (props["memory"]["sharing"], props["memory"]["by_key"]) == ("whole texts", True)
    assert props["speculative"] == {
        "types": [],
        "available": [],
        "unavailable": dict.fromkeys(PROPOSER_TYPES, reason),
    }
