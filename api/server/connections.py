"""Limits of HTTP connections: their number, and the seconds for the parts of an exchange."""

from __future__ import annotations

import resource
from typing import Protocol

from msgspec import Struct

from api.config.server import ServerConfig

# Connections above the limit that are accepted while all others have requests: /health answers them, and other requests
# get a 503.
SPARE_CONNECTIONS = 64

# File descriptors for everything but connections: the model, caches, logs, listeners.
_OTHER_FILES = 256


class ConnectionLimits(Struct, frozen=True):
    """The limits of a server's connections."""

    number: int
    header_seconds: float
    """For the whole head of a request, from the first byte on, or from the connection on for its first request."""
    io_seconds: float
    """For the next bytes of a body, and for the client to take bytes of a response."""


class WaitingConnection(Protocol):
    """A connection that can be ended at once."""

    def abort(self) -> None:
        """Ends the connection without waiting for the client."""


class WaitingConnections:
    """The connections of a server that have sent no whole request since their last response, the oldest first."""

    def __init__(self) -> None:
        self._since: dict[WaitingConnection, None] = {}

    def add(self, connection: WaitingConnection) -> None:
        """Adds a connection as the newest."""
        self._since.pop(connection, None)
        self._since[connection] = None

    def discard(self, connection: WaitingConnection) -> None:
        """Removes a connection. No effect on others."""
        self._since.pop(connection, None)

    def end_oldest(self) -> bool:
        """Ends the connection that has waited for longest. Returns False if there is none."""
        oldest = next(iter(self._since), None)
        if oldest is None:
            return False
        del self._since[oldest]
        oldest.abort()
        return True


def connection_limits(config: ServerConfig) -> ConnectionLimits:
    """Returns the limits of `config`, with fewer connections if the process may not open as many files.

    Raises the process's soft limit of open files as far as necessary.
    """
    wanted = config.max_connections + SPARE_CONNECTIONS + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    missing = 0 if soft == resource.RLIM_INFINITY else max(0, wanted - soft)
    return ConnectionLimits(max(1, config.max_connections - missing), config.header_timeout, config.timeout)
