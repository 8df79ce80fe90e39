"""JSON pointers (RFC 6901), and the `$ref` keyword of JSON schemas, whose value can contain one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

# An index of a list. RFC 6901 allows no sign and no leading zero. Ten digits suffice for any list, and `int` raises
# ValueError for thousands of digits.
_INDEX = re.compile(r"0|[1-9][0-9]{0,9}")


def escape(name: str) -> str:
    """Returns an object's key as a reference token of a JSON pointer.

    >>> escape("a/b~")
    'a~1b~0'
    """
    return name.replace("~", "~0").replace("/", "~1")


def resolve(document: Any, pointer: str) -> Any:
    """Returns the value at `pointer` in `document`. Returns None if the pointer is invalid or no value is there.

    >>> resolve({"a/b": [{"~1": 7}]}, "/a~1b/0/~01")
    7
    """
    if not pointer:
        return document
    head, *steps = pointer.split("/")
    value = None if head else document
    for step in steps:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list):
            value = value[int(name)] if _INDEX.fullmatch(name) and int(name) < len(value) else None
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def pointer_of(reference: Any) -> str | None:
    """Returns the JSON pointer in the value of a `$ref` to its own document. Returns None for any other value.

    The pointer is percent-encoded in a URI fragment (RFC 6901, section 6).

    >>> pointer_of("#/$defs/a%20b"), pointer_of("https://example.org/schema#/a")
    ('/$defs/a b', None)
    """
    return unquote(reference[1:]) if isinstance(reference, str) and reference.startswith("#") else None


def resolve_reference(document: Any, reference: Any) -> Any:
    """Returns the value in `document` to which the value of a `$ref`, such as `#/$defs/name`, refers. Returns None if
    no value is there."""
    pointer = pointer_of(reference)
    return None if pointer is None else resolve(document, pointer)
