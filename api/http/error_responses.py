"""Errors as clients see them: which status, which body. The only place that decides."""

from __future__ import annotations

from math import ceil

from msgspec import UNSET, Struct, UnsetType
from starlette.exceptions import HTTPException

from engine import ContextExceeded, Draining, EngineError, Overloaded, RequestRefused


class ErrorReply(Struct, frozen=True):
    """What went wrong; `param` is the path of the field that is to blame."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None
    n_prompt_tokens: int | UnsetType = UNSET
    n_ctx: int | UnsetType = UNSET


class ErrorBody(Struct, frozen=True):
    """The body of every error, and the event of one in a stream."""

    error: ErrorReply


class UnknownModel(RequestRefused):
    """The client named a model that is not served."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(f"The model {asked[:128]!r} is not served here; {served!r} is.", field="model")


class Loading(EngineError):
    """The model is not ready yet."""

    def __init__(self) -> None:
        super().__init__("Loading model")


class KeyRefused(EngineError):
    """No API key, or a wrong one."""

    def __init__(self) -> None:
        super().__init__("A valid API key is needed: send it as 'Authorization: Bearer KEY'.")


class SwitchedOff(EngineError):
    """What was asked for is not to be had with this server's settings; the text says which would be right."""


class NoIdleSlot(EngineError):
    """All slots are busy, and the client wanted to know."""

    def __init__(self) -> None:
        super().__init__("no slot available")


class Problem(Struct, frozen=True):
    """A status and what to say with it."""

    status: int
    error: ErrorReply
    headers: dict[str, str] = {}

    @property
    def body(self) -> ErrorBody:
        """As JSON is made of it."""
        return ErrorBody(self.error)


def problem_of(error: Exception) -> Problem:
    """What `error` is to a client. Of a failure that is not an EngineError it learns nothing but that."""
    match error:
        case ContextExceeded():
            return Problem(
                400,
                ErrorReply(
                    str(error),
                    "invalid_request_error",
                    error.field,
                    "context_length_exceeded",
                    error.prompt_tokens,
                    error.limit,
                ),
            )
        case UnknownModel():
            return Problem(404, ErrorReply(str(error), "invalid_request_error", error.field, "model_not_found"))
        case RequestRefused():
            return Problem(400, ErrorReply(str(error), "invalid_request_error", error.field))
        case RecursionError():
            return Problem(400, ErrorReply("The body is nested too deeply.", "invalid_request_error"))
        case KeyRefused():
            return Problem(
                401,
                ErrorReply(str(error), "invalid_request_error", None, "invalid_api_key"),
                {"www-authenticate": "Bearer"},
            )
        case Overloaded():
            return _later(429, ErrorReply(str(error), "rate_limit_error", None, "queue_full"), error.retry_after)
        case Loading():
            return _later(503, ErrorReply(str(error), "unavailable_error", None, 503), 1.0)
        case Draining():
            return _later(503, ErrorReply(str(error), "unavailable_error", None, "shutting_down"), 5.0)
        case NoIdleSlot():
            return _later(503, ErrorReply(str(error), "unavailable_error", None, 503), 1.0)
        case SwitchedOff():
            return Problem(501, ErrorReply(str(error), "not_supported_error", None, 501))
        case EngineError():
            return Problem(500, ErrorReply(str(error), "server_error"))
        case HTTPException():
            told = ErrorReply(error.detail, "invalid_request_error")
            return Problem(error.status_code, told, dict(error.headers or {}))
    return Problem(500, ErrorReply("The server failed to answer; its log says why.", "server_error"))


def _later(status: int, error: ErrorReply, seconds: float) -> Problem:
    return Problem(status, error, {"retry-after": str(max(1, ceil(seconds)))})
