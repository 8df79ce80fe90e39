"""Limits of connections: their number, the seconds for the parts of an exchange, sizes of heads, HTTPS, shutdown."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from api.generation.loaded_model import AppState
from api.server.connections import ConnectionLimits
from api.server.lifecycle import StopSignals, UvicornServer, listen
from engine import ShutDown
from tests.api.fake import FakeEngine, app_state, silence

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHAT_BODY = b'{"messages": [{"role": "user", "content": "hi"}]}'


def chat(length: int = len(CHAT_BODY)) -> bytes:
    """Returns the head of a chat request."""
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length


async def until(condition: Callable[[], bool]) -> None:
    """Waits until `condition` returns True."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


class Connection:
    """A client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self) -> bytes:
        """Returns the head of the next response, whose body is read too."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await self._reader.readexactly(int(length or b"0"))
        return head

    async def rest(self) -> bytes:
        """Returns all data up to the end of the connection."""
        try:
            return await self._reader.read(-1)
        except ConnectionError:
            return b""

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


class Server:
    """A running server with a fake engine."""

    def __init__(self, state: AppState, engine: FakeEngine, server: UvicornServer, port: int) -> None:
        self.state, self.engine, self._server, self._port = state, engine, server, port
        self.serving: asyncio.Task[None] | None = None
        self.connections: list[Connection] = []

    async def connect(self, *data: bytes, tls: ssl.SSLContext | None = None) -> Connection:
        client = socket.create_connection(("127.0.0.1", self._port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        name = "localhost" if tls else None
        connection = Connection(*await asyncio.open_connection(sock=client, ssl=tls, server_hostname=name, limit=4096))
        for each in data:
            await connection.send(each)
        self.connections.append(connection)
        return connection

    async def close(self) -> None:
        """Ends all connections and the server."""
        assert self.serving is not None
        await self._server.close(self.serving)

    async def until_submitted(self) -> bool:
        """Waits until the engine has a request, and returns True."""
        await until(lambda: bool(self.engine.log))
        return True

    async def until_open(self, number: int) -> None:
        """Waits until the server has `number` open connections."""
        await until(lambda: len(self._server.server_state.connections) == number)


@asynccontextmanager
async def running(
    engine: FakeEngine | None = None, number: int = 100, seconds: float = 60.0, **config: Any
) -> AsyncIterator[Server]:
    """Starts a server with at most `number` connections, and `seconds` for each part of an exchange."""
    engine = engine or FakeEngine()
    state = app_state(engine, **config)
    listener = listen("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a client that does not read is noticed soon
    server = UvicornServer(state, ConnectionLimits(number, seconds, seconds))
    running_server = Server(state, engine, server, listener.getsockname()[1])
    running_server.serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(20):
            await until(lambda: server.started)
            yield running_server
    finally:
        for connection in running_server.connections:
            await connection.close()
        await running_server.close()
        listener.close()


async def test_idle_connections_yield_to_new_ones() -> None:
    async with running(number=3) as server:
        idle = [await server.connect() for _ in range(3)]
        await server.until_open(3)
        for _ in range(3):
            assert (await (await server.connect(HEALTH)).head()).startswith(b"HTTP/1.1 200")
        assert [await connection.rest() for connection in idle] == [b""] * 3


async def test_a_server_full_of_requests_answers_health_checks() -> None:
    async with running(FakeEngine(silence), number=2) as server:
        busy = [await server.connect(chat(), CHAT_BODY) for _ in range(2)]
        await until(lambda: server.engine.log.count("submit") == 2)
        assert (await (await server.connect(HEALTH)).head()).startswith(b"HTTP/1.1 200")
        refused = await (await server.connect(chat(), CHAT_BODY)).rest()
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1" in refused
        assert b"--max-connections" in refused
        assert server.engine.log == ["submit"] * len(busy)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", b""),
        (HEALTH[:20], b"HTTP/1.1 408"),
        (chat() + CHAT_BODY[:9], b"HTTP/1.1 408"),
    ],
    ids=["nothing", "a part of a head", "a part of a body"],
)
async def test_requests_that_do_not_arrive_end(data: bytes, answer: bytes) -> None:
    async with running(seconds=0.05) as server:
        assert (await (await server.connect(data)).rest()).startswith(answer)
        later = await server.connect(HEALTH)
        assert (await later.head()).startswith(b"HTTP/1.1 200")
        await later.send(data or HEALTH[:1])
        assert (await later.rest()).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_cancels_a_request_that_others_follow(stream: bool) -> None:
    """Pipelined requests neither hide the disconnect nor start after it."""
    body = CHAT_BODY[:-1] + b', "stream": true}' if stream else CHAT_BODY
    async with running(FakeEngine(silence)) as server:
        connection = await server.connect((chat(len(body)) + body) * 3)
        await server.until_submitted()
        await connection.close()
        await until(lambda: server.engine.log == ["submit", "cancel"])


async def test_a_client_that_takes_no_data_is_ended() -> None:
    engine = FakeEngine(lambda request: (b"x" * 10_000 for _ in range(40)))
    async with running(engine, seconds=0.05) as server:
        body = CHAT_BODY[:-1] + b', "stream": true}'
        await server.connect(chat(len(body)), body)
        await server.until_open(1)
        await server.until_open(0)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /%b HTTP/1.1\r\n" % (b"a" * 70_000), 414),
        (b"GET / HTTP/1.1\r\nX: %b\r\n" % (b"a" * 70_000), 431),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000, 431),
        (b"\r\n" * 40_000, 431),
    ],
    ids=["url", "header", "headers", "line breaks"],
)
async def test_long_heads(head: bytes, status: int) -> None:
    async with running() as server:
        assert (await (await server.connect(head)).rest()).startswith(b"HTTP/1.1 %d" % status)


@pytest.mark.parametrize("body", [CHAT_BODY, CHAT_BODY[:-1] + b', "stream": true}', CHAT_BODY[:9]], ids=len)
async def test_requests_that_are_cancelled_by_shutdown(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.server.lifecycle._FLUSH_SECONDS", 0.01)
    async with running(FakeEngine(silence)) as server:
        connection = await server.connect(chat(max(len(body), len(CHAT_BODY))), body)
        await server.until_open(1)
        server.state.draining = len(body) < len(CHAT_BODY) or await server.until_submitted()
        closing = asyncio.create_task(server.close())
        answer = await connection.rest()
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"code":"shutting_down"' in answer
        await closing


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_requests_that_shutdown_ends(path: str) -> None:
    """A request without a byte of its response gets an error that clients retry."""
    engine = FakeEngine(lambda request: [b"a", ShutDown()])
    async with running(engine) as server:
        head = chat().replace(b"/v1/chat/completions", path.encode())
        answer = await (await server.connect(head, CHAT_BODY)).head()
        assert answer.startswith((b"HTTP/1.1 503", b"HTTP/1.1 529"))
        assert b"Retry-After: 5" in answer


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """Returns the files of a private key and of its certificate for localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return key, certificate


async def test_https(certificate: tuple[str, str]) -> None:
    async with running(ssl_key_file=certificate[0], ssl_cert_file=certificate[1]) as server:
        tls = ssl.create_default_context(cafile=certificate[1])
        assert (await (await server.connect(HEALTH, tls=tls)).head()).startswith(b"HTTP/1.1 200")


async def test_signals_that_stop_the_server() -> None:
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a server leaves it ignored under nohup
    signals = StopSignals()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        await signals.stop.wait()
        assert not signals.force.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        await signals.force.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(signal.SIGHUP, inherited)
