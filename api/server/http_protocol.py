"""uvicorn's HTTP/1.1 protocol, with two corrections for clients that offer HTTP/2 or use HTTP/1.0."""

from __future__ import annotations

from typing import Any

import httptools
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class HTTPProtocol(HttpToolsProtocol):
    """Serves one connection.

    An `Upgrade` header, such as the `h2c` of Java's HttpClient, is ignored, while the parser would take the body for
    data of the other protocol. The end of an HTTP/1.0 response without Content-Length is the end of the connection, as
    HTTP/1.0 has no chunks.
    """

    def data_received(self, data: bytes) -> None:
        """Parses `data`. After a head with an upgrade a new parser gets the head without the header, then the rest."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._offers_upgrade():
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
                self.data_received(head + data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        """Starts the request, unless the parser will see its head again."""
        if not self._offers_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Ends the body, unless the parser will see the request again."""
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
        super()._start_asgi_task(cycle, app)


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
