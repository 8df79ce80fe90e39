"""Vertex AI's prediction protocol over raw ASGI."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import ASGIApp

from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@pytest.fixture
def predicting(app_of: Apps, monkeypatch: pytest.MonkeyPatch) -> ASGIApp:
    monkeypatch.setenv("AIP_MODE", "PREDICTION")
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "alive")
    return app_of()


async def test_each_instance_gets_the_reply_of_its_endpoint(predicting: ASGIApp, engine: FakeEngine) -> None:
    instances = [
        {"@requestFormat": "chatCompletions", **CHAT, "stream": True},
        {"@requestFormat": "/completion", "prompt": "x"},
        {"@requestFormat": "tokenize", "content": "x"},
        {"@requestFormat": "chatCompletion", **CHAT},
        {"@requestFormat": "chatCompletions", **CHAT, "temperature": -1},
        {},
    ]
    answer = await post(predicting, "/predict", {"instances": instances, "parameters": {}})
    chat, text, tokens, unknown, wrong, unnamed = answer.json["predictions"]
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    assert (text["content"], tokens["tokens"]) == ("Hello w\u00f6rld", [120])
    assert "the nearest is chatCompletions" in unknown["error"]["message"]
    assert (wrong["error"]["param"], unnamed["error"]["param"]) == ("temperature", "instances[5].@requestFormat")
    assert (await call(predicting, "GET", "/alive")).status == 200


async def test_a_disconnect_cancels_all_instances(predicting: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"a", asyncio.Event()]
    gone = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, gone.set)
    instances = [{"@requestFormat": "chatCompletions", **CHAT}] * 2
    await post(predicting, "/predict", {"instances": instances}, disconnect=gone)
    assert sorted(engine.log) == ["cancel", "cancel", "submit", "submit"]


@pytest.mark.parametrize("body", [{}, {"instances": 1}, {"instances": [1]}, {"instances": [{}] * 129}], ids=str)
async def test_bodies_without_instances(predicting: ASGIApp, body: Any) -> None:
    answer = await post(predicting, "/predict", body)
    assert answer.status == 400
    assert answer.json["error"]["param"].startswith("instances")


async def test_without_the_platform_there_is_no_route(app: ASGIApp) -> None:
    assert (await post(app, "/predict", {"instances": []})).status == 404
