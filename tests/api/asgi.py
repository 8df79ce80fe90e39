"""An ASGI client that can hang up at any moment, under the rules of two versions of the specification."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message

SPECS = ("2.3", "2.4")
"""From 2.4 on `send` raises OSError once the client is gone; before, it does nothing."""


class Answer:
    """What the client got until it hung up or the response ended."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    @property
    def status(self) -> int | None:
        """None if no response started."""
        return self.messages[0]["status"] if self.messages else None

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def chunks(self) -> list[bytes]:
        """Bodies, one for each message that had one."""
        return [message["body"] for message in self.messages[1:] if message.get("body")]

    @property
    def complete(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", True)

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.chunks))

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events; comments are left out and [DONE] is a text."""
        lines = b"".join(self.chunks).decode().split("\n\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in data]


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    hang_up: asyncio.Event | None = None,
    hang_up_after: int | None = None,
    spec: str = "2.4",
    pieces: Sequence[bytes] | None = None,
    deaf: bool = False,
) -> Answer:
    """One request. The client goes when `hang_up` is set, or after that many bodies; `deaf` to `receive`, only
    `send` fails then. `pieces` are sent as the body, without its length."""
    gone = hang_up or asyncio.Event()
    answer = Answer()
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    waiting = list(pieces) if pieces is not None else [raw]
    head = {"host": "test", **({} if pieces is not None else {"content-length": str(len(raw))}), **(headers or {})}
    if hang_up_after == 0:
        gone.set()

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
        await (asyncio.Event() if deaf else gone).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)
        if gone.is_set():
            if spec >= "2.4":
                raise OSError("gone")
            return
        answer.messages.append(message)
        if hang_up_after is not None and len(answer.chunks) >= hang_up_after:
            gone.set()

    scope = {
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
    }
    async with asyncio.timeout(10):
        await app(scope, receive, send)
    return answer


async def post(app: ASGIApp, path: str, body: Any, **options: Any) -> Answer:
    """The same for POST."""
    return await call(app, "POST", path, body, **options)
