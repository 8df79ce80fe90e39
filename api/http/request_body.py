"""Receives request bodies up to a maximum size."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Returns the whole body.

    Raises HTTPException 413 if the body is longer than `max_bytes`: before receiving anything if Content-Length exceeds
    the limit, else at the first chunk beyond the limit. Raises ClientDisconnect if the client disconnects first.
    """
    content_length = request.headers.get("content-length", "")
    if content_length.isdecimal() and int(content_length) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"The body is too large: send at most {max_bytes} bytes.")
