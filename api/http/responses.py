"""JSON and event-stream responses whose work is cancelled when the client disconnects."""

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

from api.http.error_responses import error_response
from api.http.events import JSONBody, encode_json
from api.http.request_context import CLIENT_CLOSED_REQUEST, RequestContext, request_context
from api.http.tasks import run_until_disconnect
from engine import EngineError

_log = logging.getLogger("paceline")


class JSONResponse(Response):
    """A response with a JSON body."""

    media_type = "application/json"

    def __init__(self, body: JSONBody, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(encode_json(body), status, headers)


class ErrorJSONResponse(Response):
    """The JSON response for an exception, in the dialect of the request."""

    def __init__(self, error: Exception) -> None:
        self._error = error_response(error)
        super().__init__(None, self._error.status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context, error = request_context(scope), self._error
        context.refusal = error.error
        body, status = context.dialect.error_body(error, context.id), context.dialect.error_status(error)
        await JSONResponse(body, status, error.headers)(scope, receive, send)


def json_error(error: Exception) -> Response:
    """Returns the JSON response for `error`."""
    return ErrorJSONResponse(error)


class PendingJSONResponse(Response):
    """A JSON response whose body `make_body` computes. A disconnect of the client cancels `make_body`."""

    def __init__(self, make_body: Callable[[], Awaitable[JSONBody]]) -> None:
        self.make_body = make_body
        self.status_code = 200
        self.background = None
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        bodies: list[JSONBody] = []

        async def compute() -> None:
            bodies.append(await self.make_body())

        if await run_until_disconnect(receive, compute):
            await JSONResponse(bodies[0])(scope, receive, send)


class EventStreamResponse(Response):
    """A stream of server-sent events. A disconnect of the client cancels `produce`.

    `produce` may send to its `EventStream` from several tasks. The status 200 is sent with the first event, or with a
    comment after `ping_seconds` without an event; 0 disables comments. An error before that is raised and gets an error
    status, an error after that is sent as the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[EventStream], Awaitable[None]], ping_seconds: float) -> None:
        self.produce = produce
        self.ping_seconds = ping_seconds
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = request_context(scope)
        stream = EventStream(context, send, self.raw_headers)

        async def run() -> None:
            try:
                await self.produce(stream)
            except _SocketClosed:
                raise
            except Exception as error:
                if not await stream.has_started():
                    raise
                context.error = error
                await stream.send(_error_event(error, context))
            await stream.end()

        async def keep_alive() -> None:
            with suppress(_SocketClosed):
                while True:
                    remaining = stream.last_sent + self.ping_seconds - time.monotonic()
                    if remaining > 0:
                        await anyio.sleep(min(remaining, self.ping_seconds))
                    else:
                        await stream.send(context.dialect.ping)

        try:
            done = await run_until_disconnect(receive, run, *([keep_alive] if self.ping_seconds else []))
        except _SocketClosed:
            done = False
        if not done:
            context.status = CLIENT_CLOSED_REQUEST


class EventStream:
    """Sends the head of one response before its first event, and its events."""

    def __init__(self, context: RequestContext, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self.last_sent = time.monotonic()
        """Time of the last event, by `time.monotonic()`; infinite after the end of the stream."""
        # Body messages bypass the middleware, which needs the start message only and costs time for every message.
        self._send_body, self._send_start = context.send, send
        self._writer = context.body_writer
        self._headers = headers
        self._started = False
        self._start_lock = Lock()  # several choices and a ping may send the first event at the same time

    def can_write(self) -> bool:
        """Returns True if the head has been sent, and the client takes data."""
        return self._writer is not None and self._writer.can_write()

    def write(self, events: bytes) -> None:
        """Sends one or more whole events immediately. `can_write()` must be True."""
        assert self._writer is not None
        self.last_sent = time.monotonic()
        self._writer.write(events)

    async def send(self, events: bytes) -> None:
        """Sends one or more whole events once the client takes data."""
        self.last_sent = time.monotonic()
        await self._send(events, more=True)

    async def end(self) -> None:
        """Ends the response."""
        self.last_sent = math.inf  # no ping may follow the last event
        await self._send(b"", more=False)

    async def has_started(self) -> bool:
        """Returns True if the head has been sent. First awaits a task that is sending it."""
        async with self._start_lock:
            return self._started

    async def _send(self, events: bytes, *, more: bool) -> None:
        # Only an error of the socket is a disconnect; the producer may raise OSError for other reasons.
        try:
            if not self._started:
                await self._start()
            await self._send_body({"type": "http.response.body", "body": events, "more_body": more})
        except OSError:
            raise _SocketClosed from None

    async def _start(self) -> None:
        async with self._start_lock:
            if not self._started:
                await self._send_start({"type": "http.response.start", "status": 200, "headers": self._headers})
                self._started = True


class _SocketClosed(Exception):
    """`send` failed: the client disconnected before `receive` returned the disconnect message."""


def _error_event(error: Exception, context: RequestContext) -> bytes:
    if not isinstance(error, EngineError):
        _log.error("The stream failed", exc_info=error)
    dialect = context.dialect
    return dialect.error_event(dialect.error_body(error_response(error), context.id))
