"""Maps exceptions to HTTP error responses in OpenAI's shape. Only HTTPException has a status of its own."""

from __future__ import annotations

from math import ceil
from typing import Literal

from msgspec import UNSET, Struct, UnsetType
from starlette.exceptions import HTTPException

from engine import (
    ContextExceeded,
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineStalled,
    Overloaded,
    QueueTimeout,
    RequestRefused,
    ShutDown,
)

# `Retry-After` while the model loads or no slot is idle.
_RETRY_SECONDS = 1.0
# `Retry-After` while a step of the engine does not end.
_STALL_SECONDS = 30.0
# `Retry-After` while the server shuts down.
_RESTART_SECONDS = 5.0

# Maximum characters of a client's text in an error message.
_QUOTED_CHARS = 128


class ErrorInfo(Struct, frozen=True):
    """The `error` object of an error body. `param` is the path of the wrong field."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None
    n_prompt_tokens: int | UnsetType = UNSET
    n_ctx: int | UnsetType = UNSET
    progress: float | UnsetType = UNSET
    """The loaded share of the model, 0 to 1, while it loads."""


class ErrorBody(Struct, frozen=True):
    """The body of an error response, and the data of an error event in a stream."""

    error: ErrorInfo


class ErrorResponse(Struct, frozen=True):
    """The status, error object and headers of an error response."""

    status: int
    error: ErrorInfo
    headers: dict[str, str] = {}

    @property
    def body(self) -> ErrorBody:
        """The body of the response, to be encoded as JSON."""
        return ErrorBody(self.error)


class UnknownModel(RequestRefused):
    """The request names a model other than the loaded one: 404."""

    def __init__(self, requested: str, loaded: str) -> None:
        super().__init__(
            f"model: {requested[:_QUOTED_CHARS]!r} is not served here; use {loaded!r} or leave the field out.",
            field="model",
        )


class ModelLoading(EngineError):
    """The model is not loaded yet: 503. `share` is the loaded share, 0 to 1. The message is llama-server's."""

    def __init__(self, share: float = 0.0) -> None:
        super().__init__("Loading model")
        self.share = share


class InvalidApiKey(EngineError):
    """The request has no API key or an unknown one: 401."""

    def __init__(self) -> None:
        super().__init__("The API key is missing or wrong; send a valid one as 'Authorization: Bearer KEY'.")


class AdminKeyNeeded(EngineError):
    """The request's API key is not an admin's: 403."""

    def __init__(self) -> None:
        super().__init__("This API key may not do that; send the key of an admin, see --keys.")


class RateLimited(EngineError):
    """The API key has reached a limit: 429. `kind` is OpenAI's name of the limit, `retry_after` is in seconds."""

    def __init__(self, kind: Literal["requests", "tokens"], limit: str, retry_after: float) -> None:
        super().__init__(f"The API key has reached its limit of {limit}. Retry in {max(1, ceil(retry_after))} s.")
        self.kind = kind
        self.retry_after = retry_after


class ForeignPage(EngineError):
    """A server on a loopback address refuses the request of a page of another machine: 403."""

    def __init__(self, header: str, value: str, flag: str) -> None:
        super().__init__(f"{header}: {value[:_QUOTED_CHARS]!r} is not allowed here; {flag} allows more.")


class EndpointDisabled(EngineError):
    """The server's flags or the model disable the endpoint: 501. The message names the flag that enables the endpoint,
    or what the model lacks."""


class NoIdleSlot(EngineError):
    """All slots are busy and the request has `fail_on_no_slot`: 503. The message is llama-server's."""

    def __init__(self) -> None:
        super().__init__("no slot available")


class TooManyConnections(EngineError):
    """All connections have requests, and the server accepts no more: 503."""

    def __init__(self) -> None:
        super().__init__("The server has too many connections; --max-connections allows more. Retry later.")


def error_response(error: Exception) -> ErrorResponse:
    """Returns the response for `error`. The message of an unexpected exception is not sent."""
    match error:
        case ContextExceeded():
            return ErrorResponse(
                400,
                ErrorInfo(
                    str(error),
                    "exceed_context_size_error",
                    error.field,
                    "context_length_exceeded",
                    error.prompt_tokens,
                    error.limit,
                ),
            )
        case UnknownModel():
            return _invalid_request(404, str(error), error.field, "model_not_found")
        case RequestRefused():
            return _invalid_request(400, str(error), error.field)
        case RecursionError():
            return _invalid_request(400, "The body is nested too deeply; send JSON with fewer levels.")
        case InvalidApiKey():
            info = ErrorInfo(str(error), "authentication_error", None, "invalid_api_key")
            return ErrorResponse(401, info, {"www-authenticate": "Bearer"})
        case ForeignPage() | AdminKeyNeeded():
            return ErrorResponse(403, ErrorInfo(str(error), "permission_error"))
        case DeadlineExceeded():
            # OpenAI's and Anthropic's SDKs would repeat the request, although the time that it had is over.
            info = ErrorInfo(str(error), "timeout_error", "timeout_ms", "timeout")
            return ErrorResponse(408, info, {"x-should-retry": "false"})
        case RateLimited():
            return _retry_later(429, ErrorInfo(str(error), error.kind, None, "rate_limit_exceeded"), error.retry_after)
        case QueueTimeout():
            info = ErrorInfo(str(error), "unavailable_error", None, "queue_timeout")
            return _retry_later(503, info, error.retry_after)
        case Overloaded():
            return _retry_later(429, ErrorInfo(str(error), "rate_limit_error", None, "queue_full"), error.retry_after)
        case ModelLoading():
            info = ErrorInfo(str(error), "unavailable_error", None, 503, progress=round(error.share, 3))
            return _retry_later(503, info, _RETRY_SECONDS)
        case NoIdleSlot() | TooManyConnections():
            return _retry_later(503, ErrorInfo(str(error), "unavailable_error", None, 503), _RETRY_SECONDS)
        case Draining() | ShutDown():
            return _retry_later(
                503, ErrorInfo(str(error), "unavailable_error", None, "shutting_down"), _RESTART_SECONDS
            )
        case EngineStalled():
            return _retry_later(503, ErrorInfo(str(error), "unavailable_error", None, "engine_stalled"), _STALL_SECONDS)
        case EndpointDisabled():
            return ErrorResponse(501, ErrorInfo(str(error), "not_supported_error", None, 501))
        case EngineError():
            return ErrorResponse(500, ErrorInfo(str(error), "server_error"))
        case HTTPException():
            return _invalid_request(error.status_code, error.detail, headers=dict(error.headers or {}))
    return ErrorResponse(500, ErrorInfo("The server failed to answer; its log has the reason.", "server_error"))


def _invalid_request(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> ErrorResponse:
    return ErrorResponse(status, ErrorInfo(message, "invalid_request_error", param, code), headers or {})


def _retry_later(status: int, error: ErrorInfo, seconds: float) -> ErrorResponse:
    return ErrorResponse(status, error, {"retry-after": str(max(1, ceil(seconds)))})
