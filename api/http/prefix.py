"""Serves all paths below a prefix."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.request_context import request_context
from api.http.responses import json_error


class PathPrefixMiddleware:
    """ASGI middleware that removes `prefix` from the paths of requests, and answers 404 to paths without it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if not path.startswith(self._prefix + "/"):
            error = HTTPException(404, f"Not Found: {path}; the paths of this server begin with {self._prefix}.")
            await json_error(error)(scope, receive, send)
            return
        request_context(scope).path = path = path.removeprefix(self._prefix)
        await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, send)
