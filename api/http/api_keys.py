"""Checks API keys and their limits, and gives each key a namespace of its own with `--cache-salt-by-key`."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.error_responses import AdminKeyNeeded, InvalidApiKey, RateLimited
from api.http.key_ring import KeyRing, KeyUse, key_text, namespace_of
from api.http.request_context import request_context
from api.http.responses import json_error

# Paths without authentication: load balancers probe without a key.
PUBLIC_PATHS = ("/health", "/v1/health", "/livez")
# Headers with the bare key, used without `Authorization: Bearer`: of Anthropic's clients, of Azure's.
_KEY_HEADERS = ("x-api-key", "api-key")
# Statistics of all clients.
_STATISTICS_PATHS = ("/metrics", "/slots", "/v1/paceline/events")


class ApiKeyMiddleware:
    """ASGI middleware that answers 401 to requests without one of `keys`, 403 to those that need an admin's key, and
    429 above a key's limits. If no key is required, every request passes.

    With `separate_namespaces`, only requests with the same key share prefixes. Requests without a key share one
    namespace.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing,
        *,
        separate_namespaces: bool = False,
        is_public: Callable[[str], bool] = lambda path: False,
        admin_paths: tuple[str, ...] = (),
    ) -> None:
        """`is_public` returns True for paths besides `PUBLIC_PATHS` that GET requests read without a key. Requests
        other than GET below `admin_paths` need an admin's key, and so do metrics if there is one."""
        self._app = app
        self._keys = keys
        self._separate_namespaces = separate_namespaces
        self._is_public = is_public
        self._admin_paths = admin_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        key = _key_in(scope)
        use = self._keys.find(key)
        if self._separate_namespaces:
            request_context(scope).namespace = namespace_of(key)
        if not self._keys.required or self._is_open(scope):
            await self._app(scope, receive, send)
        elif use is None:
            await json_error(InvalidApiKey())(scope, receive, send)
        elif not use.key.admin and self._needs_admin(scope):
            await json_error(AdminKeyNeeded())(scope, receive, send)
        else:
            request_context(scope).key = use.key
            await self._run(use, scope, receive, send)

    async def _run(self, use: KeyUse, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request and counts it, if it is one that computes: limits are for POST requests."""
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(use.headers())
            await send(message)

        try:
            with use.request():
                try:
                    await self._app(scope, receive, send_with_limits)
                finally:
                    use.take(request_context(scope).tokens)
        except RateLimited as error:
            await json_error(error)(scope, receive, send_with_limits)

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        return path in PUBLIC_PATHS or (scope["method"] in ("GET", "HEAD") and self._is_public(path))

    def _needs_admin(self, scope: Scope) -> bool:
        if scope["method"] in ("GET", "HEAD"):
            return bool(scope["path"] in _STATISTICS_PATHS and self._keys.has_admins)
        return bool(self._admin_paths and scope["path"].startswith(self._admin_paths))


def _key_in(scope: Scope) -> str:
    """Returns the API key in the headers, which clients send in UTF-8 or Latin-1; empty if there is none."""
    headers = Headers(scope=scope)
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = next((headers[name] for name in _KEY_HEADERS if name in headers), "")
    # Other white space of Latin-1 may be a part of a character in UTF-8.
    return key_text(token.strip(" \t").encode("latin-1"))
