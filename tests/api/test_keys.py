"""API keys of a file with their limits, owners for fair queueing, priorities and time limits."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import ASGIApp

from api.config.command_line import parse
from api.config.keys import check_key_files, configured_keys, read_key_file
from api.config.values import OptionError
from api.http import key_ring
from api.http.key_ring import ApiKey, KeyRing, KeyUse
from engine import DeadlineExceeded, QueueTimeout, Request
from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine, Step
from tests.api.server import serving

TEXT = "/v1/completions"
HELLO = {"prompt": "hi", "max_tokens": 5}
KEYS = """
[[keys]]
key = "a-secret"
name = "a"
weight = 3.0
max_concurrent = 1
min_priority = 2
[[keys]]
key = "b-secret"
name = "b"
tokens_per_minute = 60
[[keys]]
key = "root-secret"
admin = true
"""


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    return path


@pytest.fixture
def app(app_of: Apps, key_file: Path) -> ASGIApp:
    return app_of(keys=str(key_file), props=True)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_the_file_is_toml_or_json(key_file: Path, tmp_path: Path) -> None:
    keys = read_key_file(str(key_file))
    assert keys[0] == ApiKey(key="a-secret", name="a", weight=3.0, max_concurrent=1, min_priority=2)
    other = tmp_path / "keys.json"
    other.write_text('{"keys": [{"key": "a-secret", "name": "a", "admin": true}]}')
    options = parse(["-m", "x", "--keys", str(other), "--api-key", "old,a-secret"])
    assert configured_keys(options.server) == (
        ApiKey(key="a-secret", name="a", admin=True),
        ApiKey(key="old", admin=True),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no keys: add one, or leave the flag out"),
        ("keys = []", "has no keys"),
        ('[[key]]\nkey = "k"', "key: there is no such field; the nearest is keys"),
        ('[[keys]]\nname = "a"', r"keys\[0\].key: the field is missing"),
        ('[[keys]]\nkey = "k"\nwieght = 2', r"keys\[0\].wieght: there is no such field; the nearest is weight"),
        ('[[keys]]\nkey = "k"\nweight = 0', r"keys\[0\].weight: expected a number above 0"),
        ('[[keys]]\nkey = "k"\nname = "a b"', r"keys\[0\].name: expected"),
        ('[[keys]]\nkey = "k"\n[[keys]]\nkey = "k"', r"keys\[1\].key is that of keys\[0\] as well"),
        ("{", "is neither TOML nor JSON"),
    ],
)
def test_a_wrong_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(OptionError, match=f"--keys: .*{message}"):
        check_key_files(parse(["-m", "x", "--keys", str(path)]).server)


async def test_owner_weight_priority_and_timeout(app: ASGIApp, app_of: Apps, engine: FakeEngine) -> None:
    await post(app, TEXT, {**HELLO, "user": "u", "priority": 2, "timeout_ms": 1500}, headers=bearer("a-secret"))
    await post(app, TEXT, {**HELLO, "priority": -5}, headers=bearer("root-secret"))
    await post(app_of(), TEXT, {**HELLO, "user": "u" * 1000})
    message = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "metadata": {"user_id": "m"}}
    await post(app_of(), "/v1/messages", message)
    await post(app_of(), TEXT, HELLO)
    found = [(each.owner, each.weight, each.priority, each.timeout) for each in engine.requests]
    assert found[0] == ("key:a", 3.0, 2, 1.5)
    assert found[1][0].startswith("key:")
    assert found[1][1:] == (1.0, -5, None)
    assert [owner for owner, *_ in found[2:]] == ["user:" + "u" * 256, "user:m", "address:"]


async def test_a_priority_that_the_key_may_not_have(app: ASGIApp) -> None:
    for key, priority in (("a-secret", 1), ("b-secret", -1)):
        answer = await post(app, TEXT, {**HELLO, "priority": priority}, headers=bearer(key))
        assert (answer.status, answer.json["error"]["param"]) == (400, "priority")


async def test_admins_change_the_state_and_read_metrics(app: ASGIApp, app_of: Apps) -> None:
    for method, path, body in (
        ("POST", "/slots/0?action=erase", None),
        ("POST", "/lora-adapters", []),
        ("POST", "/props", {}),
        ("GET", "/metrics", None),
        ("GET", "/slots", None),
    ):
        answer = await call(app, method, path, body, headers=bearer("a-secret"))
        assert (answer.status, answer.json["error"]["type"]) == (403, "permission_error"), path
        headers = {**bearer("root-secret"), "content-type": "application/json"}
        assert (await call(app, method, path, body, headers=headers)).status == 200, path
        old = app_of(api_keys=["k"], props=True)
        assert (await call(old, method, path, body, headers={**headers, **bearer("k")})).status == 200, path
    assert (await call(app, "GET", "/v1/models", headers=bearer("a-secret"))).status == 200


async def test_concurrent_requests_of_a_key(app: ASGIApp, engine: FakeEngine) -> None:
    started = asyncio.Event()

    def script(request: Request) -> Iterable[Step]:
        started.set()
        return [asyncio.Event()]

    engine.script = script
    gone = asyncio.Event()
    first = asyncio.create_task(call(app, "POST", TEXT, HELLO, headers=json_bearer("a-secret"), disconnect=gone))
    await started.wait()
    answer = await post(app, TEXT, HELLO, headers=bearer("a-secret"))
    assert answer.status == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert (answer.json["error"]["type"], answer.json["error"]["code"]) == ("requests", "rate_limit_exceeded")
    assert (await call(app, "GET", "/v1/models", headers=bearer("a-secret"))).status == 200
    gone.set()
    await first
    engine.script = lambda request: [b"x"]
    assert (await post(app, TEXT, HELLO, headers=bearer("a-secret"))).status == 200


def json_bearer(key: str) -> dict[str, str]:
    return {**bearer(key), "content-type": "application/json"}


async def test_tokens_of_a_key(app: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(key_ring, "time", SimpleNamespace(monotonic=lambda: now))
    prompt = {"prompt": "x" * 80, "max_tokens": 10}
    answer = await post(app, TEXT, prompt, headers=bearer("b-secret"))
    assert answer.status == 200
    assert answer.headers["x-ratelimit-limit-tokens"] == "60"
    refused = await post(app, TEXT, prompt, headers=bearer("b-secret"))
    assert refused.status == 429
    assert refused.json["error"]["type"] == "tokens"
    assert int(refused.headers["retry-after"]) >= 30, "the request had 90 tokens, one is refilled each second"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    metrics = (await call(app, "GET", "/metrics", headers=bearer("root-secret"))).chunks[0].decode()
    assert 'paceline_http_errors_total{code="rate_limit_exceeded",status="429",type="tokens"} 1.0' in metrics
    assert 'paceline_key_requests{key="b",state="running"} 0.0' in metrics
    now += int(refused.headers["retry-after"])
    assert (await post(app, TEXT, HELLO, headers=bearer("b-secret"))).status == 200


def test_a_key_that_stays_keeps_its_use() -> None:
    ring = KeyRing([ApiKey(key="k", tokens_per_minute=100)])
    use = ring.find("k")
    assert isinstance(use, KeyUse)
    use.take(100)
    ring.replace([ApiKey(key="k", name="n", tokens_per_minute=160), ApiKey(key="new")])
    assert ring.find("k") is use
    assert 59 < float(use.headers()["x-ratelimit-remaining-tokens"]) < 63
    ring.replace([ApiKey(key="new")])
    assert ring.find("k") is None


@pytest.mark.parametrize(
    ("error", "status", "code", "header"),
    [
        (QueueTimeout(20.0), 503, "queue_timeout", ("retry-after", "20")),
        (DeadlineExceeded(1.5), 408, "timeout", ("x-should-retry", "false")),
    ],
)
async def test_time_limits_are_errors(
    error: Any, status: int, code: str, header: tuple[str, str], app_of: Apps, engine: FakeEngine
) -> None:
    engine.script = lambda request: [error]
    for body in (HELLO, {**HELLO, "stream": True}):
        answer = await post(app_of(), TEXT, body)
        assert (answer.status, answer.json["error"]["code"]) == (status, code)
        assert answer.headers[header[0]] == header[1]


def status_with(url: str, key: str) -> int:
    request = urllib.request.Request(f"{url}/v1/models", headers=bearer(key))
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_sighup_reads_the_files_again(key_file: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("line")
    flags = ["--keys", str(key_file), "--api-key-file", str(lines)]
    with serving("--sim", "--sim-cost", "free", *flags) as server:
        url = server.ready()
        assert (status_with(url, "a-secret"), status_with(url, "new")) == (200, 401)
        key_file.write_text(json.dumps({"keys": [{"key": "new"}]}))
        lines.write_text("other")
        server.signal(signal.SIGHUP)
        server.until("2 API keys")
        assert (status_with(url, "a-secret"), status_with(url, "line")) == (401, 401)
        assert (status_with(url, "new"), status_with(url, "other")) == (200, 200)
        key_file.write_text("{")
        server.signal(signal.SIGHUP)
        server.until("neither TOML nor JSON.*the earlier keys stay")
        assert (status_with(url, "new"), status_with(url, "other")) == (200, 200)
        for file in (key_file, lines):
            file.write_text("# none\n")
        server.signal(signal.SIGHUP)
        server.until("no API key is valid")
        assert {status_with(url, key) for key in ("new", "other", "a-secret", "")} == {401}
