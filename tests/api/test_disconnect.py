"""A disconnect at any stage cancels the request; errors before and after the first event; pings."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from starlette.types import ASGIApp

from engine import Draining, EngineFault, Overloaded
from tests.api.asgi import ASGI_VERSIONS, call, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine, endless, silence

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {CHAT: HELLO, TEXT: {"prompt": "hi", "max_tokens": -1}}

pytestmark = pytest.mark.parametrize("path", [CHAT, TEXT])


@pytest.mark.parametrize("spec", ASGI_VERSIONS)
@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_before_the_first_token(
    path: str, stream: bool, spec: str, app: ASGIApp, engine: FakeEngine
) -> None:
    engine.script, gone = silence, asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, gone.set)
    answer = await post(app, path, {**BODIES[path], "stream": stream}, disconnect=gone, spec=spec)
    assert engine.log == ["submit", "cancel"]
    assert answer.messages == []


@pytest.mark.parametrize("spec", ASGI_VERSIONS)
@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_before_the_request(
    path: str, stream: bool, spec: str, app: ASGIApp, engine: FakeEngine
) -> None:
    engine.script = endless
    answer = await post(app, path, {**BODIES[path], "stream": stream}, disconnect_after=0, spec=spec)
    assert engine.log in ([], ["submit", "cancel"])
    assert answer.messages == []


@pytest.mark.parametrize("send_only", [False, True], ids=["received", "send fails"])
@pytest.mark.parametrize("n", [1, 3])
async def test_disconnect_in_a_stream(path: str, n: int, send_only: bool, app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = endless
    answer = await post(app, path, {**BODIES[path], "stream": True, "n": n}, disconnect_after=5, send_only=send_only)
    assert engine.log == ["submit"] * n + ["cancel"] * n
    assert answer.status == 200
    assert len(answer.chunks) == 5
    assert not answer.complete


async def test_disconnect_in_a_stream_before_2_4(path: str, app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = endless
    answer = await post(app, path, {**BODIES[path], "stream": True}, disconnect_after=3, spec="2.3")
    assert engine.log == ["submit", "cancel"]
    assert len(answer.chunks) == 3


async def test_disconnect_before_a_whole_body(path: str, app: ASGIApp, engine: FakeEngine) -> None:
    engine.script, gone = endless, asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, gone.set)
    await post(app, path, {**BODIES[path], "n": 2}, disconnect=gone)
    assert engine.log == ["submit", "submit", "cancel", "cancel"]


async def test_disconnect_is_logged(
    path: str, app: ASGIApp, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = endless
    with caplog.at_level(logging.INFO, "paceline"):
        await post(app, path, {**BODIES[path], "stream": True}, disconnect_after=2, headers={"x-request-id": "me"})
    assert f"me POST {path} 499" in caplog.text


async def test_disconnect_while_the_body_is_received(path: str, app: ASGIApp, engine: FakeEngine) -> None:
    gone = asyncio.Event()
    gone.set()
    answer = await call(app, "POST", path, body_chunks=[], disconnect=gone, spec="2.3")
    assert answer.messages == []
    assert engine.log == []


@pytest.mark.parametrize("stream", [True, False])
async def test_overload_is_a_status_with_retry_after(path: str, stream: bool, app: ASGIApp, engine: FakeEngine) -> None:
    engine.refusal = Overloaded(7.2)
    answer = await post(app, path, {**BODIES[path], "stream": stream})
    assert answer.status == 429
    assert answer.headers["retry-after"] == "8"
    assert answer.json["error"]["type"] == "rate_limit_error"


async def test_overload_of_the_second_choice_ends_the_first(path: str, app: ASGIApp, engine: FakeEngine) -> None:
    engine.refusal, engine.num_accepted, engine.script = Overloaded(1), 1, endless
    answer = await post(app, path, {**BODIES[path], "n": 2, "stream": True})
    assert answer.status == 429
    assert engine.log == ["submit", "cancel"]


async def test_draining(path: str, app: ASGIApp, engine: FakeEngine) -> None:
    engine.refusal = Draining()
    answer = await post(app, path, BODIES[path])
    assert answer.status == 503
    assert "retry-after" in answer.headers


@pytest.mark.parametrize("stream", [True, False])
async def test_fault_before_the_first_byte_is_a_status(
    path: str, stream: bool, app: ASGIApp, engine: FakeEngine
) -> None:
    engine.script = lambda request: [EngineFault("no luck")]
    answer = await post(app, path, {**BODIES[path], "stream": stream})
    assert answer.status == 500
    assert answer.json == {"error": {"message": "no luck", "type": "server_error", "param": None, "code": None}}


@pytest.mark.parametrize("n", [1, 2])
async def test_fault_after_the_first_byte_is_the_last_event(
    path: str, n: int, app: ASGIApp, engine: FakeEngine
) -> None:
    engine.script = lambda request: [b"a", 0.01, EngineFault("no luck")]
    answer = await post(app, path, {**BODIES[path], "stream": True, "n": n})
    assert answer.status == 200
    assert answer.complete
    assert answer.events[-1]["error"]["message"] == "no luck"
    first_chunks = n if "chat" in path else 0  # with the role only
    assert len(answer.events) == first_chunks + n + 1


async def test_fault_of_a_whole_body_is_a_status(path: str, app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: [b"a", 0.01, EngineFault("no luck")]
    assert (await post(app, path, BODIES[path])).status == 500


async def test_after_a_fatal_fault_the_server_is_unhealthy(path: str, app: ASGIApp, engine: FakeEngine) -> None:
    engine.script = lambda request: [EngineFault("the end", fatal=True)]
    assert (await post(app, path, BODIES[path])).status == 500
    assert (await call(app, "GET", "/health")).status == 500


@pytest.mark.parametrize("kind", [RuntimeError, OSError])
async def test_unexpected_exception_after_the_first_byte(
    path: str,
    kind: type[Exception],
    app: ASGIApp,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An OSError of the server itself is no disconnect of the client."""

    def broken(*_: object) -> None:
        raise kind("secret")

    engine.script = lambda request: [b"a", 0.01, b"b"]
    monkeypatch.setattr("api.generation.openai_replies._last_events", broken)
    answer = await post(app, path, {**BODIES[path], "stream": True})
    assert answer.events[-1]["error"]["type"] == "server_error"
    assert "secret" not in str(answer.events)
    assert "secret" in caplog.text


async def test_pings_without_tokens(path: str, app_of: Apps, engine: FakeEngine) -> None:
    engine.script = lambda request: [0.1, b"a", 0.1, b"b"]
    answer = await post(app_of(sse_ping=0.03), path, {**BODIES[path], "stream": True})
    assert answer.chunks[0] == b": ping\n\n"
    assert answer.chunks.count(b": ping\n\n") >= 2
    assert answer.events[-1] == "[DONE]"


async def test_no_pings_between_tokens(path: str, app_of: Apps, engine: FakeEngine) -> None:
    engine.script = lambda request: [step for _ in range(10) for step in (b"a", 0.04)]
    answer = await post(app_of(sse_ping=0.3), path, {**BODIES[path], "stream": True})
    assert b": ping\n\n" not in answer.chunks


async def test_no_pings_if_they_are_off(path: str, app_of: Apps, engine: FakeEngine) -> None:
    engine.script = lambda request: [0.05, b"a"]
    answer = await post(app_of(sse_ping=0), path, {**BODIES[path], "stream": True})
    assert b": ping\n\n" not in answer.chunks


async def test_an_error_after_a_ping_is_an_event(path: str, app_of: Apps, engine: FakeEngine) -> None:
    engine.script = lambda request: [0.06, EngineFault("no luck")]
    answer = await post(app_of(sse_ping=0.02), path, {**BODIES[path], "stream": True})
    assert answer.status == 200
    assert answer.events == [{"error": {"message": "no luck", "type": "server_error", "param": None, "code": None}}]
