"""Who shares prefixes with whom, and slots, over the whole engine but the model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp

from api.config.flags import Options
from api.generation.loaded_model import Served, Site
from api.http.keys import namespace_of
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
    """The application over an engine with a toy for a model."""
    tables: dict[str, Any] = {
        "model": {"path": "toy.gguf", "warmup": False},
        "batch": {"slots": 4},
        "memory": {"ram": 1},
        "server": config,
    }
    options = msgspec.convert(tables, Options)
    settings = EngineConfig(model=options.model, batch=options.batch, memory=options.memory)
    async with Engine.open(settings, opener=opener(ToyBackend(context))) as engine:
        site = Site(options.server)
        site.served = Served(engine, options)
        yield create_app(site)


async def cached(app: ASGIApp, key: str | None = None, **fields: Any) -> int:
    """Tokens that a request finds computed."""
    body = {"prompt": PROMPT, "max_tokens": 1, **fields}
    answer = await post(app, TEXT, body, headers={"authorization": f"Bearer {key}"} if key else {})
    assert answer.status == 200, answer.json
    found: int = answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


async def test_keys_share_nothing_with_each_other() -> None:
    context = ToyContext(cells=4000)
    async with serving(context, cache_salt_by_key=True, api_keys=["one", "two"]) as app:
        assert await cached(app, "one") == 0
        before = context.computed
        assert await cached(app, "two") == 0
        assert context.computed - before == 100
        assert await cached(app, "one") == await cached(app, "two") == 99
        assert await cached(app, "one", cache_salt="x") == 0, "a salt divides what a key shares"
        assert await cached(app, "two", cache_salt="x") == 0
        assert await cached(app, "one", cache_salt="x") == 99
        assert await cached(app, "one", cache_salt=f"{namespace_of('two')} ") == 0, "and cannot be another key's"


async def test_keys_share_unless_told_not_to() -> None:
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
        nobody, key = namespace_of(""), namespace_of("k")
        assert salts == [f"{nobody} ", f"{nobody} ", f"{nobody} x", *[f"{key} ", f"{key} ", f"{key} x"] * 2]
        assert "k" not in key
    else:
        assert salts == ["", "", "x"] * 3


async def test_a_slot_is_saved_restored_and_erased(tmp_path: Path) -> None:
    config: dict[str, Any] = {"slot_save_path": str(tmp_path / "slots"), "cache_salt_by_key": True}
    file = {"filename": "x.bin"}
    async with serving(ToyContext(cells=4000), **config) as app:
        assert (await post(app, "/slots/0?action=save", file)).status == 400, "nothing ran"
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


async def test_what_is_said_of_the_memory() -> None:
    async with serving(ToyContext(cells=4000, partial=False)) as app:
        props = (await call(app, "GET", "/props")).json
    assert props["memory"]["sharing"] == "whole texts"
    assert props["memory"]["ram_bytes"] == 2**20
    assert set(props["speculative"]["unavailable"].values()) == {"the model cannot forget single tokens"}
    assert props["speculative"]["available"] == []
