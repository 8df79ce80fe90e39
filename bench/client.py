"""A streaming client with little CPU time: one connection for each request, parsed by httptools and msgspec.

Tokens are counted from `usage`, never from events, since one event may hold several tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import httptools
import msgspec

from bench.server import HOST

# `Outcome.error` of a request that the client abandoned.
ABANDONED = "abandoned"


class Outcome(msgspec.Struct):
    """The result of one request: arrival times of its output (seconds on `time.perf_counter`), and the server's counts.

    `tokens` and `logprobs` are filled only for a request with `logprobs`. `finish_reasons` and `done_markers`
    count the terminal events of the stream; a complete stream of one choice has exactly one of each.
    """

    begun: float
    status: int = 0
    arrivals: list[float] = msgspec.field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    error: str = ""
    tokens: list[bytes] = msgspec.field(default_factory=list)
    logprobs: list[float] = msgspec.field(default_factory=list)
    draft_tokens: int = 0
    accepted_tokens: int = 0
    finish_reasons: int = 0
    done_markers: int = 0

    @property
    def failed(self) -> bool:
        """True after an error, after a hang-up, and for any status other than 200."""
        return bool(self.error) or self.status != 200

    @property
    def ttft(self) -> float:
        """Time to first token: seconds from the start of the request to its first output; NaN without output."""
        return self.arrivals[0] - self.begun if self.arrivals else float("nan")

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive events with output."""
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


class _Token(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None


class _Logprobs(msgspec.Struct, frozen=True):
    content: tuple[_Token, ...] | None = None


class _StreamChoice(msgspec.Struct):
    delta: _Delta = _Delta()
    text: str | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None

    @property
    def output(self) -> str:
        """Text, reasoning, and names and arguments of tool calls, in this order."""
        delta = self.delta
        output = (self.text or "") + (delta.reasoning_content or "") + (delta.content or "")
        for call in delta.tool_calls or ():
            output += (call.function.name or "") + (call.function.arguments or "")
        return output


class _Cached(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Cached | None = None


class _Timings(msgspec.Struct):
    draft_n: int = 0
    draft_n_accepted: int = 0


class _Event(msgspec.Struct):
    choices: list[_StreamChoice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


class _Stream(asyncio.Protocol):
    """Feeds a response to httptools and its events to an Outcome; closes the connection after `max_arrivals`."""

    def __init__(self, outcome: Outcome, request: bytes, max_arrivals: int | None = None) -> None:
        self.outcome = outcome
        self._max_arrivals = max_arrivals
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._decoder = msgspec.json.Decoder(_Event)
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transport is no subclass
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
            elif event.startswith(b"data: [DONE]"):
                self.outcome.done_markers += 1

    def _event(self, event: _Event, now: float) -> None:
        outcome = self.outcome
        if text := "".join(choice.output for choice in event.choices):
            outcome.arrivals.append(now)
            outcome.text += text
        for choice in event.choices:
            outcome.finish_reasons += choice.finish_reason is not None
            for token in (choice.logprobs and choice.logprobs.content) or ():
                outcome.tokens.append(token.token.encode() if token.bytes is None else bytes(token.bytes))
                outcome.logprobs.append(token.logprob)
        if event.usage is not None:
            outcome.prompt_tokens = event.usage.prompt_tokens
            outcome.completion_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            outcome.cached_tokens = details.cached_tokens if details else 0
        if event.timings is not None:
            outcome.draft_tokens, outcome.accepted_tokens = event.timings.draft_n, event.timings.draft_n_accepted
        if event.error:
            outcome.error = bytes(event.error).decode()
        if len(outcome.arrivals) == self._max_arrivals:
            self._finish(ABANDONED)

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
    port: int,
    path: str,
    body: dict[str, Any],
    *,
    abandon_after: float | None = None,
    max_arrivals: int | None = None,
    outcome: Outcome | None = None,
    headers: Mapping[str, str] | None = None,
) -> Outcome:
    """Sends one streaming request and receives the response to its end.

    The connection is closed early, with `ABANDONED` as the error, after `abandon_after` seconds or after
    `max_arrivals` events with output. A given `outcome` is filled as the output arrives, and returned. `headers`
    are sent besides those of every request.
    """
    payload = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n{more}"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    outcome = outcome or Outcome(0.0)
    outcome.begun = time.perf_counter()
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(
        partial(_Stream, outcome, head.encode() + payload, max_arrivals), HOST, port
    )
    try:
        async with asyncio.timeout(abandon_after):
            await protocol.done
    except TimeoutError:
        outcome.error = ABANDONED
    finally:
        transport.close()
    return outcome


RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")


async def run_closed_loop(
    clients: int, bodies: Iterable[RequestT], send: Callable[[RequestT], Awaitable[ResultT]]
) -> list[ResultT]:
    """Sends `bodies` from `clients` concurrent clients in a closed loop: a client sends the next unsent body when its
    request has ended.

    Returns the results grouped by client.
    """
    unsent = iter(bodies)

    async def client() -> list[ResultT]:
        return [await send(body) for body in unsent]

    return [result for results in await asyncio.gather(*(client() for _ in range(clients))) for result in results]


def chat(messages: list[dict[str, str]], tokens: int, **overrides: object) -> dict[str, Any]:
    """Returns the body of a chat request for exactly `tokens` tokens; `overrides` replaces or adds fields."""
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.8, "seed": 1, **overrides}


def user(text: str) -> list[dict[str, str]]:
    """Returns a conversation of one user message."""
    return [{"role": "user", "content": text}]
