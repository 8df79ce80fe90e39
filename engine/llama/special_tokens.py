"""Cuts a text at special tokens into pieces that the library tokenizes like the whole text, in linear time.

The library's search for special tokens takes time in proportion to the square of their number in one text.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import NamedTuple

# Minimum bytes of all pieces but the last.
PIECE_BYTES = 4096


class SpecialToken(NamedTuple):
    """The text of a token that the library finds before it tokenizes the rest."""

    text: bytes
    strips_left: bool
    """True if the token includes the white space before it."""
    strips_right: bool
    """True if the token includes the white space after it."""


class SpecialTokenSplitter:
    """Cuts texts after occurrences of special tokens that the library finds regardless of the surrounding text.

    The library searches for the longest special token first, so it finds each occurrence that is longer than all
    occurrences that overlap it (`tokenizer_st_partition` in llama-vocab.cpp). No tokenizer carries a state over a
    special token.
    """

    def __init__(self, tokens: Collection[SpecialToken]) -> None:
        texts = {token.text for token in tokens if token.text}
        self._longest = max(map(len, texts), default=0)
        self._pattern = re.compile(b"(?=(%b))" % _any_of(texts)) if texts else None
        strips = any(token.strips_left or token.strips_right for token in tokens)
        self._uncuttable = {
            text
            for text, _, strips_right in tokens
            if strips_right or (strips and (text[:1].isspace() or text[-1:].isspace()))
        }

    def split(self, data: bytes) -> Iterator[bytes]:
        """Yields the pieces of `data`, in order."""
        start = 0
        while start < len(data):
            end = self._cut(data, start + PIECE_BYTES)
            yield data[start:end]
            start = end

    def _cut(self, data: bytes, target: int) -> int:
        """Returns the first end of an occurrence from `target` on at which `data` can be cut; without any, the end of
        `data`."""
        if self._pattern is None or target >= len(data):
            return len(data)
        reach = 0  # the end of all occurrences so far
        cut = None  # the end of an occurrence that overlaps no earlier one
        for found in self._pattern.finditer(data, max(0, target - self._longest)):
            start, end = found.span(1)
            if end <= reach:  # inside of a longer occurrence
                continue
            if cut is not None and start >= cut:
                return cut
            isolated = start >= max(reach, target) and found[1] not in self._uncuttable
            cut, reach = end if isolated else None, end
        return len(data) if cut is None else cut


def _any_of(texts: Collection[bytes]) -> bytes:
    """Returns a regular expression that matches the longest of `texts`, with common beginnings written once.

    >>> _any_of([b"ab", b"ac", b"a"])
    b'a(?:b|c)?'
    """
    rests = defaultdict(list)
    for text in sorted(texts):
        if text:
            rests[text[:1]].append(text[1:])
    branches = [re.escape(first) + _any_of(rest) for first, rest in rests.items()]
    if not branches:
        return b""
    optional = b"" in texts
    alternatives = b"|".join(branches)
    if optional or len(branches) > 1:
        alternatives = b"(?:%b)" % alternatives
    return alternatives + b"?" * optional
