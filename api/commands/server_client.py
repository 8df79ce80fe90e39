"""A client of a running server, for the commands that show something in the terminal."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2
import msgspec
from msgspec import Struct

from api.config.values import OptionError
from api.http.origins import is_loopback

# Port of a server with default settings.
_DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_SECONDS = 10.0
# Maximum characters of an error body that is not JSON.
_QUOTED_CHARS = 200
# Control characters except tab and line break, which could change the state of the terminal.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Failures of TLS and of name resolution.
_OTHER_FAILURE = re.compile(r"\[(SSL|Errno -)")

_Reply = TypeVar("_Reply")


class ServerError(Exception):
    """A request failed. The message is one line. `status` is 0 if there was no response."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class _ErrorText(Struct, frozen=True):
    message: str = ""


class _ErrorReply(Struct, frozen=True):
    error: _ErrorText = _ErrorText()


class ServerClient:
    """A connection to the server at `url`. A context manager."""

    def __init__(self, url: str, api_key: str = "", transport: httpx2.BaseTransport | None = None) -> None:
        """`url` is one that `server_url` returned. `transport` replaces the network."""
        self.url = url
        self._client = httpx2.Client(
            base_url=url,
            headers={b"Authorization": f"Bearer {api_key}".encode(errors="surrogateescape")} if api_key else {},
            verify=httpx2.create_ssl_context() if url.startswith("https:") else True,  # also reads SSL_CERT_FILE
            timeout=_TIMEOUT_SECONDS,
            trust_env=not is_loopback(httpx2.URL(url).host),  # a proxy cannot reach this machine's loopback addresses
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def get(self, path: str) -> str:
        """Returns the body of a GET request. Raises ServerError."""
        try:
            reply = self._client.get(path)
        except httpx2.HTTPError as error:
            raise ServerError(f"no answer from {self.url}: {_reason(error)}") from None
        if reply.status_code != 200:
            raise _refusal(self.url, reply)
        return reply.text

    def get_as(self, path: str, reply_type: type[_Reply]) -> _Reply:
        """Returns the decoded JSON of a GET request. Raises ServerError."""
        try:
            return msgspec.json.decode(self.get(path), type=reply_type)
        except msgspec.MsgspecError as error:
            raise ServerError(f"{self.url}{path} is not a reply of Paceline: {error}") from None

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[str, None, None]:
        """Yields the data of the events of a POST request, without `[DONE]`. Closing the iterator ends the request.
        Raises ServerError."""
        timeout = httpx2.Timeout(_TIMEOUT_SECONDS, read=None)  # a prefill can take minutes
        try:
            with self._client.stream("POST", path, json=body, timeout=timeout) as reply:
                if reply.status_code != 200:
                    reply.read()
                    raise _refusal(self.url, reply)
                if not reply.headers.get("content-type", "").startswith("text/event-stream"):
                    raise ServerError(f"{self.url}{path} is not a stream of Paceline")
                for line in reply.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield line.removeprefix("data: ")
        except httpx2.HTTPError as error:
            raise ServerError(f"no answer from {self.url}: {_reason(error)}") from None


def server_url(text: str) -> str:
    """Returns the URL of a server without a slash at its end. An empty text is the default address, a number a port of
    this machine. Raises OptionError.

    >>> server_url("8080"), server_url("box:8080/llm/"), server_url("https://box/v1")
    ('http://127.0.0.1:8080', 'http://box:8080/llm', 'https://box')
    """
    url = text or _DEFAULT_URL
    if text.isdecimal():
        url = f"http://127.0.0.1:{text}"
    elif "://" not in url:
        url = f"http://{url}"
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) >= 2**16:
        raise OptionError(f"{text!r} is no URL of a server: use one such as {_DEFAULT_URL}, or a port")
    return url.rstrip("/").removesuffix("/v1")


def without_controls(text: str) -> str:
    """Returns `text` without control characters except tabs and line breaks."""
    return _CONTROL_CHARACTERS.sub("", text)


def _reason(error: httpx2.HTTPError) -> str:
    text = without_controls(str(error)) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"its certificate is not trusted; SSL_CERT_FILE names the file of a certificate to trust ({text})"
    if isinstance(error, httpx2.ConnectError) and not _OTHER_FAILURE.match(text):
        return "nothing listens there; start it with `paceline serve -m model.gguf`"
    return text


def _refusal(url: str, reply: httpx2.Response) -> ServerError:
    try:
        message = msgspec.json.decode(reply.content, type=_ErrorReply).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError):
        message = ""
    message = without_controls(message or reply.text[:_QUOTED_CHARS]).replace("\n", " ")
    hint = " (--api-key KEY)" if reply.status_code == 401 else ""
    return ServerError(f"{url} answers {reply.status_code}: {message}{hint}", reply.status_code)
