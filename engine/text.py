"""Converts the bytes of tokens to text: joins UTF-8 across tokens, and holds back possible stop strings."""

from __future__ import annotations

import codecs
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

# Returns the bytes of a token.
TokenBytes: TypeAlias = Callable[[int], bytes]


def with_control_texts(control_texts: Sequence[tuple[int, str]], token_bytes: TokenBytes) -> TokenBytes:
    """Returns `token_bytes`, except that each token in `control_texts` has the bytes of its text there."""
    if not control_texts:
        return token_bytes
    contents = {token: text.encode() for token, text in control_texts}
    return lambda token: contents[token] if token in contents else token_bytes(token)


def partial_match_length(text: str, markers: Sequence[str]) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of one of `markers`.

    >>> partial_match_length("a <tool", ["<tool_call>", "<think>"])
    5
    """
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0


class DecodedText(NamedTuple):
    """The text and the tokens that one call of a `Detokenizer` releases."""

    text: str
    tokens: int
    """Number of tokens that this call releases."""


class Detokenizer:
    """Decodes the bytes of tokens and holds back only text that may still change.

    The bytes of an incomplete UTF-8 character are held back, and so is the longest suffix of the text that may become a
    stop string. The stop string that is complete first matches; of several that end at the same character the longest
    one matches. A matched stop string and all text after it are never released. The released text depends only on the
    bytes, not on the boundaries of tokens. A token is released once all of its characters are released. At a match the
    tokens that begin before the stop string are released, the others never.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        # Characters decoded by `_decoder`, both released and held ones.
        self._decoded = 0
        # For each token that is not released, the range of its characters, including those shared with other tokens.
        self._spans: list[tuple[int, int]] = []
        self.stopped_by: str | None = None
        """The stop string that matched. None before a match."""

    def feed(self, content: bytes) -> DecodedText:
        """Adds the bytes of one token and returns the text released by them. After a match no text is released.

        >>> detokenizer = Detokenizer(stops=("END",))
        >>> detokenizer.feed("é".encode()[:1]).text, detokenizer.feed("é".encode()[1:] + b" E").text
        ('', 'é ')
        >>> detokenizer.feed(b"NDless").text, detokenizer.stopped_by
        ('', 'END')
        """
        if (text := self.decode_complete(content)) is not None:
            return DecodedText(text, 1)
        if self.stopped_by is not None:
            return DecodedText("", 0)
        start = self._decoded
        fresh = self._decoder.decode(content)
        self._decoded += len(fresh)
        incomplete = bool(self._decoder.getstate()[0])
        self._spans.append((start, self._decoded + incomplete))
        return self._release(self._held + fresh, final=False)

    def decode_complete(self, content: bytes) -> str | None:
        """Returns the text of one or more tokens if no text is held back before or after them, the usual case.

        Returns None, with the state unchanged, if text is or may have to be held back.
        """
        if self._stops or self._spans:
            return None
        try:
            return content.decode()
        except UnicodeDecodeError:
            return None

    def finish(self) -> DecodedText:
        """Releases all held text after the last token. An incomplete character becomes U+FFFD."""
        if self.stopped_by is not None:
            return DecodedText("", 0)
        fresh = self._decoder.decode(b"", True)
        self._decoded += len(fresh)
        return self._release(self._held + fresh, final=True)

    def _release(self, text: str, *, final: bool) -> DecodedText:
        if (found := self._first_stop(text)) is not None:
            at, self.stopped_by = found
            return DecodedText(text[:at], self._release_begun(self._decoded - len(text) + at))
        size = len(text) - (0 if final else partial_match_length(text, self._stops))
        self._held = text[size:]
        return DecodedText(text[:size], self._release_ended(self._decoded - len(self._held)))

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Returns the start of the stop string that is complete first, and that stop string. None if there is no
        match."""
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _release_ended(self, position: int) -> int:
        """Removes the tokens that end at or before character `position`. Returns the number of removed tokens."""
        count = bisect_right(self._spans, position, key=lambda span: span[1])
        del self._spans[:count]
        return count

    def _release_begun(self, position: int) -> int:
        """Removes all tokens. Returns the number of tokens that begin before character `position`."""
        spans, self._spans = self._spans, []
        return bisect_left(spans, position, key=lambda span: span[0])
