"""A stand-in for a model hub on loopback: listings, redirects to a second host, ranges, etags, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit


def commit(repository: str) -> str:
    """Returns the commit of the only revision."""
    return hashlib.sha1(repository.encode()).hexdigest()


class Asked(NamedTuple):
    """A request that the stand-in received."""

    method: str
    path: str
    range: str
    token: str


@dataclass
class HubServer:
    """The files of the hub, its faults, and the requests so far."""

    port: int = 0
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Contents by repository and path."""
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and X-Error-Code by repository."""
    cut_after: list[int] = field(default_factory=list)
    """Bytes of the next downloads after which the connection breaks."""
    listing: bytes = b""
    """Reply in place of each listing; empty is the listing itself."""
    damaged: bool = False
    """True if downloads have one wrong byte."""
    asked: list[Asked] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def downloads(self) -> list[Asked]:
        """Returns the requests for contents of files."""
        return [each for each in self.asked if each.method == "GET" and not each.path.startswith("/api/")]


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """Runs a stand-in without files."""
    hub = HubServer()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._reply()

    def do_GET(self) -> None:
        self._reply()

    def _reply(self) -> None:
        hub, path = self.state, unquote(urlsplit(self.path).path)
        headers = self.headers
        hub.asked.append(Asked(self.command, path, headers.get("Range", ""), headers.get("Authorization", "")))
        repository = next((name for name in {**hub.files, **hub.refusals} if f"{path}/".find(f"/{name}/") >= 0), "")
        if repository in hub.refusals:
            status, code = hub.refusals[repository]
            self._send(status, b"", {"X-Error-Code": code})
        elif path == f"/api/models/{repository}":
            body = hub.listing or json.dumps(self._listing(repository)).encode()
            self._send(200, body, {"Content-Type": "application/json"})
        elif path.startswith("/cdn/"):
            self._send_file(hub.files[repository][path.partition(f"{repository}/")[2]])
        elif (content := hub.files.get(repository, {}).get(path.partition("/resolve/")[2].partition("/")[2])) is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if repository else "RepoNotFound"})
        else:
            name = path.partition("/resolve/")[2].partition("/")[2]
            linked = {
                "X-Repo-Commit": commit(repository),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                "Location": quote(f"http://localhost:{hub.port}/cdn/{repository}/{name}", safe=":/"),
            }
            self._send(302, b"", linked)

    def _listing(self, repository: str) -> dict[str, object]:
        siblings = [
            {
                "rfilename": path,
                "size": len(content),
                "blobId": "b" * 40,
                "lfs": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130},
            }
            for path, content in self.state.files[repository].items()
        ]
        return {"id": repository, "sha": commit(repository), "siblings": siblings}

    def _send_file(self, content: bytes) -> None:
        etag = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}
        sent = content[:-1] + bytes([content[-1] ^ 1]) if self.state.damaged else content
        if not (wanted := self.headers.get("Range", "")):
            self._send(200, sent, etag)
            return
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self._send(206, sent[start:], {**etag, "Content-Range": f"bytes {start}-{len(sent) - 1}/{len(sent)}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.state.cut_after and self.path.startswith("/cdn/"):
            self.wfile.write(body[: self.state.cut_after.pop(0)])
            self.close_connection = True
            return
        self.wfile.write(body)
