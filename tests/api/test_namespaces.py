"""Prefix sharing between API keys and salts, and slot files, over the whole engine with a toy model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp

from api.config.options import Options
from api.generation.loaded_model import AppState, LoadedModel
from api.http.key_ring import namespace_of
from api.server.app import create_app
from engine import Engine, EngineConfig
from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine
from tests.toy import VOCABULARY, ToyBackend, ToyContext, opener

TEXT = "/v1/completions"
PROMPT = [Random(0).randrange(1, VOCABULARY) for _ in range(100)]


@asynccontextmanager
async def serving(context: ToyContext, **config: Any) -> AsyncIterator[ASGIApp]:
    """Opens an engine with a toy model and yields the application."""
    tables: dict[str, Any] = {
        "model": {"path": "toy.gguf", "warmup": False},
        "batch": {"slots": 4},
        "memory": {"ram": 1},
        "server": config,
    }
    options = msgspec.convert(tables, Options)
    settings = EngineConfig(model=options.model, batch=options.batch, memory=options.memory)
    async with Engine.open(settings, opener=opener(ToyBackend(context))) as engine:
        state = AppState(options.server)
        state.loaded = LoadedModel(engine, options)
        yield create_app(state)


async def cached(app: ASGIApp, key: str | None = None, **fields: Any) -> int:
    """Returns the number of cached prompt tokens of a request."""
    body = {"prompt": PROMPT, "max_tokens": 1, **fields}
    answer = await post(app, TEXT, body, headers={"authorization": f"Bearer {key}"} if key else {})
    assert answer.status == 200, answer.json
    found: int = answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


async def test_keys_do_not_share() -> None:
    context = ToyContext(cells=4000)
    async with serving(context, cache_salt_by_key=True, api_keys=["one", "two"]) as app:
        assert await cached(app, "one") == 0
        before = context.computed
        assert await cached(app, "two") == 0
        assert context.computed - before == 100
        assert await cached(app, "one") == await cached(app, "two") == 99
        assert await cached(app, "one", cache_salt="x") == 0, "a salt separates requests of one key"
        assert await cached(app, "two", cache_salt="x") == 0
        assert await cached(app, "one", cache_salt="x") == 99
        assert await cached(app, "one", cache_salt=f"{namespace_of('two')} ") == 0, (
            "a salt cannot name another key's namespace"
        )


async def test_keys_share_by_default() -> None:
    async with serving(ToyContext(cells=4000), api_keys=["one", "two"]) as app:
        assert await cached(app, "one") == 0
        assert await cached(app, "two") == 99
        assert await cached(app, "two", cache_salt="x") == 0


@pytest.mark.parametrize("by_key", [False, True])
async def test_salts_that_reach_the_engine(app_of: Apps, engine: FakeEngine, by_key: bool) -> None:
    app = app_of(cache_salt_by_key=by_key)
    for headers in ({}, {"authorization": "Bearer k"}, {"x-api-key": "k"}):
        for salt in (None, "", "x"):
            await post(app, TEXT, {"prompt": "a", "cache_salt": salt}, headers=headers)
    salts = [request.salt for request in engine.requests]
    if by_key:
        no_key, key = namespace_of(""), namespace_of("k")
        assert salts == [f"{no_key} ", f"{no_key} ", f"{no_key} x", *[f"{key} ", f"{key} ", f"{key} x"] * 2]
        assert "k" not in key
    else:
        assert salts == ["", "", "x"] * 3


async def test_a_slot_is_saved_restored_and_erased(tmp_path: Path) -> None:
    config: dict[str, Any] = {"slot_save_path": str(tmp_path / "slots"), "cache_salt_by_key": True}
    file = {"filename": "x.bin"}
    async with serving(ToyContext(cells=4000), **config) as app:
        assert (await post(app, "/slots/0?action=save", file)).status == 400, "the slot has not run a request"
        assert await cached(app, "one") == 0
        (slot, *_) = (await call(app, "GET", "/slots")).json
        assert (slot["is_processing"], slot["n_prompt_tokens"], slot["n_prompt_tokens_processed"]) == (False, 100, 100)
        saved = (await post(app, "/slots/0?action=save", file)).json
        assert (saved["n_saved"], saved["n_written"]) == (100, (tmp_path / "slots" / "x.bin").stat().st_size)
    async with serving(ToyContext(cells=4000), **config) as app:
        assert (await post(app, "/slots/1?action=restore", {"filename": "y.bin"})).status == 400
        restored = (await post(app, "/slots/1?action=restore", file)).json
        assert (restored["n_restored"], restored["n_read"]) == (100, saved["n_written"])
        assert await cached(app, "two") == 0
        assert await cached(app, "one") == 99
        assert (await post(app, "/slots/0?action=erase", None)).json == {"id_slot": 0, "n_erased": 100}
        assert await cached(app, "one") == 0


async def test_props_of_the_memory() -> None:
    async with serving(ToyContext(cells=4000, partial=False)) as app:
        props = (await call(app, "GET", "/props")).json
    assert props["memory"]["sharing"] == "whole texts"
    assert props["memory"]["ram_bytes"] == 2**20
    assert set(props["speculative"]["unavailable"].values()) == {"the model cannot roll back single tokens"}
    assert props["speculative"]["available"] == []
