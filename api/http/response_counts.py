"""Numbers of responses by method, route and status, for the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from starlette.routing import Route

# Label of every path without a route and of every unusual method, so that clients cannot add labels.
_OTHER = "other"
_METHODS = ("GET", "POST", "DELETE", "OPTIONS", "HEAD")


class ResponseCounts:
    """The numbers of a server's responses. Belongs to the event loop."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, str, int]] = Counter()
        """By method, path of the route, and status; 499 is a client that disconnected before the response."""
        self.failed_streams = 0
        """Number of streams that ended with an error event."""
        self.open_connections: Callable[[], int] = lambda: 0
        """Returns the number of open connections."""
        self._prefix = ""
        self._literal: set[str] = set()
        self._templates: list[Route] = []

    def use_routes(self, routes: Sequence[Route], prefix: str) -> None:
        """Sets the routes of the server, whose paths begin with `prefix`."""
        self._prefix = prefix
        self._literal = {route.path for route in routes if not route.param_convertors}
        self._templates = [route for route in routes if route.param_convertors]

    def add(self, method: str, path: str, status: int, *, failed: bool = False) -> None:
        """Counts a response. `failed` is True for an error; with a status below 400 a stream has ended with it."""
        self.responses[method if method in _METHODS else _OTHER, self._route(path), status] += 1
        self.failed_streams += failed and status < 400

    def add_refused(self, status: int) -> None:
        """Counts the response to a request that was refused before its path was known."""
        self.responses[_OTHER, _OTHER, status] += 1

    def _route(self, path: str) -> str:
        path = path.removeprefix(self._prefix)
        if path in self._literal:
            return path
        return next((route.path for route in self._templates if route.path_regex.match(path)), _OTHER)
