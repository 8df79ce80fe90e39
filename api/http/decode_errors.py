"""How wrong input is named: by its path, and with what it was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

import msgspec

from engine import RequestRefused


def refused(error: msgspec.ValidationError, within: str = "") -> RequestRefused:
    """The same complaint about the input, or about its part `within`, with the path in dots.

    >>> refused(msgspec.ValidationError("Expected `str`, got `int` - at `$.messages[0].role`")).field
    'messages[0].role'
    >>> refused(msgspec.ValidationError("Expected `int` >= 1 - at `$.n_max`"), "speculative").field
    'speculative.n_max'
    """
    complaint, _, path = str(error).partition(" - at `$")
    field = f"{within}{path.rstrip('`')}".lstrip(".") or None
    return RequestRefused(f"{field}: {complaint}" if field else complaint, field=field)


LONGEST = 64
"""Characters of a word that are compared: a client may send megabytes."""


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about a `word` that is none of `words`.

    >>> nearest("sufix", ["draft", "suffix"])
    '; the nearest is suffix'
    """
    close = get_close_matches(word[:LONGEST], list(words), n=1, cutoff=0.0)
    return f"; the nearest is {close[0]}" if close else ""
