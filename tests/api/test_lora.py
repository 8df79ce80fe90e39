"""GET and POST /lora-adapters, and the field `lora` of requests."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import ASGIApp

from engine import AdapterScale
from tests.api.asgi import call, post
from tests.api.fake import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi"},
    "/completion": {"prompt": "hi"},
    "/v1/messages": {**CHAT, "max_tokens": 9},
    "/v1/responses": {"input": "hi"},
}
A, B = (AdapterScale(0, 0.25, "a"),), (AdapterScale(1, 2.0, "b"),)


async def scales(app: ASGIApp) -> list[float]:
    return [each["scale"] for each in (await call(app, "GET", "/lora-adapters")).json]


async def test_the_list_and_new_scales(app: ASGIApp, engine: FakeEngine) -> None:
    first, second = (await call(app, "GET", "/lora-adapters")).json
    paths = ["/adapters/a.gguf", "/adapters/b.gguf"]
    assert first == {"id": 0, "path": paths[0], "scale": 0.0, "task_name": "sums", "prompt_prefix": "Add: "}
    assert second == {"id": 1, "path": paths[1], "scale": 0.0, "task_name": "", "prompt_prefix": ""}
    assert (await post(app, "/lora-adapters", [{"id": 0, "scale": 0.25}])).json == {"success": True}
    assert await scales(app) == [0.25, 0.0]
    await post(app, "/completion", BODIES["/completion"])
    assert engine.requests[-1].adapters == A
    assert (await post(app, "/lora-adapters", [])).status == 200
    assert await scales(app) == [0.0, 0.0]


@pytest.mark.parametrize("path", BODIES)
async def test_every_endpoint_has_the_field(app: ASGIApp, engine: FakeEngine, path: str) -> None:
    await post(app, "/lora-adapters", [{"id": 0, "scale": 0.25}])
    for given, wanted in (([{"id": 1, "scale": 2}], B), ([{"id": 0}], ()), ([], A), (None, A)):
        answer = await post(app, path, {**BODIES[path], "lora": given})
        assert (answer.status, engine.requests[-1].adapters) == (200, wanted)
    answer = await post(app, path, {**BODIES[path], "lora": [{"id": 7, "scale": 1}]})
    assert answer.status == 400
    assert "there is no adapter 7; adapters are 0 to 1" in answer.json["error"]["message"]


async def test_the_settings_of_a_completion_have_the_applied_adapters(app: ASGIApp) -> None:
    answer = await post(app, "/completion", {"prompt": "hi", "lora": [{"id": 1, "scale": 2}, {"id": 0, "scale": 0}]})
    assert answer.json["generation_settings"]["lora"] == [{"id": 1, "scale": 2.0}]


@pytest.mark.parametrize(
    "body",
    [{}, None, 5, [5], [{"scale": 1}], [{"id": -1}], [{"id": 2, "scale": 1}], [{"id": 0, "scale": 1e9}]],
    ids=str,
)
async def test_wrong_scales_change_nothing(app: ASGIApp, body: Any) -> None:
    await post(app, "/lora-adapters", [{"id": 1, "scale": 3}])
    answer = await post(app, "/lora-adapters", body)
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert await scales(app) == [0.0, 3.0]
