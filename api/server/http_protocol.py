"""uvicorn's HTTP/1.1 protocol, with corrections for clients that offer HTTP/2, use HTTP/1.0, send endless heads, or
compare the names of headers by case."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import Any

import httptools
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# Maximum bytes of the headers of a request, and of trailers and chunk extensions, which the parser collects.
MAX_HEADER_BYTES = 64 * 1024

_HEADER_NAME = re.compile(rb"\r\n[a-z][^:\r]*")


class HTTPProtocol(HttpToolsProtocol):
    """Serves one connection.

    An `Upgrade` header, such as the `h2c` of Java's HttpClient, is ignored, while the parser would take the body for
    data of the other protocol. The end of an HTTP/1.0 response without Content-Length is the end of the connection, as
    HTTP/1.0 has no chunks. Larger heads than `MAX_HEADER_BYTES` are a 431. Responses have header names in title case.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._collected = 0  # bytes since the parser last found the end of a head, a part of a body, or its end

    def data_received(self, data: bytes) -> None:
        """Parses `data`."""
        self._unset_keepalive_if_required()
        while data:
            data = self._parse(data)

    def _parse(self, data: bytes) -> bytes:
        """Parses `data`, and returns what remains: after a head with an upgrade, for which there is a new parser, the
        head without the header, then the rest."""
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
        message = f"The headers are too large: send at most {MAX_HEADER_BYTES} bytes."
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answers `status` with a text, and closes the connection."""
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(message)}",
            "Connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", message]).encode())
        self.transport.close()

    def on_headers_complete(self) -> None:
        """Starts the request, unless the parser will see its head again. Raises ValueError if the head is too large."""
        self._collected = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if self._collected > MAX_HEADER_BYTES:
            raise ValueError
        self._collected = 0
        if not self._offers_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Takes a part of the body."""
        self._collected = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends the body, unless the parser will see the request again."""
        self._collected = 0
        if not self._offers_upgrade():
            super().on_message_complete()

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
        cycle.transport = _HeadTransport(cycle)
        super()._start_asgi_task(cycle, app)


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
