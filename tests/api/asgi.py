"""An ASGI client that can disconnect at any moment, by the rules of two versions of the specification."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message

from api.http.body_writer import BODY_WRITER

# From 2.4 on, `send` raises OSError after a disconnect; before 2.4, `send` does nothing.
ASGI_VERSIONS = ("2.3", "2.4")


class CapturedResponse:
    """The messages that the client received before the disconnect or the end of the response."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.written: list[bytes] = []
        """The parts of the body that a `Writer` has written."""

    @property
    def status(self) -> int | None:
        """The status; None if no response started."""
        return self.messages[0]["status"] if self.messages else None

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def chunks(self) -> list[bytes]:
        """The bodies of the messages that have one."""
        return [message["body"] for message in self.messages[1:] if message.get("body")]

    @property
    def complete(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", True)

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.chunks))

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events without comments; [DONE] is a string."""
        lines = b"".join(self.chunks).decode().split("\n\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in data]


class Writer:
    """A `BodyWriter` that refuses every third write, as if the client took no data."""

    def __init__(self, response: CapturedResponse) -> None:
        self._response, self._calls = response, 0

    def can_write(self) -> bool:
        self._calls += 1
        return bool(self._response.messages) and not self._response.complete and self._calls % 3 > 0

    def write(self, body: bytes) -> None:
        self._response.written.append(body)
        self._response.messages.append({"type": "http.response.body", "body": body, "more_body": True})


WriterFactory = Callable[[CapturedResponse], Writer]


def _scope(method: str, path: str, head: Mapping[str, str], spec: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec},
        "http_version": "1.1",
        "method": method,
        "path": path.partition("?")[0],
        "raw_path": path.encode(),
        "query_string": path.partition("?")[2].encode(),
        "root_path": "",
        "scheme": "http",
        "server": ("test", 80),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in head.items()],
        "extensions": {},
    }


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    disconnect: asyncio.Event | None = None,
    disconnect_after: int | None = None,
    spec: str = "2.4",
    body_chunks: Sequence[bytes] | None = None,
    send_only: bool = False,
    writer: WriterFactory | None = None,
) -> CapturedResponse:
    """Sends one request and returns the response.

    The client disconnects when `disconnect` is set, or after `disconnect_after` bodies. With `send_only`, `receive`
    never returns the disconnect and only `send` fails. `body_chunks` are sent without a Content-Length. With
    `writer`, the server has the extension `BODY_WRITER`.
    """
    gone = disconnect or asyncio.Event()
    response = CapturedResponse()
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    unsent = list(body_chunks) if body_chunks is not None else [raw]
    length = {} if body_chunks is not None else {"content-length": str(len(raw))}
    head = {"host": "localhost", **length, **(headers or {})}
    if disconnect_after == 0:
        gone.set()

    async def receive() -> Message:
        if unsent:
            return {"type": "http.request", "body": unsent.pop(0), "more_body": bool(unsent)}
        await (asyncio.Event() if send_only else gone).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)
        if gone.is_set():
            if spec >= "2.4":
                raise OSError("gone")
            return
        response.messages.append(message)
        if disconnect_after is not None and len(response.chunks) >= disconnect_after:
            gone.set()

    scope = _scope(method, path, head, spec)
    if writer:
        scope["extensions"] = {BODY_WRITER: {"writer": writer(response)}}
    async with asyncio.timeout(10):
        await app(scope, receive, send)
    return response


async def post(app: ASGIApp, path: str, body: Any, **options: Any) -> CapturedResponse:
    """Sends one POST request and returns the response."""
    return await call(app, "POST", path, body, **options)
