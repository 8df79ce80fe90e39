"""uvicorn's HTTP/1.1 protocol, with limits of sizes, times and connections, and with corrections for clients that offer
HTTP/2, use HTTP/1.0 or compare the names of headers by case."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from http import HTTPStatus
from math import inf
from typing import Any

import httptools
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.http.body_writer import BODY_WRITER
from api.http.connection_limit import CROWDED
from api.server.connections import SPARE_CONNECTIONS, ConnectionLimits, WaitingConnections

# Maximum bytes of the URL and headers of a request, and of trailers and chunk extensions, which the parser collects.
MAX_HEADER_BYTES = 64 * 1024

# Seconds for a client to take the last bytes of a closed connection.
_LINGER_SECONDS = 30.0

# Maximum requests of a connection that wait for the response to an earlier one. With more the server reads no further,
# and does not notice a disconnect.
_MAX_PIPELINED = 16

_HEADER_NAME = re.compile(rb"\r\n[a-z][^:\r]*")


class HTTPProtocol(HttpToolsProtocol):
    """Serves one connection.

    An `Upgrade` header, such as the `h2c` of Java's HttpClient, is ignored, while the parser would take the body for
    data of the other protocol. The end of an HTTP/1.0 response without Content-Length is the end of the connection, as
    HTTP/1.0 has no chunks. Larger heads than `MAX_HEADER_BYTES` are a 431, or a 414 if the URL is as long. Responses
    have header names in title case. A head or body that does not arrive in time is a 408, and a connection whose client
    takes no data is ended.
    """

    def __init__(
        self,
        *arguments: Any,
        limits: ConnectionLimits,
        waiting: WaitingConnections,
        on_refused: Callable[[int], None] = lambda status: None,
        **options: Any,
    ) -> None:
        """`on_refused` is called with the status of each request that gets no further."""
        super().__init__(*arguments, **options)
        self._limits, self._waiting, self._on_refused = limits, waiting, on_refused
        self.url = b""  # uvicorn sets it at the beginning of a request, which line breaks may precede
        self._running: RequestResponseCycle | None = None  # `cycle` is the last of the pipelined requests
        self._collected = 0  # bytes since the parser last found the end of a head, a part of a body, or its end
        self._deadline = inf  # for the rest of a head, or for the next part of a body
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # ── connection ──

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accepts the connection. At the limit of connections, ends the one that has waited for longest."""
        super().connection_made(transport)
        excess = len(self.connections) - self._limits.number
        if excess > 0 and not self._waiting.end_oldest() and excess > SPARE_CONNECTIONS:
            self.abort()
            return
        self._waiting.add(self)
        self._set_deadline(self._limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the running request, also if others follow it in a pipeline, and drops these."""
        self._waiting.discard(self)
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Ends the connection without waiting for the client."""
        self.connections.discard(self)
        self.transport.abort()

    def _close(self) -> None:
        """Closes the connection once the client has taken all data, for which it has `_LINGER_SECONDS`."""
        self.transport.close()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection without another request."""
        if not self.transport.is_closing():
            self._close()

    def pause_writing(self) -> None:
        """Pauses the response until the client takes data."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.io_seconds, self.abort)

    def resume_writing(self) -> None:
        """Resumes the response."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    # ── time ──

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = self.loop.time() + seconds
        if self._timer is not None:
            if self._timer.when() <= self._deadline:
                return  # the timer looks at the new deadline
            self._timer.cancel()
        self._timer = self.loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        self._timer = None
        if self.transport.is_closing() or self._deadline == inf:
            return
        if self.flow.read_paused:  # the server reads no further, not the client
            self._deadline = self.loop.time() + self._limits.io_seconds
        if self._deadline > self.loop.time():
            self._timer = self.loop.call_at(self._deadline, self._check_deadline)
        elif self._collected or self._receives_body():
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive in time.")
        else:
            self.abort()

    def _receives_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def _responds(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # ── parser ──

    def data_received(self, data: bytes) -> None:
        """Parses `data`."""
        self._unset_keepalive_if_required()
        while data:
            data = self._parse(data)
        if self._receives_body():
            self._set_deadline(self._limits.io_seconds)
        elif self._responds():
            self._deadline = inf
        elif self._deadline == inf:  # the first bytes of another head
            self._set_deadline(self._limits.header_seconds)

    def _parse(self, data: bytes) -> bytes:
        """Parses `data`, and returns what remains: after a head with an upgrade, for which there is a new parser, the
        head without the header, then the rest."""
        if self.transport.is_closing():
            return b""
        self._collected += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._offers_upgrade():
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
                return head + data[upgrade.args[0] :]
        except httptools.HttpParserError:
            too_large = self._collected > MAX_HEADER_BYTES
            if too_large:
                self._refuse_head()
            else:
                self._refuse(HTTPStatus.BAD_REQUEST, "The request is not valid HTTP/1.1.")
        else:
            if self._collected > MAX_HEADER_BYTES:
                self._refuse_head()
        return b""

    def _refuse_head(self) -> None:
        if len(self.url) > MAX_HEADER_BYTES // 2:
            self._refuse(
                HTTPStatus.REQUEST_URI_TOO_LONG, f"The URL is too long: send at most {MAX_HEADER_BYTES} bytes."
            )
            return
        message = f"The headers are too large: send at most {MAX_HEADER_BYTES} bytes."
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answers `status` with a text, and closes the connection."""
        self._on_refused(status.value)
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(message)}",
            "Connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", message]).encode())
        self._close()

    def on_headers_complete(self) -> None:
        """Starts the request, unless the parser will see its head again. Raises ValueError if the head is too large."""
        self._collected = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if self._collected > MAX_HEADER_BYTES:
            raise ValueError
        self._collected = 0
        if not self._offers_upgrade():
            crowded = len(self.connections) > self._limits.number
            if crowded:
                self.scope["state"][CROWDED] = True
            super().on_headers_complete()
            if 0 < len(self.pipeline) <= _MAX_PIPELINED:
                self.flow.resume_reading()
            if crowded:
                self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Takes a part of the body."""
        self._collected = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends the body, unless the parser will see the request again."""
        self._collected = 0
        if not self._offers_upgrade():
            super().on_message_complete()
            if not self.cycle.response_complete:
                self._waiting.discard(self)

    def on_response_complete(self) -> None:
        """Awaits the next request."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(_LINGER_SECONDS, self.transport.abort)
        elif not self._responds():
            self._waiting.add(self)
            self._deadline = inf  # uvicorn's timer for idle connections runs

    def _offers_upgrade(self) -> bool:
        """True if the parser has found a head with an upgrade. CONNECT is another reason for the parser to stop."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _delimited_by_close(cycle, app)
        self._running = cycle
        cycle.scope["extensions"] = {BODY_WRITER: {"writer": ChunkWriter(cycle)}}
        cycle.transport = _HeadTransport(cycle)
        super()._start_asgi_task(cycle, app)


class ChunkWriter:
    """Implements `api.http.body_writer.BodyWriter` for chunked responses, with the bytes of uvicorn's `send`."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._flow = cycle, cycle.flow

    def can_write(self) -> bool:
        """Returns True while the response is open and the client takes data."""
        cycle = self._cycle
        return not (
            self._flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding
        )

    def write(self, body: bytes) -> None:
        """Sends `body` as one chunk."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class _HeadTransport(asyncio.Transport):
    """The transport of a response until its head, whose header names it changes to title case: `Content-Type`.

    HTTP compares the names without case, but some clients of llama-server do not.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        super().__init__()
        self._cycle, self._transport = cycle, cycle.transport

    def write(self, data: Any) -> None:
        """Sends `data`. After the head the response uses the connection's transport directly."""
        if self._cycle.response_started:  # false for `100 Continue`
            self._cycle.transport = self._transport
            data = _HEADER_NAME.sub(lambda name: name[0].title(), data)
        self._transport.write(data)

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    def is_closing(self) -> bool:
        """Returns true if the connection is closed or closing."""
        return self._transport.is_closing()


def _delimited_by_close(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """Returns `app` with responses without chunks. uvicorn closes the connection after each HTTP/1.0 response."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = False

        async def send_without_chunks(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = "content-length" in Headers(raw=message.get("headers", []))
                cycle.chunked_encoding = None if has_length else False
            elif not has_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_without_chunks)

    return run
