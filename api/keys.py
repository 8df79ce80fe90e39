"""API keys: who may ask."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import KeyRefused, problem_of
from api.responses import problem_reply

OPEN = ("/health",)
"""Paths for which no key is needed."""


class Keys:
    """Middleware that answers 401 to requests without one of `keys`; with no keys it lets everything pass."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN and not self._admits(scope):
            await problem_reply(problem_of(KeyRefused()))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        # Every key is compared, so that the time tells neither which one matched nor how much of it.
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        return any(matches)
