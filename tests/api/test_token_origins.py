"""`token_origins` of requests and replies, and the origins that the engine reports."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import ASGIApp

from engine import Engine, EngineConfig, Finished, JsonSchema, Request, SamplingParams, Speculation, Tokens
from tests.api.asgi import post
from tests.conftest import MODEL

INPUT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/completion": {"prompt": "hi"},
}
# `Hello wörld` in three steps; the last token of each is the model's.
TEXTS = [*"Hello w", "\ufffd", "\ufffd", *"rld"]
ORIGINS = ["suffix", "suffix", "model", "suffix", "model", *["suffix"] * 6, "model"]


def origins_in(reply: Any) -> list[dict[str, Any]]:
    """Returns the origins of the first choice of a body or of an event."""
    holder = reply["choices"][0] if reply.get("choices") else reply
    return list(holder.get("token_origins", []))


@pytest.mark.parametrize("path", INPUT)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "body"])
async def test_each_token_has_its_origin(app: ASGIApp, path: str, stream: bool) -> None:
    answer = await post(app, path, {**INPUT[path], "stream": stream, "max_tokens": 99, "token_origins": True})
    replies = [event for event in answer.events if event != "[DONE]"] if stream else [answer.json]
    entries = [entry for reply in replies for entry in origins_in(reply)]
    assert [entry["token"] for entry in entries] == TEXTS
    assert [entry["origin"] for entry in entries] == ORIGINS
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "Hello wörld"
    assert "token_origins" not in str(replies[-1]) or not stream


@pytest.mark.parametrize("path", INPUT)
async def test_without_the_field_there_are_no_origins(app: ASGIApp, path: str) -> None:
    for stream in (True, False):
        answer = await post(app, path, {**INPUT[path], "stream": stream})
        assert b"token_origins" not in b"".join(answer.chunks)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
    ],
)
async def test_apis_without_origins_refuse_the_field(app: ASGIApp, path: str, body: Any) -> None:
    answer = await post(app, path, {**body, "token_origins": True})
    assert answer.status == 400
    assert "token_origins" in answer.json["error"]["message"]
    assert (await post(app, path, {**body, "token_origins": False})).status == 200


async def run(engine: Engine, **fields: Any) -> tuple[list[str], Finished]:
    """Returns the origins of a greedy request's tokens, and its terminal update."""
    prompt = tuple(engine.vocab.tokenize("1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9 1 2 3 4", special=True))
    origins: list[str] = []
    request = Request(prompt=prompt, max_tokens=24, sampling=SamplingParams(temperature=0), origins=True, **fields)
    async with engine.generate(request) as updates:
        async for update in updates:
            if isinstance(update, Tokens):
                assert len(update.origins) == len(update.ids)
                origins += update.origins
            else:
                return origins, update
    raise AssertionError("no end")


async def test_origins_agree_with_the_usage() -> None:
    config = EngineConfig.of(path=str(MODEL), threads=1, warmup=False, calibrate=False, slots=1, context=256)
    schema = JsonSchema(b'{"properties": {"answer": {"const": "forty two"}}, "required": ["answer"], "type": "object"}')
    fixed = Speculation(type=("suffix",), order="fixed")
    async with Engine.open(config) as engine:
        drafted, end = await run(engine, speculation=fixed)
        assert drafted.count("suffix") == end.usage.accepted > 0
        assert len(drafted) == end.usage.completion == drafted.count("suffix") + drafted.count("model")
        grammar = await engine.compile(schema)
        forced, _ = await run(engine, grammar=grammar, speculation=Speculation())
        assert set(forced) == {"forced", "model"}
        by_grammar, end = await run(engine, grammar=grammar, speculation=Speculation(type=("grammar",), order="fixed"))
        assert by_grammar.count("grammar") == end.usage.accepted > 0
