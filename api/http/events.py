"""Encodes JSON bodies and server-sent events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

# A JSON body: a struct, an object, or a list of these.
JSONBody = Struct | Mapping[str, Any] | Sequence[Struct | Mapping[str, Any]]

# The last event of a complete stream.
DONE_EVENT = b"data: [DONE]\n\n"

encode_json = msgspec.json.Encoder().encode


class TextEvent:
    """A server-sent event that is encoded once and sent with different texts in one of its fields."""

    def __init__(self, event: bytes, placeholder: str) -> None:
        """`event` has `placeholder` in the place of the text."""
        self._before, _, self._after = event.partition(encode_json(placeholder))

    def with_text(self, text: str) -> bytes:
        """Returns the event with `text`."""
        return b"%b%b%b" % (self._before, encode_json(text), self._after)


def sse_event(data: Struct | Mapping[str, Any]) -> bytes:
    """Returns one server-sent event with `data` as JSON."""
    return b"data: %b\n\n" % encode_json(data)
