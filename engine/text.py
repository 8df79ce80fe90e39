"""From the bytes of tokens to text: UTF-8 across tokens, and stop strings held back."""

from __future__ import annotations

import codecs
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

# Returns the bytes of a token.
TokenBytes: TypeAlias = Callable[[int], bytes]


def with_control_texts(control_texts: Sequence[tuple[int, str]], token_bytes: TokenBytes) -> TokenBytes:
    """Returns `token_bytes` with the given texts as the bytes of the given tokens."""
    if not control_texts:
        return token_bytes
    contents = {token: text.encode() for token, text in control_texts}
    return lambda token: contents[token] if token in contents else token_bytes(token)


def partial_match_length(text: str, markers: Sequence[str]) -> int:
    """Returns the length of the longest end of `text` that may become a marker: it begins one and is shorter.

    >>> partial_match_length("a <tool", ["<tool_call>", "<think>"])
    5
    """
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0


class DecodedText(NamedTuple):
    """The output that one call of a `Detokenizer` released."""

    text: str
    tokens: int
    """Number of tokens that are released, in whole or in part, since the previous call."""


class Detokenizer:
    """Decodes the bytes of tokens and holds back only text that may still change.

    Held back are the bytes of an incomplete UTF-8 character and the longest end of the text that may become a stop
    string. The stop string that is complete first matches, the longest of those that end at one character; it and all
    text after it are never released. The released text depends only on the bytes, not on the boundaries of tokens. A
    token is released once all of its characters are, so the tokens of a stop string are never released.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        # Characters decoded, released or held, since text last had to be held.
        self._decoded = 0
        # For each token that is not released the range of its characters, including shared ones.
        self._spans: list[tuple[int, int]] = []
        self.stopped_by: str | None = None

    def feed(self, content: bytes) -> DecodedText:
        """Adds the bytes of one token and returns the released text. After a stop string nothing is released.

        >>> detokenizer = Detokenizer(stops=("END",))
        >>> detokenizer.feed("é".encode()[:1]).text, detokenizer.feed("é".encode()[1:] + b" E").text
        ('', 'é ')
        >>> detokenizer.feed(b"NDless").text, detokenizer.stopped_by
        ('', 'END')
        """
        if (text := self.whole(content)) is not None:
            return DecodedText(text, 1)
        if self.stopped_by is not None:
            return DecodedText("", 0)
        start = self._decoded
        fresh = self._decoder.decode(content)
        self._decoded += len(fresh)
        incomplete = bool(self._decoder.getstate()[0])
        self._spans.append((start, self._decoded + incomplete))
        return self._release(self._held + fresh, final=False)

    def whole(self, content: bytes) -> str | None:
        """Returns the text of several tokens if nothing is held back before or after them, the usual case.

        Otherwise returns None and adds nothing.
        """
        if self._stops or self._spans:
            return None
        try:
            return content.decode()
        except UnicodeDecodeError:
            return None

    def finish(self) -> DecodedText:
        """Releases the rest after the last token. An incomplete character becomes U+FFFD."""
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
        """Returns the start of the first complete stop string, and the stop string."""
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _release_ended(self, position: int) -> int:
        """Removes the tokens that end at or before character `position`. Returns their number."""
        count = bisect_right(self._spans, position, key=lambda span: span[1])
        del self._spans[:count]
        return count

    def _release_begun(self, position: int) -> int:
        """Removes all tokens. Returns the number of those that begin before character `position`."""
        spans, self._spans = self._spans, []
        return bisect_left(spans, position, key=lambda span: span[0])
