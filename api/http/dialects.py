"""The parts of responses that depend on the client's API, not on the endpoint: errors, pings and the id's header."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from api.http.error_responses import ErrorResponse
from api.http.events import sse_event


class Dialect(Struct, frozen=True):
    """The shape of errors, pings and request ids in the API of one family of clients."""

    error_body: Callable[[ErrorResponse, str], Struct]
    """Returns the body for an error and the id of the request."""
    error_event: Callable[[Struct], bytes]
    """Returns the event of a stream for the body of an error."""
    error_status: Callable[[ErrorResponse], int] = lambda error: error.status
    ping: bytes = b": ping\n\n"
    """Keeps an idle stream open in proxies. An SSE comment is ignored by all clients."""
    id_header: str | None = None
    """Another header than X-Request-Id in which the clients look for the id of the request."""


OPENAI_DIALECT = Dialect(lambda error, request_id: error.body, sse_event)
