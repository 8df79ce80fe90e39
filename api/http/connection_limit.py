"""Refuses requests while the server has more connections than its limit."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.api_keys import PUBLIC_PATHS
from api.http.error_responses import TooManyConnections
from api.http.responses import json_error

# Key of the scope's state that the protocol sets for a request of a connection above the limit.
CROWDED = "crowded"


class ConnectionLimitMiddleware:
    """ASGI middleware that answers 503 to requests of connections above the limit, other than health checks."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        crowded = scope["type"] == "http" and scope["state"].get(CROWDED)
        app = json_error(TooManyConnections()) if crowded and scope["path"] not in PUBLIC_PATHS else self._app
        await app(scope, receive, send)
