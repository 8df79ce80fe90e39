"""API keys: who may ask."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import blake2b

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.error_responses import KeyRefused, problem_of
from api.http.request_context import exchange_of
from api.http.responses import problem_reply

OPEN = ("/health",)
"""Paths for which no key is needed."""


class Keys:
    """Middleware that answers 401 to requests without one of `keys`; with no keys it lets everything pass.

    With `apart`, each key has a namespace of its own, and so have requests without a key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], *, apart: bool = False) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._apart = apart

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN and not self._admits(scope):
            await problem_reply(problem_of(KeyRefused()))(scope, receive, send)
        else:
            if self._apart and scope["type"] == "http":
                exchange_of(scope).namespace = namespace_of(_given(scope))
            await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        given = _given(scope)
        # Every key is compared, so that the time tells neither which one matched nor how much of it.
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        return any(matches)


def namespace_of(key: str) -> str:
    """The namespace of a key: the same after a restart, and not to be told from by who reads what is kept.

    >>> namespace_of("one") == namespace_of("two")
    False
    """
    return blake2b(key.encode(), digest_size=16, person=b"paceline key").hexdigest()


def _given(scope: Scope) -> str:
    """The key that came with the request, or nothing."""
    headers = Headers(scope=scope)
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
