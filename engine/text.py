"""Bytes of tokens in, text that may be shown out."""

from __future__ import annotations

import codecs
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

Piece = Callable[[int], bytes]
"""Gives a token's bytes."""


def spelling(spelled: Sequence[tuple[int, str]], piece: Piece) -> Piece:
    """`piece`, but for the tokens in `spelled` their texts."""
    if not spelled:
        return piece
    texts = {token: text.encode() for token, text in spelled}
    return lambda token: texts[token] if token in texts else piece(token)


class Shown(NamedTuple):
    """What one `feed` released: text, and how many tokens are now out in whole or in part."""

    text: str
    tokens: int


class TextStream:
    """Turns pieces of tokens into text, holding back only what could still change.

    Held back are the bytes of an unfinished UTF-8 character and the longest end of the text that may yet become
    a stop string. The stop string that is complete first wins, the longest of those that end at one place; it and all
    after it are never shown. What is shown depends on the bytes alone, not on how they are cut into pieces.
    A token is out once all of its characters are, so the tokens that make up a stop string never are.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self._decoded = 0  # characters so far, shown or held, since something last had to be held
        self._spans: list[tuple[int, int]] = []  # of each token that is not out: its characters, shared ones included
        self.stopped_by: str | None = None

    def feed(self, piece: bytes) -> Shown:
        """Adds one token's bytes. After a stop string was found nothing more is ever shown.

        >>> stream = TextStream(stops=("END",))
        >>> stream.feed("é".encode()[:1]).text, stream.feed("é".encode()[1:] + b" E").text
        ('', 'é ')
        >>> stream.feed(b"NDless").text, stream.stopped_by
        ('', 'END')
        """
        if (text := self.whole(piece)) is not None:
            return Shown(text, 1)
        if self.stopped_by is not None:
            return Shown("", 0)
        start = self._decoded
        fresh = self._decoder.decode(piece)
        self._decoded += len(fresh)
        unfinished = bool(self._decoder.getstate()[0])
        self._spans.append((start, self._decoded + unfinished))
        return self._release(self._held + fresh, final=False)

    def whole(self, pieces: bytes) -> str | None:
        """The text of several tokens, if nothing is held back before or after them, as is usual; else None, and nothing
        was added."""
        if self._stops or self._spans:
            return None
        try:
            return pieces.decode()
        except UnicodeDecodeError:
            return None

    def finish(self) -> Shown:
        """The rest, when no more tokens come; a character cut short shows as U+FFFD."""
        if self.stopped_by is not None:
            return Shown("", 0)
        fresh = self._decoder.decode(b"", True)
        self._decoded += len(fresh)
        return self._release(self._held + fresh, final=True)

    def _release(self, text: str, *, final: bool) -> Shown:
        if (found := self._first_stop(text)) is not None:
            at, self.stopped_by = found
            return Shown(text[:at], self._began_before(self._decoded - len(text) + at))
        size = len(text) - (0 if final else self._open_tail(text))
        self._held = text[size:]
        return Shown(text[:size], self._ended_by(self._decoded - len(self._held)))

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _open_tail(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0

    def _ended_by(self, shown: int) -> int:
        """Counts the tokens that end within the first `shown` characters, and forgets them."""
        out = bisect_right(self._spans, shown, key=lambda span: span[1])
        del self._spans[:out]
        return out

    def _began_before(self, shown: int) -> int:
        """Counts the tokens of which at least one character was shown, and forgets all."""
        spans, self._spans = self._spans, []
        return bisect_left(spans, shown, key=lambda span: span[0])
