"""Web pages, names of models, forms of bodies, and clients that speak HTTP in unusual ways."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.types import ASGIApp

from api.config.command_line import parse
from tests.api.asgi import CapturedResponse, call, post
from tests.api.conftest import Apps
from tests.api.server import serving

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
BODY = json.dumps(HELLO).encode()


def cors_headers(answer: CapturedResponse) -> dict[str, str]:
    """Returns the CORS headers by the ends of their names."""
    start = "access-control-allow-"
    return {name.removeprefix(start): text for name, text in answer.headers.items() if name.startswith(start)}


# ── CORS ──


async def test_every_page_may_call_the_server_by_default(app_of: Apps) -> None:
    """As in llama-server. A preflight needs no key, and errors have the headers too."""
    app, page = app_of(api_keys=["k"]), {"origin": "https://example.com"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    preflight = await call(app, "OPTIONS", CHAT, headers=page | asked)
    assert (preflight.status, preflight.chunks) == (200, [])
    allowed = {"origin": "https://example.com", "credentials": "true"}
    assert cors_headers(preflight) == {
        **allowed,
        "methods": "GET, POST, DELETE, OPTIONS",
        "headers": "*, authorization,x-stainless-os",
    }
    for headers, status in ((page, 401), (page | {"authorization": "Bearer k"}, 200)):
        answer = await post(app, CHAT, HELLO, headers=headers | {"content-type": "application/json"})
        assert answer.status == status
        assert cors_headers(answer) == allowed
        assert answer.headers["vary"] == "Origin"
        assert answer.headers["access-control-expose-headers"] == "x-request-id, retry-after"


async def test_streams_have_the_headers(app: ASGIApp) -> None:
    headers = {"origin": "https://example.com", "content-type": "application/json"}
    answer = await post(app, CHAT, HELLO | {"stream": True}, headers=headers)
    assert cors_headers(answer)["origin"] == "https://example.com"


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (["*"], "null", "null"),
        (["*"], None, None),
        (["https://a.example", "https://b.example"], "https://b.example", "https://b.example"),
        (["https://a.example"], "https://c.example", None),
        (["https://a.example"], "https://a.example.evil.com", None),
        (["localhost"], "http://localhost:5173", "http://localhost:5173"),
        (["localhost"], "http://127.0.0.1", "http://127.0.0.1"),
        (["localhost"], "http://[::1]:80", "http://[::1]:80"),
        (["localhost"], "http://localhost.evil.com", None),
        (["localhost"], "http://notlocalhost", None),
        (["localhost", "https://a.example"], "https://a.example", "https://a.example"),
        ([], "http://localhost", None),
    ],
    ids=str,
)
async def test_origins(app_of: Apps, origins: list[str], origin: str | None, allowed: str | None) -> None:
    headers = {} if origin is None else {"origin": origin}
    answer = await call(app_of(cors_origins=origins), "OPTIONS", CHAT, headers=headers)
    assert answer.status == 200
    assert cors_headers(answer).get("origin") == allowed
    assert answer.headers["vary"] == "Origin"


async def test_other_cors_settings(app_of: Apps) -> None:
    app = app_of(cors_credentials=False, cors_methods=["POST"], cors_headers=["authorization"])
    answer = await call(app, "OPTIONS", CHAT, headers={"origin": "https://a.example"})
    assert cors_headers(answer) == {"origin": "*", "methods": "POST", "headers": "authorization"}
    assert "vary" not in answer.headers


# ── loopback addresses ──


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("app.localhost", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("box.local:8000", 200),
        ("", 200),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("[::1", 403),
    ],
)
async def test_names_of_a_loopback_address(app_of: Apps, host: str, status: int) -> None:
    """A page whose own name was resolved to this machine is refused."""
    answer = await call(app_of(allowed_hosts=["box.local"]), "GET", "/health", headers={"host": host})
    assert answer.status == status
    if status == 403:
        assert answer.json["error"]["type"] == "permission_error"
        assert "--allowed-hosts" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("config", "checked"),
    [
        ({"host": ["127.0.0.1", "::1", "localhost"]}, True),
        ({"host": ["0.0.0.0"]}, False),
        ({"host": ["127.0.0.1", "192.0.2.1"]}, False),
        ({"allowed_hosts": ["*"]}, False),
        ({"api_keys": ["k"]}, False),
    ],
    ids=str,
)
async def test_where_names_are_checked(app_of: Apps, config: dict[str, Any], checked: bool) -> None:
    answer = await call(app_of(**config), "GET", "/health", headers={"host": "evil.example"})
    assert (answer.status == 403) is checked


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("https://a.example", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[::1", 403),
    ],
)
async def test_pages_that_may_not_call_a_loopback_address(app_of: Apps, origin: str, status: int) -> None:
    """The page of the server itself may call it without being listed."""
    headers = {"origin": origin, "host": "localhost:8000", "content-type": "application/json"}
    answer = await post(app_of(cors_origins=["https://a.example"]), CHAT, HELLO, headers=headers)
    assert answer.status == status


@pytest.mark.parametrize(
    ("config", "origin", "status"),
    [
        ({}, None, 200),
        ({}, "https://evil.example", 403),
        ({}, "http://lan:8000", 200),
        ({"cors_origins": ["https://a.example"]}, "https://a.example", 200),
        ({"api_keys": ["k"]}, "https://a.example", 200),
    ],
    ids=str,
)
async def test_pages_that_may_not_change_slots(
    app_of: Apps, config: dict[str, Any], origin: str | None, status: int
) -> None:
    """By default a page of any origin may generate, but only the server's own may erase what others have cached."""
    app = app_of(host=["0.0.0.0"], **config)
    headers = {"host": "lan:8000", "authorization": "Bearer k", **({"origin": origin} if origin else {})}
    for length in ("0", "2"):  # without a body, a page needs no permission to send the request
        body: dict[str, Any] | None = None if length == "0" else {}
        own = {**headers, "content-length": length, "content-type": "application/json"}
        assert (await post(app, "/slots/1?action=erase", body, headers=own)).status == status
    assert (await post(app, CHAT, HELLO, headers={**headers, "content-type": "application/json"})).status == 200


# ── bodies ──


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"content-type": "application/json"}, 200),
        ({"content-type": "Application/JSON; charset=utf-8"}, 200),
        ({"content-type": "application/vnd.api+json"}, 200),
        ({"content-type": "text/plain;charset=UTF-8"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"origin": "https://example.com"}, 415),
    ],
    ids=str,
)
async def test_content_types(app_of: Apps, headers: dict[str, str], status: int) -> None:
    answer = await post(app_of(), CHAT, HELLO, headers=headers)
    assert answer.status == status
    if status == 415:
        assert "--any-content-type" in answer.json["error"]["message"]
    assert (await post(app_of(any_content_type=True), CHAT, HELLO, headers=headers)).status == 200


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("", bytes), ("identity", bytes), ("gzip", gzip.compress), ("x-gzip", gzip.compress), ("Deflate", zlib.compress)],
)
@pytest.mark.parametrize("path", [CHAT, "/apply-template", "/tokenize"])
async def test_encodings_of_bodies(app: ASGIApp, path: str, encoding: str, compress: Any, bom: bytes) -> None:
    answer = await post(app, path, compress(bom + BODY), headers={"content-encoding": encoding})
    assert answer.status == 200


@pytest.mark.parametrize(
    ("encoding", "body", "status", "message"),
    [
        ("br", BODY, 415, "expected gzip, deflate or no compression, not 'br'"),
        ("gzip", BODY, 400, "expected gzip or zlib data"),
        ("gzip", gzip.compress(BODY, mtime=0)[:-9], 400, "one complete stream"),
        ("gzip", gzip.compress(BODY, mtime=0) + b"x", 400, "one complete stream"),
        ("gzip", b"", 400, "one complete stream"),
        ("gzip", gzip.compress(b" " * 2000, mtime=0), 413, "at most 1024 bytes (--max-body)"),
    ],
)
async def test_encodings_that_are_refused(app_of: Apps, encoding: str, body: bytes, status: int, message: str) -> None:
    answer = await post(app_of(max_body=1024), CHAT, body, headers={"content-encoding": encoding})
    assert (answer.status, message in answer.json["error"]["message"]) == (status, True)


# ── models and status ──


async def test_other_models_are_served(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "paceline"):
        answers = [await post(app, CHAT, HELLO | {"model": name}) for name in ("gpt-5", "gpt-5", "fake-1")]
    assert [(answer.status, answer.json["model"]) for answer in answers] == [(200, "fake-1")] * 3
    assert caplog.text.count("requests for the model 'gpt-5'") == 1
    assert (await call(app, "GET", "/v1/models/gpt-5")).status == 404


async def test_two_names(app_of: Apps) -> None:
    app = app_of(alias=["a", "b"], strict_model=True)
    for path in ("/v1/models", "/v1/models/", "/models"):
        (model,) = (await call(app, "GET", path)).json["data"]
        assert (model["id"], model["aliases"]) == ("a", ["a", "b"])
    assert [(await call(app, "GET", f"/v1/models/{name}")).json["id"] for name in ("a", "b", "fake-1.gguf")] == [*"aba"]
    for name, status in (("a", 200), ("b", 200), ("fake-1", 200), ("c", 404)):
        answer = await post(app, CHAT, HELLO | {"model": name})
        assert answer.status == status
        assert status != 200 or answer.json["model"] == "a"


def test_lists_on_the_command_line(tmp_path: Any) -> None:
    server = parse(["-m", "x", "-a", "a, b", "--host", "127.0.0.1,::1", "--host", "::2"]).server
    assert (server.alias, server.host) == (("a", "b"), ("127.0.0.1", "::1", "::2"))
    file = tmp_path / "paceline.toml"
    file.write_text('[server]\nhost = "0.0.0.0"\nalias = ["a", "b"]')
    server = parse(["-m", "x", "--config", str(file)]).server
    assert (server.alias, server.host) == (("a", "b"), ("0.0.0.0",))


async def test_version(app: ASGIApp) -> None:
    assert (await call(app, "GET", "/version")).json["version"].count(".") == 2


# ── the real server ──


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("--host", "127.0.0.1,127.0.0.2", "--host", "::1") as server:
        yield server.ready()


def exchange(url: str, request: bytes, *, host: str = "") -> tuple[bytes, bytes]:
    """Sends `request` and returns head and body of the response, up to the end of the connection."""
    parts = urlsplit(url)
    with socket.create_connection((host or parts.hostname, parts.port or 80), timeout=60) as connection:
        connection.sendall(request)
        response = b""
        while data := connection.recv(65536):
            response += data
    head, _, body = response.partition(b"\r\n\r\n")
    return head.lower(), body


def request_of(version: str, *headers: str, body: bytes = b"", path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
PROMPT = json.dumps({"prompt": "1 2 3", "max_tokens": 2}).encode()


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upgrade_is_ignored(url: str, chunked: bool) -> None:
    """Java's HttpClient offers h2c with every first request of a connection."""
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(PROMPT), PROMPT) if chunked else PROMPT
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(PROMPT)}"
    first = request_of("1.1", *UPGRADE, length, body=body)
    last = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n"
    head, rest = exchange(url, first + last)
    assert head.startswith(b"http/1.1 200")
    assert b'"completion_tokens":2' in rest
    assert b'{"version":' in rest, "the connection continues after the request"


def test_an_upgrade_in_two_parts(url: str) -> None:
    parts = urlsplit(url)
    data = request_of("1.1", *UPGRADE, "Connection: close", f"Content-Length: {len(PROMPT)}", body=PROMPT)
    for cut in (30, len(data) - len(PROMPT), len(data) - 5):
        with socket.create_connection((parts.hostname, parts.port or 80), timeout=60) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(data[:cut])
            connection.sendall(data[cut:])
            response = b"".join(iter(lambda: connection.recv(65536), b""))
        assert response.startswith(b"HTTP/1.1 200")


def test_many_upgrades_in_one_packet(url: str) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    _, rest = exchange(url, head * 2000 + last)
    assert rest.count(b"HTTP/1.1 200 OK") == 2000


@pytest.mark.parametrize(
    "request_start",
    [
        b"GET /health HTTP/1.1\r\n" + b"X-Long: 1234567890\r\n" * 5000,
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 500_000,
        b"GET /" + b"a" * 500_000,
        request_of("1.1", "Transfer-Encoding: chunked", body=b"1\r\n{\r\n0\r\n" + b"X: 1234567890\r\n" * 50_000),
    ],
    ids=["many headers", "one header", "path", "trailers"],
)
def test_endless_heads(url: str, request_start: bytes) -> None:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=60) as connection:
        with suppress(ConnectionError):
            connection.sendall(request_start)
            connection.sendall(b"\r\n")
        with suppress(ConnectionError):  # a reset may overtake the response
            response = b"".join(iter(lambda: connection.recv(65536), b""))
            assert response.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 414 "))


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
def test_header_names_are_in_title_case(url: str, expect: tuple[str, ...]) -> None:
    """Some clients of llama-server compare the names by case."""
    parts = urlsplit(url)
    body = json.dumps({"prompt": "1", "max_tokens": 1, "stream": True}).encode()
    headers = (*expect, "Origin: http://localhost", "Connection: close", f"Content-Length: {len(body)}")
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=60) as connection:
        connection.sendall(request_of("1.1", *headers, body=body))
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    head = response.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")[0]
    names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
    assert names == [name.title() for name in names]
    assert {b"Content-Type", b"Access-Control-Allow-Origin", b"X-Request-Id", b"Transfer-Encoding"} <= set(names)


@pytest.mark.parametrize("stream", [True, False])
def test_http_1_0(url: str, stream: bool) -> None:
    body = json.dumps({"prompt": "1 2 3", "max_tokens": 2, "stream": stream}).encode()
    head, rest = exchange(url, request_of("1.0", f"Content-Length: {len(body)}", body=body))
    assert head.startswith(b"http/1.1 200")
    assert b"transfer-encoding" not in head
    if stream:
        assert rest.startswith(b"data: {")
        assert rest.endswith(b"data: [DONE]\n\n")
    else:
        assert f"content-length: {len(rest)}".encode() in head


@pytest.mark.parametrize("target", ["localhost:443", "/v1/completions"])
def test_connect_is_refused(url: str, target: str) -> None:
    head, _ = exchange(url, f"CONNECT {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert head.startswith(b"http/1.1 40")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_several_addresses(url: str, host: str) -> None:
    request = b"GET /v1/models/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    head, body = exchange(url, request, host=host)
    assert head.startswith(b"http/1.1 200")
    assert b'"object":"list"' in body
