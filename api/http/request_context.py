"""The context of one HTTP request: the id for the response's headers, and the data of its log line."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.body_writer import BODY_WRITER, BodyWriter
from api.http.dialects import OPENAI_DIALECT, Dialect
from api.http.error_responses import ErrorInfo, error_response
from api.http.events import encode_json
from api.http.key_ring import ApiKey
from api.http.response_counts import ResponseCounts
from engine import Draining, Finished

_log = logging.getLogger("paceline")

# nginx's status for a client that disconnected before the response was complete.
CLIENT_CLOSED_REQUEST = 499

# Request ids of clients that are kept. Other characters could forge log lines.
_SAFE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)

# W3C's header of distributed traces: version, trace id, parent's span id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")

# Monitoring requests and those of the page's files are logged at DEBUG.
_MONITORING_PATHS = (
    "/health",
    "/v1/health",
    "/livez",
    "/is_sleeping",
    "/metrics",
    "/slots",
    "/v1/paceline/events",
    "/",
)
_PAGE_FILES = "/ui/"


def is_monitoring(path: str) -> bool:
    """Returns True for the paths of health checks, scrapes and the page."""
    return path in _MONITORING_PATHS or path.startswith(_PAGE_FILES)


# Longer texts of the field `user` are cut, as they name an owner in the engine.
_MAX_USER_CHARS = 256

# Numbers of responses by status, type and code of the error.
ErrorCounts = Counter[tuple[int, str, str]]


class RequestContext:
    """The data of one HTTP request's log line. Endpoints and middleware set the attributes."""

    def __init__(self, scope: Scope, send: Send) -> None:
        headers = Headers(scope=scope)
        client_id = headers.get("x-request-id", "")
        trace = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
        self.trace_id = trace.group(1) if trace else ""
        """The trace id of the client's `traceparent`; empty without one."""
        self.id = client_id if _SAFE_ID.fullmatch(client_id) else uuid.uuid4().hex
        self.send = send
        """The server's `send`, which bypasses all middleware. Only for body messages of a started response."""
        self.body_writer: BodyWriter | None = (scope.get("extensions") or {}).get(BODY_WRITER, {}).get("writer")
        """Writes parts of a started response without awaiting. None if the server has no such extension."""
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.status = CLIENT_CLOSED_REQUEST  # until a response starts
        self.first_token_seconds: float | None = None
        """Seconds from the arrival to the first token; None before the first token."""
        self.finished: list[Finished] = []
        """The terminal updates of the choices that have finished."""
        self.error: Exception | None = None
        """The exception that refused the request or ended its stream; None if there was none."""
        self.dialect: Dialect = OPENAI_DIALECT
        """The shape of errors, pings and the request's id."""
        self.namespace = ""
        """The namespace of the API key; empty if all keys share prefixes."""
        self.key: ApiKey | None = None
        """The API key of the request. None on a server without keys."""
        self.tokens = 0
        """Prompt and output tokens of the request so far, which count for the limits of the key."""
        self.refusal: ErrorInfo | None = None
        """The error object of a response with an error status. None for any other response."""
        client = scope.get("client")
        self._address = client[0] if client else ""
        self._started = time.monotonic()

    def cache_salt(self, requested: str | None) -> str:
        """Returns the cache salt for the request's own salt `requested`. Salts of different namespaces differ."""
        return f"{self.namespace} {requested or ''}" if self.namespace else requested or ""

    def owner(self, user: str | None) -> str:
        """Returns the name of the client for fair queueing: that of its API key, else `user`, else its address."""
        if self.key is not None:
            return self.key.owner
        return f"user:{user[:_MAX_USER_CHARS]}" if user else f"address:{self._address}"

    @property
    def weight(self) -> float:
        """The weight of the owner for fair queueing."""
        return 1.0 if self.key is None else self.key.weight

    @property
    def age_seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._started

    def __str__(self) -> str:
        facts = [self.id, self.method, quote(self.path), str(self.status), f"{self.age_seconds:.3f}s"]
        if self.finished:
            facts.append("prompt={} cached={} completion={}".format(*self._token_counts()))
        if self.first_token_seconds is not None:
            facts.append(f"ttft={self.first_token_seconds * 1e3:.0f}ms")
        if self.finished:
            facts.append(f"{self._tokens_per_second():.1f} tok/s")
            facts.append(",".join(sorted({end.reason for end in self.finished})))
        if self.key is not None and self.key.name:
            facts.append(f"key={self.key.name}")
        if self.error is not None:
            facts.append(f"error={str(self.error)!r}")
        return " ".join(facts)

    def log_fields(self) -> dict[str, str | int | float | list[str]]:
        """Returns the data of the log line by name, for logs in JSON."""
        fields: dict[str, str | int | float | list[str]] = {
            "id": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.age_seconds, 6),
        }
        if self.trace_id:
            fields["trace_id"] = self.trace_id
        if self.first_token_seconds is not None:
            fields["ttft_seconds"] = round(self.first_token_seconds, 6)
        if self.finished:
            names = ("prompt_tokens", "cached_tokens", "completion_tokens")
            fields |= dict(zip(names, self._token_counts(), strict=True))
            fields["finish_reasons"] = [str(end.reason) for end in self.finished]
        if self.key is not None and self.key.name:
            fields["key"] = self.key.name
        if self.error is not None:
            fields["error"] = str(self.error)
        return fields

    def _token_counts(self) -> tuple[int, int, int]:
        usages = [end.usage for end in self.finished]
        return (
            sum(usage.prompt for usage in usages),
            sum(usage.cached for usage in usages),
            sum(usage.completion for usage in usages),
        )

    def _tokens_per_second(self) -> float:
        """Tokens after the first of each choice, over the seconds of the slowest choice, as in `timings`."""
        tokens = sum(max(0, end.usage.completion - 1) for end in self.finished)
        seconds = max(end.timings.predicted for end in self.finished)
        return tokens / seconds if seconds else 0.0


def request_context(scope: Scope) -> RequestContext:
    """Returns the context of the request that `scope` describes."""
    context = scope["state"]["context"]
    assert isinstance(context, RequestContext)
    return context


class RequestContextMiddleware:
    """The outermost ASGI middleware: gives each request a RequestContext, and logs the context at the end.

    `dialects` has the dialects of paths by their beginning. Other paths have OpenAI's dialect. A request that is
    cancelled before its response, while `is_draining` returns True, gets the error of a server that shuts down.
    `errors` counts the responses with an error status, and `counts` all responses.
    """

    def __init__(
        self,
        app: ASGIApp,
        dialects: Mapping[str, Dialect] | None = None,
        is_draining: Callable[[], bool] = lambda: False,
        errors: ErrorCounts | None = None,
        counts: ResponseCounts | None = None,
    ) -> None:
        self._app = app
        self._dialects = dict(dialects or {})
        self._is_draining = is_draining
        self._errors: ErrorCounts = Counter() if errors is None else errors
        self._counts = counts or ResponseCounts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(scope, send)
        context.dialect = self._dialect(context.path)
        scope.setdefault("state", {})["context"] = context

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name in filter(None, ("x-request-id", context.dialect.id_header)):
                    headers[name] = context.id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if not self._is_draining():
                raise
            # uvicorn cancels what is left at the end of a shutdown, and would log a traceback for each request.
            if context.status == CLIENT_CLOSED_REQUEST:
                await _send_draining(context, send_with_id)
        finally:
            if context.status >= 400:
                info = context.refusal
                self._errors[context.status, info.type if info else "", str((info and info.code) or "")] += 1
            failed = context.error is not None
            self._counts.add(context.method, context.path, context.status, failed=failed)
            level = logging.DEBUG if is_monitoring(context.path) else logging.INFO
            _log.log(level, "%s", context)

    def _dialect(self, path: str) -> Dialect:
        matching = (dialect for start, dialect in self._dialects.items() if path.startswith(start))
        return next(matching, OPENAI_DIALECT)


async def _send_draining(context: RequestContext, send: Send) -> None:
    """Sends the error of a server that shuts down, with a header that closes the connection."""
    error = error_response(Draining())
    body = encode_json(context.dialect.error_body(error, context.id))
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    raw = [(name.encode(), text.encode()) for name, text in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": context.dialect.error_status(error), "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
