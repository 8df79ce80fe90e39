"""Refuses bodies that are not declared as JSON."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.responses import json_error


class JSONContentMiddleware:
    """ASGI middleware that answers 415 to POST requests with a Content-Type other than JSON.

    Browsers send any page's request of another type without asking the server first, so such a request may come from a
    page that must not call the server. Programs may omit the header, pages may not.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = Headers(scope=scope)
            kind = headers.get("content-type", "")
            if not is_json(kind) if kind else _is_page_with_body(headers):
                await json_error(_wrong_type(kind))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_json(content_type: str) -> bool:
    """Returns true for a Content-Type of JSON.

    >>> is_json("application/json; charset=utf-8"), is_json("application/ld+json"), is_json("text/plain")
    (True, True, False)
    """
    kind = content_type.partition(";")[0].strip().lower()
    return kind in ("application/json", "text/json") or (kind.startswith("application/") and kind.endswith("+json"))


def _is_page_with_body(headers: Headers) -> bool:
    return "origin" in headers and headers.get("content-length") != "0"


def _wrong_type(kind: str) -> HTTPException:
    given = f", not {kind[:64]!r}" if kind else ""
    return HTTPException(
        415, f"Content-Type: expected application/json{given}; send the header, or allow all with --any-content-type."
    )
