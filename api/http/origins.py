"""Web pages: cross-origin resource sharing (CORS), and the refusal of foreign pages on loopback addresses."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from msgspec import Struct
from msgspec.structs import replace
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.error_responses import ForeignPage
from api.http.responses import json_error

# Entry in a list of origins or hosts that stands for all.
_ANY = "*"
# Entry in a list of origins that stands for those of this machine, on any port.
_LOCAL = "localhost"
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
# Headers of responses that pages may read, besides those that browsers always show.
_EXPOSED_HEADERS = "x-request-id, retry-after"
_PREFLIGHT_SECONDS = 600


class CorsPolicy(Struct, frozen=True):
    """The origins whose pages may call the server, and the methods and headers of their requests."""

    origins: tuple[str, ...]
    """Origins such as `https://example.com`. `*` is every origin, `localhost` every origin of this machine."""
    methods: tuple[str, ...]
    headers: tuple[str, ...]
    credentials: bool
    """Whether pages may send cookies and HTTP authentication."""

    def allows(self, origin: str) -> bool:
        """Returns true if pages of `origin` may call the server."""
        return (
            _ANY in self.origins
            or origin in self.origins
            or (_LOCAL in self.origins and _host_of(origin) in _LOCAL_HOSTS)
        )

    def response_headers(self, origin: str | None) -> dict[str, str]:
        """Returns the CORS headers of any response to `origin`, which is None if the request has no Origin header."""
        if _ANY in self.origins and not self.credentials:
            return {"access-control-allow-origin": "*", "access-control-expose-headers": _EXPOSED_HEADERS}
        headers = {"vary": "Origin"}  # a cache must not reuse the response for another origin
        if origin and self.allows(origin):
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = _EXPOSED_HEADERS
            if self.credentials:
                headers["access-control-allow-credentials"] = "true"
        return headers

    def preflight_headers(self, requested_headers: str) -> dict[str, str]:
        """Returns the additional CORS headers of the response to OPTIONS.

        `requested_headers` are the names in Access-Control-Request-Headers. They are listed beside a `*`, because
        browsers do not apply `*` to Authorization, nor to any header of a request with credentials.
        """
        headers = ", ".join(self.headers)
        if _ANY in self.headers and requested_headers:
            headers += f", {requested_headers}"
        return {
            "access-control-allow-methods": ", ".join(self.methods),
            "access-control-allow-headers": headers,
            "access-control-max-age": str(_PREFLIGHT_SECONDS),
        }


class CorsMiddleware:
    """ASGI middleware that adds CORS headers to every response, and answers OPTIONS itself, without an API key."""

    def __init__(self, app: ASGIApp, policy: CorsPolicy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_headers = Headers(scope=scope)
        cors_headers = self._policy.response_headers(request_headers.get("origin"))

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(cors_headers)
            await send(message)

        if scope["method"] == "OPTIONS":
            preflight = self._policy.preflight_headers(request_headers.get("access-control-request-headers", ""))
            await Response(headers=preflight)(scope, receive, send_with_cors)
        else:
            await self._app(scope, receive, send_with_cors)


class StateGuard:
    """ASGI middleware for servers without API keys: answers 403 to requests of foreign pages that change the server's
    state. These are requests other than GET below one of `paths`.

    Any page may generate if `cors` allows every origin, as by default. Slots, adapters and properties affect other
    clients, so for them an origin must be that of the server or be listed by `cors`, and `*` lists none.
    """

    def __init__(self, app: ASGIApp, cors: CorsPolicy, paths: tuple[str, ...]) -> None:
        self._app = app
        self._listed = replace(cors, origins=tuple(origin for origin in cors.origins if origin != _ANY))
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "GET" and scope["path"].startswith(self._paths):
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin and not _is_own(origin, headers) and not self._listed.allows(origin):
                await json_error(ForeignPage("Origin", origin, "--cors-origins"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


class LoopbackGuard:
    """ASGI middleware for servers on loopback addresses, which only programs and pages of this machine should reach.

    Answers 403 to two kinds of requests: a Host header with a foreign name, as a page sends after its own name was
    resolved to this machine (DNS rebinding), and an Origin header that is neither allowed by `cors` nor that of the
    server. Host headers with an address, `localhost` or a name in `allowed_hosts` pass.
    """

    def __init__(self, app: ASGIApp, cors: CorsPolicy, allowed_hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._cors = cors
        self._allowed_hosts = frozenset(name.lower() for name in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Headers(scope=scope))) is not None:
            await json_error(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ForeignPage | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and not self._allows_host(_host_of(f"//{host}")):
            return ForeignPage("Host", host, "--allowed-hosts")
        if origin and not self._cors.allows(origin) and not _is_own(origin, headers):
            return ForeignPage("Origin", origin, "--cors-origins")
        return None

    def _allows_host(self, name: str) -> bool:
        return (
            _ANY in self._allowed_hosts
            or name in self._allowed_hosts
            or name == "localhost"
            or name.endswith(".localhost")
            or _is_address(name)
        )


def _is_own(origin: str, headers: Headers) -> bool:
    """Returns True if pages of `origin` come from the address in the Host header."""
    return origin.partition("://")[2] == headers.get("host", "")


def is_loopback(host: str) -> bool:
    """Returns true if only this machine reaches a server on `host`. Names other than `localhost` are not resolved.

    >>> is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _host_of(url: str) -> str:
    """Returns the host of a URL in lower case, without port and brackets; empty if there is none."""
    try:
        return (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        return ""
