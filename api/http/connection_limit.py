"""Refuses requests while the server has more connections than its limit."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.api_keys import PUBLIC_PATHS
from api.http.error_responses import TooManyConnections
from api.http.responses import json_error

# Key in the scope's state, which the protocol sets for requests of connections above the limit.
CROWDED = "crowded"


class ConnectionLimitMiddleware:
    """ASGI middleware that answers 503 to all requests except health checks on connections above the limit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        crowded = scope["type"] == "http" and scope["state"].get(CROWDED)
        app = json_error(TooManyConnections()) if crowded and scope["path"] not in PUBLIC_PATHS else self._app
        await app(scope, receive, send)
