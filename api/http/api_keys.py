"""Checks API keys, and gives each key a namespace of its own with `--cache-salt-by-key`."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from hashlib import blake2b

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.error_responses import InvalidApiKey
from api.http.request_context import request_context
from api.http.responses import json_error

# Paths without authentication: load balancers probe without a key.
PUBLIC_PATHS = ("/health", "/v1/health")
# Headers with the bare key, used without `Authorization: Bearer`: of Anthropic's clients, of Azure's.
_KEY_HEADERS = ("x-api-key", "api-key")


class ApiKeyMiddleware:
    """ASGI middleware that answers 401 to requests without one of `keys`. With no keys every request passes.

    With `separate_namespaces`, only requests with the same key share prefixes. Requests without a key share one
    namespace.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        *,
        separate_namespaces: bool = False,
        is_public: Callable[[str], bool] = lambda path: False,
    ) -> None:
        """`is_public` returns True for paths besides `PUBLIC_PATHS` that GET requests read without a key."""
        self._app = app
        self._is_public = is_public
        # Bytes of the command line that are no UTF-8 are surrogates in Python's text.
        self._keys = [_key_text(key.encode("utf-8", "surrogateescape")).encode() for key in keys]
        self._separate_namespaces = separate_namespaces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = _key_in(scope)
            if self._keys and not self._is_open(scope) and not self._accepts(key):
                await json_error(InvalidApiKey())(scope, receive, send)
                return
            if self._separate_namespaces:
                request_context(scope).namespace = namespace_of(key)
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        return path in PUBLIC_PATHS or (scope["method"] in ("GET", "HEAD") and self._is_public(path))

    def _accepts(self, key: str) -> bool:
        # Every key is compared in constant time, so that the duration does not reveal which key matches or how far.
        sent = key.encode()
        matches = [hmac.compare_digest(sent, valid) for valid in self._keys]
        return any(matches)


def namespace_of(key: str) -> str:
    """Returns the namespace of a key, the same after a restart. A hash, so that stored prefixes do not expose the key.

    >>> namespace_of("one") == namespace_of("two")
    False
    """
    return blake2b(key.encode(), digest_size=16, person=b"paceline key").hexdigest()


def _key_in(scope: Scope) -> str:
    """Returns the API key in the headers, which clients send in UTF-8 or Latin-1; empty if there is none."""
    headers = Headers(scope=scope)
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = next((headers[name] for name in _KEY_HEADERS if name in headers), "")
    # Other white space of Latin-1 may be a part of a character in UTF-8.
    return _key_text(token.strip(" \t").encode("latin-1"))


def _key_text(sent: bytes) -> str:
    try:
        return sent.decode()
    except UnicodeDecodeError:
        return sent.decode("latin-1")
