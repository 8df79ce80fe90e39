"""One HTTP request as the log tells it: an id on every response, and one line at the end."""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import Finished

log = logging.getLogger("paceline")

HUNG_UP = 499
"""The status that nginx made customary for a client that did not wait for the answer."""

_SANE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_ROUTINE = ("/health", "/metrics", "/slots")


class Exchange:
    """What is known about a request while it is served. Endpoints add what only they know."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        self.send = send
        """Straight to the client, past all middleware: for bodies only, and only after the start."""
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.status = HUNG_UP  # until a response starts
        self.first_token: float | None = None
        """Seconds until the first update from the engine."""
        self.ends: list[Finished] = []
        self.failure: Exception | None = None
        """Why it was refused, or what ended it early."""
        self.namespace = ""
        """What only requests of one client share, whatever salt they ask for; empty if all clients are one."""
        self._started = time.monotonic()

    def salt(self, asked: str | None) -> str:
        """The salt of a request that asks for one, or for none: unequal for unequal namespaces."""
        return f"{self.namespace} {asked or ''}" if self.namespace else asked or ""

    @property
    def age(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self._started

    def __str__(self) -> str:
        facts = [self.id, self.method, quote(self.path), str(self.status), f"{self.age:.3f}s"]
        if self.ends:
            facts.append("prompt={} cached={} completion={}".format(*self._tokens()))
        if self.first_token is not None:
            facts.append(f"ttft={self.first_token * 1e3:.0f}ms")
        if self.ends:
            facts.append(f"{self._rate():.1f} tok/s")
            facts.append(",".join(sorted({end.reason for end in self.ends})))
        if self.failure is not None:
            facts.append(f"error={str(self.failure)!r}")
        return " ".join(facts)

    def _tokens(self) -> tuple[int, int, int]:
        usages = [end.usage for end in self.ends]
        return (
            sum(usage.prompt for usage in usages),
            sum(usage.cached for usage in usages),
            sum(usage.completion for usage in usages),
        )

    def _rate(self) -> float:
        """Tokens per second after the first, as `timings` counts them; choices ran side by side."""
        tokens = sum(max(0, end.usage.completion - 1) for end in self.ends)
        seconds = max(end.timings.predicted for end in self.ends)
        return tokens / seconds if seconds else 0.0


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that `scope` belongs to."""
    exchange = scope["state"]["exchange"]
    assert isinstance(exchange, Exchange)
    return exchange


class Exchanges:
    """Middleware around everything else: gives each request its Exchange, and logs that at the end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, send)
        scope.setdefault("state", {})["exchange"] = exchange

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = exchange.id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if exchange.path in _ROUTINE else logging.INFO
            log.log(level, "%s", exchange)
