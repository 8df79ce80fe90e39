"""The `encrypted_content` of reasoning items: reasoning in a form that clients return unread and do not display."""

from __future__ import annotations

import base64

_PREFIX = "paceline."


def encode_reasoning(text: str) -> str:
    """Returns the `encrypted_content` of a reasoning: base64 of its UTF-8, not encrypted, since no secret is in it.

    >>> decode_reasoning(encode_reasoning("hm"))
    'hm'
    """
    return _PREFIX + base64.b64encode(text.encode()).decode()


def decode_reasoning(content: str) -> str | None:
    """Returns the reasoning of an `encrypted_content`. None if another server made it."""
    if not content.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(content.removeprefix(_PREFIX), validate=True).decode()
    except ValueError:
        return None
