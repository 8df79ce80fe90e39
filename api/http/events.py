"""Bodies as JSON, and server-sent events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

# A reply that can be a body: a struct, an object, or a list of these.
Body = Struct | Mapping[str, Any] | Sequence[Struct | Mapping[str, Any]]

# The last event of a complete stream.
DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode


def event(reply: Struct | Mapping[str, Any]) -> bytes:
    """Returns one server-sent event with `reply` as its data."""
    return b"data: %b\n\n" % encode(reply)
