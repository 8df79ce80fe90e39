"""Checks API keys, and gives each key a namespace of its own with `--cache-salt-by-key`."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import blake2b

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.error_responses import InvalidApiKey
from api.http.request_context import request_context
from api.http.responses import json_error

# Paths without authentication: load balancers probe without a key.
_PUBLIC_PATHS = ("/health", "/v1/health")
# Headers with the bare key, used without `Authorization: Bearer`: of Anthropic's clients, of Azure's.
_KEY_HEADERS = ("x-api-key", "api-key")


class ApiKeyMiddleware:
    """ASGI middleware that answers 401 to requests without one of `keys`. With no keys every request passes.

    With `separate_namespaces`, only requests with the same key share prefixes. Requests without a key share one
    namespace.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], *, separate_namespaces: bool = False) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._separate_namespaces = separate_namespaces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = _key_in(scope)
            if self._keys and scope["path"] not in _PUBLIC_PATHS and not self._accepts(key):
                await json_error(InvalidApiKey())(scope, receive, send)
                return
            if self._separate_namespaces:
                request_context(scope).namespace = namespace_of(key)
        await self._app(scope, receive, send)

    def _accepts(self, key: str) -> bool:
        # Every key is compared in constant time, so that the duration does not reveal which key matches or how far.
        sent = key.encode("latin-1")  # the bytes of the header
        matches = [hmac.compare_digest(sent, valid) for valid in self._keys]
        return any(matches)


def namespace_of(key: str) -> str:
    """Returns the namespace of a key, the same after a restart. A hash, so that stored prefixes do not expose the key.

    >>> namespace_of("one") == namespace_of("two")
    False
    """
    return blake2b(key.encode(), digest_size=16, person=b"paceline key").hexdigest()


def _key_in(scope: Scope) -> str:
    """Returns the API key in the headers; empty if there is none."""
    headers = Headers(scope=scope)
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return next((headers[name] for name in _KEY_HEADERS if name in headers), "")
