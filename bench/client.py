"""A streaming client that costs little: one connection for each request, parsed by httptools and msgspec.

Tokens are counted from `usage`, never from events, since one event may hold several tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar, cast

import httptools
import msgspec

from bench.server import HOST


class Outcome(msgspec.Struct):
    """One request: when its text arrived (seconds on `time.perf_counter`), and what the server says of it."""

    begun: float
    status: int = 0
    arrivals: list[float] = msgspec.field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether it did not end well."""
        return bool(self.error) or self.status != 200

    @property
    def ttft(self) -> float:
        """Seconds from sending the request to its first text."""
        return self.arrivals[0] - self.begun if self.arrivals else float("nan")

    @property
    def gaps(self) -> list[float]:
        """Seconds between arrivals of text."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct, frozen=True):
    function: _Function = _Function()


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[_Call, ...] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = _Delta()
    text: str | None = None

    @property
    def said(self) -> str:
        """All that came: text, reasoning, names and arguments of calls."""
        delta = self.delta
        said = (self.text or "") + (delta.reasoning_content or "") + (delta.content or "")
        for call in delta.tool_calls or ():
            said += (call.function.name or "") + (call.function.arguments or "")
        return said


class _Cached(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


class _Stream(asyncio.Protocol):
    """Feeds a response to httptools and its events to an Outcome."""

    def __init__(self, outcome: Outcome, request: bytes) -> None:
        self.outcome = outcome
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._decoder = msgspec.json.Decoder(_Event)
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by behaviour only
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._finish("the connection was closed")

    def on_headers_complete(self) -> None:
        self.outcome.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self.outcome.status != 200:
            self.outcome.error += body.decode("utf-8", "replace")
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        now = time.perf_counter()
        for event in events:
            if event.startswith(b"data: {"):
                self._event(self._decoder.decode(event[6:]), now)

    def _event(self, event: _Event, now: float) -> None:
        outcome = self.outcome
        if text := "".join(choice.said for choice in event.choices):
            outcome.arrivals.append(now)
            outcome.text += text
        if event.usage is not None:
            outcome.prompt_tokens = event.usage.prompt_tokens
            outcome.completion_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            outcome.cached_tokens = details.cached_tokens if details else 0
        if event.error:
            outcome.error = bytes(event.error).decode()

    def on_message_complete(self) -> None:
        self._finish("")

    def _finish(self, error: str) -> None:
        if self.done.done():
            return
        self.outcome.ended = time.perf_counter()
        self.outcome.error = self.outcome.error or error
        self._transport.close()
        self.done.set_result(None)


async def stream(
    port: int, path: str, body: dict[str, Any], *, abandon_after: float | None = None, outcome: Outcome | None = None
) -> Outcome:
    """Sends one streaming request and reads it to its end, or hangs up after so many seconds.

    An `outcome` that is given is filled as the text arrives, and returned.
    """
    payload = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    outcome = outcome or Outcome(0.0)
    outcome.begun = time.perf_counter()
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(lambda: _Stream(outcome, head.encode() + payload), HOST, port)
    try:
        async with asyncio.timeout(abandon_after):
            await protocol.done
    except TimeoutError:
        outcome.error = "abandoned"
    finally:
        transport.close()
    return outcome


Asked = TypeVar("Asked")
Got = TypeVar("Got")


async def closed(clients: int, bodies: Iterable[Asked], send: Callable[[Asked], Awaitable[Got]]) -> list[Got]:
    """Sends all requests from `clients` clients, each of which sends the next one when its last has ended."""
    waiting = iter(bodies)

    async def client() -> list[Got]:
        return [await send(body) for body in waiting]

    return [outcome for part in await asyncio.gather(*(client() for _ in range(clients))) for outcome in part]


def chat(messages: list[dict[str, str]], tokens: int, **more: object) -> dict[str, Any]:
    """The body of a chat request for exactly `tokens` tokens, if nothing in `more` says otherwise."""
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.8, "seed": 1, **more}


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]
