"""A server whose engine fails or hangs: what clients get, and how the process ends."""

from __future__ import annotations

import json
import signal
import sys
import threading
import urllib.error
import urllib.request
from typing import Any

import pytest
from starlette.types import ASGIApp

from api.server.app import create_app
from api.server.lifecycle import ENGINE_FAULT, THREAD_HANGS
from engine import EngineFault, EngineStalled
from tests.api.asgi import call, post
from tests.api.fake import FakeEngine, app_state
from tests.api.server import Server

HELLO = {"prompt": "hi", "max_tokens": 50}

# The simulated model, whose decode number 3 does not end, or raises.
_HANG = "time.sleep(1000)"
_RAISE = "raise ZeroDivisionError('a bug of ours')"
_PROGRAM = """
import sys, time
import engine.watchdog
from api.__main__ import main
from engine.sim.context import SimContext
engine.watchdog.HANG_SECONDS = engine.watchdog.FAIL_SECONDS = 0.1
decode, left = SimContext.decode, [3]
def break_decode(*arguments):
    left[0] -= 1
    if left[0] == 0:
        {fault}
    return decode(*arguments)
SimContext.decode = break_decode
sys.exit(main(["serve", "--sim", "--no-warmup", "--port", "0", "--grace", "0.1", *sys.argv[1:]]))
"""


class BrokenServer(Server):
    """A server with the simulated model, whose third decode runs `fault`."""

    def __init__(self, fault: str, *arguments: str) -> None:
        super().__init__(*arguments, command=[sys.executable, "-c", _PROGRAM.format(fault=fault)])


def stream(url: str) -> list[str]:
    """Returns the data of all events of one stream."""
    body = json.dumps({**HELLO, "stream": True, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return [line[6:].decode().strip() for line in response if line.startswith(b"data: ")]


def fetch(url: str) -> tuple[int, str]:
    """Returns the status and the body of a response."""
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def error_in(events: list[str]) -> dict[str, Any]:
    """Returns the error of the last event."""
    error = json.loads(events[-1])["error"]
    assert isinstance(error, dict)
    return error


def test_a_fatal_fault_is_told_to_clients_and_ends_the_process() -> None:
    exiting, staying = BrokenServer(_RAISE), BrokenServer(_RAISE, "--on-fault", "stay")
    try:
        assert error_in(stream(exiting.ready()))["type"] == "server_error"
        assert exiting.wait() == ENGINE_FAULT
        assert "a bug of ours" in "\n".join(exiting.lines), "the log has the traceback"
        url = staying.ready()
        assert error_in(stream(url))["type"] == "server_error"
        assert fetch(f"{url}/health")[0] == 500
        status, metrics = fetch(f"{url}/metrics")
        assert (status, 'paceline_requests_total{reason="error"}' in metrics) == (200, True)
        staying.signal(signal.SIGTERM)
        assert staying.wait() == ENGINE_FAULT
    finally:
        exiting.close()
        staying.close()


def test_a_process_whose_engine_hangs_ends_when_told_to() -> None:
    server = BrokenServer(_HANG, "--stall-timeout", "0.2")
    events: list[str] = []
    try:
        url = server.ready()
        client = threading.Thread(target=lambda: events.extend(stream(url)))
        client.start()
        server.until("ERROR.*the engine has not finished a step")
        status, body = fetch(f"{url}/health")
        assert (status, json.loads(body)["error"]["code"]) == (503, "engine_stalled")
        assert fetch(f"{url}/metrics")[0] == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == THREAD_HANGS
        client.join(20)
        assert error_in(events)["code"] == "shutting_down"
        assert "in break_decode" in "\n".join(server.lines), "the log has the stack of the engine thread"
    finally:
        server.close()


async def test_a_stall_is_a_503_until_it_ends(engine: FakeEngine) -> None:
    app = create_app(app_state(engine))
    engine.stall = EngineStalled(130.0)
    for path in ("/health", "/livez", "/v1/completions"):
        answer = await (post(app, path, HELLO) if "/v1" in path else call(app, "GET", path))
        assert (answer.status, answer.json["error"]["code"]) == (503, "engine_stalled")
        assert "130 s" in answer.json["error"]["message"]
        assert answer.headers["retry-after"] == "30"
    engine.stall = None
    assert (await call(app, "GET", "/health")).status == 200


@pytest.mark.parametrize("scraped_before", [False, True])
async def test_metrics_go_on_after_a_fatal_fault(app: ASGIApp, engine: FakeEngine, scraped_before: bool) -> None:
    if scraped_before:
        await call(app, "GET", "/metrics")
    engine.fault = EngineFault("the end", fatal=True)
    assert (await call(app, "GET", "/health")).status == 500
    assert (await call(app, "GET", "/metrics")).status == 200
