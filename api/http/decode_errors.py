"""Converts decode errors of msgspec to refusals that name the field by its path, and finds the nearest valid name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

import msgspec

from engine import RequestRefused

# Clients may send names of megabytes; comparing takes quadratic time.
_COMPARED_CHARS = 64


def as_refusal(error: msgspec.ValidationError, parent: str = "") -> RequestRefused:
    """Returns `error` as a RequestRefused whose field is the dotted path, below the field `parent` if one is given.

    >>> as_refusal(msgspec.ValidationError("Expected `str`, got `int` - at `$.messages[0].role`")).field
    'messages[0].role'
    >>> as_refusal(msgspec.ValidationError("Expected `int` >= 1 - at `$.n_max`"), "speculative").field
    'speculative.n_max'
    """
    reason, _, path = str(error).partition(" - at `$")
    field = f"{parent}{path.rstrip('`')}".lstrip(".") or None
    return RequestRefused(f"{field}: {reason}" if field else reason, field=field)


def nearest_hint(name: str, valid_names: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown `name`; empty if `valid_names` is empty.

    >>> nearest_hint("sufix", ["draft", "suffix"])
    '; the nearest is suffix'
    """
    close = get_close_matches(name[:_COMPARED_CHARS], list(valid_names), n=1, cutoff=0.0)
    return f"; the nearest is {close[0]}" if close else ""
