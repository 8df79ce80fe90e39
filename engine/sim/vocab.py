"""Vocabulary of the simulated model: single bytes, common words, and pairs of lower-case letters."""

from __future__ import annotations

import re

_WORDS = (
    "the of and to a in that is was he for it with as his on be at by had not are but from or have an they which one "
    "you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many"
)
# Words of the output. The token of a word begins with a space.
OUTPUT_WORDS = _WORDS.split()

END_TOKEN = 0
# The token ids are, in this order: the end token, 256 bytes, the words, and 26 * 26 pairs of letters.
FIRST_WORD_TOKEN = 257
VOCAB_SIZE = FIRST_WORD_TOKEN + len(OUTPUT_WORDS) + 26 * 26


class SimVocab:
    """Implements `engine.backend.Vocab`. Any text can be tokenized; most texts have half as many tokens as bytes."""

    kind = 0
    added = (-1, -1)
    ends = special = frozenset({END_TOKEN})

    def __init__(self, size: int = 0) -> None:
        """`size` is the minimum number of tokens. No text has the tokens beyond bytes, words and pairs."""
        words = [f" {word}".encode() for word in OUTPUT_WORDS]
        pairs = [bytes((one, two)) for one in range(97, 123) for two in range(97, 123)]
        self._token_bytes = [b"", *(bytes((byte,)) for byte in range(256)), *words, *pairs]
        self._ids = {spelled: token for token, spelled in enumerate(self._token_bytes) if spelled}
        longest_first = sorted(words, key=len, reverse=True)
        self._pattern = re.compile(rb"(?:%b)(?![a-z])|[a-z][a-z]|(?s:.)" % b"|".join(longest_first))
        assert len(self._token_bytes) == VOCAB_SIZE, "tokens are bytes, words and pairs"
        self._token_bytes += [b"<unused>"] * (size - VOCAB_SIZE)
        self.size = len(self._token_bytes)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Returns the token ids of `text`: words where possible, else pairs of letters, else bytes. `special` has no
        effect, as no text is a special token."""
        return [self._ids[spelled] for spelled in self._pattern.findall(text.encode("utf-8", "replace"))]

    def piece(self, token: int) -> bytes:
        """Returns the bytes of a token; empty for the end token."""
        return self._token_bytes[token]

    def text(self, token: int) -> str:
        """Returns the token as text; `<end>` for the end token."""
        return "<end>" if token == END_TOKEN else self._token_bytes[token].decode("utf-8", "replace")
