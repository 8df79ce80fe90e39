"""Reads request bodies."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request


async def read(request: Request, limit: int) -> bytes:
    """The whole body. Raises HTTPException 413 once it is known to be longer than `limit` bytes, which is before
    it is read if its length was announced, and ClientDisconnect if the client goes first."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body is larger than {limit} bytes, the most that is read.")
