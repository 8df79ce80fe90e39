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

SendEvents = Callable[[bytes], Awaitable[None]]


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

    `produce` gets `send_events` and may call it from several tasks, with one or more whole events per call. The status
    200 is sent with the first event, or with a comment after `ping_seconds` without an event; 0 disables comments. An
    error before that is raised and gets an error status, an error after that is sent as the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[SendEvents], Awaitable[None]], ping_seconds: float) -> None:
        self.produce = produce
        self.ping_seconds = ping_seconds
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._started = False
        self._last_sent = time.monotonic()
        self._start_lock = Lock()  # several choices and a ping may send the first event at the same time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = request_context(scope)
        # Body messages bypass the middleware, which needs the start message only and costs time for every message.
        send_body = context.send

        async def send_part(events: bytes, *, more: bool) -> None:
            # Only an error of the socket is a disconnect; `produce` may raise OSError for other reasons.
            try:
                if not self._started:
                    await self._start(send)
                await send_body({"type": "http.response.body", "body": events, "more_body": more})
            except OSError:
                raise _SocketClosed from None

        async def send_events(events: bytes) -> None:
            self._last_sent = time.monotonic()
            await send_part(events, more=True)

        async def stream() -> None:
            try:
                await self.produce(send_events)
            except _SocketClosed:
                raise
            except Exception as error:
                async with self._start_lock:  # a ping may be starting the response concurrently
                    if not self._started:
                        raise
                context.error = error
                await send_events(_error_event(error, context))
            self._last_sent = math.inf  # no ping may follow the last event
            await send_part(b"", more=False)

        async def keep_alive() -> None:
            with suppress(_SocketClosed):
                while True:
                    remaining = self._last_sent + self.ping_seconds - time.monotonic()
                    if remaining > 0:
                        await anyio.sleep(min(remaining, self.ping_seconds))
                    else:
                        await send_events(context.dialect.ping)

        try:
            done = await run_until_disconnect(receive, stream, *([keep_alive] if self.ping_seconds else []))
        except _SocketClosed:
            done = False
        if not done:
            context.status = CLIENT_CLOSED_REQUEST

    async def _start(self, send: Send) -> None:
        async with self._start_lock:
            if not self._started:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                self._started = True


class _SocketClosed(Exception):
    """`send` failed: the client disconnected before `receive` returned the disconnect message."""


def _error_event(error: Exception, context: RequestContext) -> bytes:
    if not isinstance(error, EngineError):
        _log.error("The stream failed", exc_info=error)
    dialect = context.dialect
    return dialect.error_event(dialect.error_body(error_response(error), context.id))
