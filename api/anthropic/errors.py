"""Errors, pings and request ids in the shape of Anthropic's API."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from api.http.dialects import Dialect
from api.http.error_responses import ErrorInfo, ErrorResponse
from api.http.events import encode_json

_OVERLOADED_STATUS = 529
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    _OVERLOADED_STATUS: "overloaded_error",
}


class ThreadErrorDetails(Struct, frozen=True):
    """Makes Anthropic's SDK repeat a request with all messages and without `thread`, which its tool runner sends."""

    error_code: Literal["thread_unsupported_request"] = "thread_unsupported_request"
    unsupported: tuple[str, ...] = ("thread",)


class MessageErrorInfo(Struct, frozen=True):
    """The `error` object of an error body."""

    type: str
    message: str
    details: ThreadErrorDetails | UnsetType = UNSET


class MessageErrorBody(Struct, frozen=True, tag="error"):
    """The body of an error response, and the data of an error event in a stream."""

    error: MessageErrorInfo
    request_id: str


def tagged_event(data: Struct) -> bytes:
    """Returns one server-sent event with `data` as JSON. The event's name is the tag of the struct."""
    return b"event: %b\ndata: %b\n\n" % (str(data.__struct_config__.tag).encode(), encode_json(data))


def _error_status(response: ErrorResponse) -> int:
    """Returns 529 for an unavailable server, which Anthropic's clients know as overloaded."""
    return _OVERLOADED_STATUS if response.status == 503 else response.status


def _error_body(response: ErrorResponse, request_id: str) -> MessageErrorBody:
    status = _error_status(response)
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    details = ThreadErrorDetails() if response.error.param == "thread" else UNSET
    return MessageErrorBody(MessageErrorInfo(kind, _message(response.error), details), request_id)


def _message(error: ErrorInfo) -> str:
    """Returns the error's message, which begins with the field's path, because the body has no field for the path."""
    if error.n_prompt_tokens is not UNSET and error.n_ctx is not UNSET:
        # Agents find these words and then shorten the conversation.
        return f"prompt is too long: {error.n_prompt_tokens} tokens > {error.n_ctx - 1} maximum. {error.message}"
    if error.param and not error.message.startswith(error.param):
        return f"{error.param}: {error.message}"
    return error.message


ANTHROPIC_DIALECT = Dialect(
    error_body=_error_body,
    error_event=tagged_event,
    error_status=_error_status,
    ping=b'event: ping\ndata: {"type": "ping"}\n\n',
    id_header="request-id",
)
