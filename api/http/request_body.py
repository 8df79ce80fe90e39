"""Receives request bodies up to a maximum size, and decompresses them."""

from __future__ import annotations

import zlib
from codecs import BOM_UTF8

from starlette.exceptions import HTTPException
from starlette.requests import Request

from engine import WORKERS, RequestRefused

_COMPRESSIONS = ("gzip", "x-gzip", "deflate")
# zlib's window size for data with the header of either gzip or zlib.
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Returns the whole body, decompressed and without a byte order mark.

    Raises HTTPException 413 if the body is longer than `max_bytes`, compressed or not: before receiving anything if
    Content-Length exceeds the limit, else at the first byte beyond the limit. Raises HTTPException 415 for an unknown
    Content-Encoding, RequestRefused for invalid compressed data, and ClientDisconnect if the client disconnects first.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in (*_COMPRESSIONS, "identity", ""):
        raise HTTPException(
            415,
            f"Content-Encoding: expected gzip, deflate or no compression, not {encoding[:64]!r}.",
            {"accept-encoding": "gzip, deflate"},
        )
    body = await _receive(request, max_bytes)
    if encoding in _COMPRESSIONS:
        body = await WORKERS.run(_decompress, body, max_bytes)
    return body.removeprefix(BOM_UTF8)


async def _receive(request: Request, max_bytes: int) -> bytes:
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


def _decompress(data: bytes, max_bytes: int) -> bytes:
    decompressor = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        body = decompressor.decompress(data, max_bytes + 1)
    except zlib.error:
        raise RequestRefused("body: expected gzip or zlib data, as the Content-Encoding header says.") from None
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    if not decompressor.eof or decompressor.unused_data:
        raise RequestRefused("body: the compressed data must be one complete stream, without data after its end.")
    return body


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"The body is too large: send at most {max_bytes} bytes (--max-body).")
