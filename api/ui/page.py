"""GET /: a page with a chat and a live view, from the files in `static/`."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

# Paths that are served without an API key: the page asks for one.
PAGE_PATH = "/"
ASSET_PATH = "/ui/"

_FOLDER = Path(__file__).parent / "static"
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class PageFile(Struct, frozen=True):
    """A file of the page."""

    body: bytes
    content_type: str
    etag: str

    @classmethod
    def of(cls, body: bytes, suffix: str) -> PageFile:
        """Returns the file with the type of its suffix and a digest as ETag."""
        return cls(body, _CONTENT_TYPES[suffix], f'"{blake2b(body, digest_size=12).hexdigest()}"')


class PageEndpoints:
    """The endpoints of the page and its files."""

    def __init__(self, *, needs_key: bool) -> None:
        """With `needs_key` the page asks for an API key before its first request."""
        self._files = {path.name: PageFile.of(path.read_bytes(), path.suffix) for path in _FOLDER.iterdir()}
        page = self._files.pop("index.html").body
        self._page = PageFile.of(page.replace(b"<html", b"<html data-needs-key", 1) if needs_key else page, ".html")

    async def page(self, request: Request) -> Response:
        """Returns the page, also while the model loads."""
        return _file_response(request, self._page)

    async def asset(self, request: Request) -> Response:
        """Returns a style, a script or an image of the page."""
        file = self._files.get(request.path_params["name"])
        if file is None:
            raise HTTPException(404)
        return _file_response(request, file)


def _file_response(request: Request, file: PageFile) -> Response:
    headers = {**_HEADERS, "etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers={**headers, "content-type": file.content_type})
