"""Bounds the size of decoded values, in bounded time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from msgspec import Struct

# Size in characters of each number, text and container, besides the characters of texts.
_VALUE_CHARS = 16


def is_larger(limit: int, *values: Any) -> bool:
    """Returns True if `values` have together more than about `limit` characters as JSON. Takes time in proportion to
    `limit` at most.

    >>> is_larger(100, ["a"] * 2, None), is_larger(100, {"a": ["b" * 90]})
    (False, True)
    """
    rest: list[Any] = list(values)
    size = 0
    while rest and size <= limit:
        value = rest.pop()
        size += _VALUE_CHARS
        if isinstance(value, str):
            size += len(value)
            continue
        children = _children(value)
        if size + _VALUE_CHARS * len(children) > limit:
            return True
        rest += children
    return size > limit


def _children(value: Any) -> Collection[Any]:
    match value:
        case Mapping():
            return value.values()
        case list() | tuple():
            return value
        case Struct():
            return [getattr(value, name) for name in value.__struct_fields__]
    return ()
