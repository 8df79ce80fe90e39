"""Responses that end when their client does."""

from __future__ import annotations

import logging
import math
import time
from asyncio import Lock
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.http.error_responses import Problem, problem_of
from api.http.events import Body, encode, event
from api.http.request_context import HUNG_UP, exchange_of
from api.http.tasks import unless_gone
from engine import EngineError

log = logging.getLogger("paceline")

PING = b": ping\n\n"
"""A comment: keeps proxies from closing a silent stream, and is dropped by every parser of events."""

Emit = Callable[[bytes], Awaitable[None]]


class JSONReply(Response):
    """A reply as JSON."""

    media_type = "application/json"

    def __init__(self, reply: Body, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(encode(reply), status, headers)


def problem_reply(problem: Problem) -> JSONReply:
    """The response for `problem`."""
    return JSONReply(problem.body, problem.status, problem.headers)


class Answer(Response):
    """A reply that takes a while: `make` is cancelled when the client hangs up before it is made."""

    def __init__(self, make: Callable[[], Awaitable[Body]]) -> None:
        self.make = make
        self.status_code = 200
        self.background = None
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        made: list[Body] = []

        async def job() -> None:
            made.append(await self.make())

        if await unless_gone(receive, job):
            await JSONReply(made[0])(scope, receive, send)


class EventStream(Response):
    """Server-sent events that stop the moment the client does.

    `produce` is given `emit` and calls it with one or more whole events at a time, also from several tasks. The
    status line waits for the first of them, so a refused request is still a proper HTTP error; but after `ping`
    seconds of silence (0: never) it goes out with a comment. From then on an error is an event, and the last one.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[Emit], Awaitable[None]], ping: float) -> None:
        self.produce = produce
        self.ping = ping
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._started = False
        self._spoke = time.monotonic()
        self._turn = Lock()  # choices and pings may come first at once, and the status line must come before both

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        # Starlette's layers only want to know of the start; each costs time for every message that passes.
        send_body = exchange.send

        async def emit(events: bytes) -> None:
            if not self._started:
                await self._start(send)
            self._spoke = time.monotonic()
            await send_body({"type": "http.response.body", "body": events, "more_body": True})

        async def job() -> None:
            try:
                await self.produce(emit)
            except OSError:
                raise _SocketGone from None
            except Exception as error:
                async with self._turn:  # which a ping may have, to start the response
                    if not self._started:
                        raise
                exchange.failure = error
                await emit(_last_event(error))
            self._spoke = math.inf  # no ping may follow
            await send_body({"type": "http.response.body", "body": b"", "more_body": False})

        async def keep_alive() -> None:
            with suppress(OSError):
                while True:
                    left = self._spoke + self.ping - time.monotonic()
                    if left > 0:
                        await anyio.sleep(min(left, self.ping))
                    else:
                        await emit(PING)

        try:
            done = await unless_gone(receive, job, *([keep_alive] if self.ping else []))
        except _SocketGone:
            done = False
        if not done:
            exchange.status = HUNG_UP

    async def _start(self, send: Send) -> None:
        async with self._turn:
            if not self._started:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                self._started = True


class _SocketGone(Exception):
    """`send` failed: the client went before `receive` could tell."""


def _last_event(error: Exception) -> bytes:
    if not isinstance(error, EngineError):
        log.error("A stream failed", exc_info=error)
    return event(problem_of(error).body)
