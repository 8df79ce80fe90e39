"""What a model that computes nothing says, and how texts become tokens of it."""

from __future__ import annotations

import re

_WORDS = (
    "the of and to a in that is was he for it with as his on be at by had not are but from or have an they which one "
    "you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many"
)
WORDS = _WORDS.split()
"""What it says, each with a space before it."""

END = 0
"""The token that ends a text."""
WORD = 257
"""The first of the words: after the bytes, and before all pairs of small letters."""
SIZE = WORD + len(WORDS) + 26 * 26
"""Tokens of the vocabulary."""
ENDS_ONCE_IN = 256
"""Tokens that it says before it ends, in the mean."""

STEP, MIX, MASK = 6364136223846793005, 0x94D049BB133111EB, 2**64 - 1
"""Of the hashes: a linear congruential generator (Knuth's MMIX) that takes in a token, and what mixes its bits."""


def following(known: int, token: int) -> int:
    """The hash of a text and one token more."""
    return (known * STEP + token + 1) & MASK


class SimVocab:
    """Bytes, some words and all pairs of small letters, so that any text has tokens and most have half as many."""

    kind = 0
    added = (-1, -1)
    ends = special = frozenset({END})

    def __init__(self) -> None:
        pairs = [bytes((one, two)) for one in range(97, 123) for two in range(97, 123)]
        spelled = [b"", *(bytes((byte,)) for byte in range(256)), *(f" {word}".encode() for word in WORDS), *pairs]
        self._pieces = spelled
        self._ids = {piece: token for token, piece in enumerate(spelled) if piece}
        words = b"|".join(f" {word}".encode() for word in sorted(WORDS, key=len, reverse=True))
        self._pattern = re.compile(rb"(?:%b)(?![a-z])|[a-z][a-z]|(?s:.)" % words)
        self.size = len(spelled)
        assert self.size == SIZE, "every token has its place"

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """The longest pieces first; nothing in a text is special."""
        return [self._ids[piece] for piece in self._pattern.findall(text.encode("utf-8", "replace"))]

    def piece(self, token: int) -> bytes:
        """The token's bytes; none for the one that ends a text."""
        return self._pieces[token]

    def text(self, token: int) -> str:
        """The same, readable."""
        return "<end>" if token == END else self._pieces[token].decode("utf-8", "replace")
