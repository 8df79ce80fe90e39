"""Vocabulary and output of the simulated model."""

from __future__ import annotations

import re

_WORDS = (
    "the of and to a in that is was he for it with as his on be at by had not are but from or have an they which one "
    "you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many"
)
# The words of the output, each emitted with a space before it.
WORDS = _WORDS.split()

# The token that ends an output.
END = 0
# The first of the words: after the bytes, and before all pairs of small letters.
WORD = 257
# Tokens of the vocabulary.
SIZE = WORD + len(WORDS) + 26 * 26
# Mean number of tokens of an output.
ENDS_ONCE_IN = 256

# Hashes are a linear congruential generator (Knuth's MMIX) that adds a token in each step; MIX mixes their bits.
STEP, MIX, MASK = 6364136223846793005, 0x94D049BB133111EB, 2**64 - 1


def following(known: int, token: int) -> int:
    """Returns the hash of a history with the hash `known` and one token more."""
    return (known * STEP + token + 1) & MASK


class SimVocab:
    """Bytes, some words and all pairs of small letters: every text has tokens, most texts half as many as bytes."""

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
        """Returns the tokens of the longest pieces first; no text is special."""
        return [self._ids[piece] for piece in self._pattern.findall(text.encode("utf-8", "replace"))]

    def piece(self, token: int) -> bytes:
        """Returns the bytes of a token; empty for the one that ends an output."""
        return self._pieces[token]

    def text(self, token: int) -> str:
        """Returns the token as readable text."""
        return "<end>" if token == END else self._pieces[token].decode("utf-8", "replace")
