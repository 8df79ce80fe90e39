"""An ASGI extension of the server, which writes a part of a response's body without an ASGI message and a coroutine."""

from __future__ import annotations

from typing import Protocol

# The name of the extension in `scope["extensions"]`. Its value has the BodyWriter of the request as `writer`.
BODY_WRITER = "paceline.body_writer"


class BodyWriter(Protocol):
    """Writes parts of the body of a response whose head the ASGI application has sent."""

    def can_write(self) -> bool:
        """Returns True while the response is open and the client takes data. Otherwise use ASGI's `send`, which awaits
        the client."""

    def write(self, body: bytes) -> None:
        """Sends `body` immediately. `body` must not be empty, and `can_write()` must be True."""
