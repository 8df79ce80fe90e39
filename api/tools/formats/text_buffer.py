"""Incremental parsing of streamed text: generators that yield whenever they need more text.

A parser emits a result as soon as the text so far determines the result, and not earlier. Results therefore depend only
on the text, not on its division into tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from engine import partial_match_length

_Result = TypeVar("_Result")
# A parsing routine: a generator that yields when it needs more text, and returns its result.
Parse = Generator[None, None, _Result]
# A function that receives parsed text, each part as soon as later text cannot change its meaning.
TextSink = Callable[[str], object]

_OUTSIDE = {quotes: re.compile(rf"[{quotes}{{}}()\[\]]") for quotes in ('"', "\"'")}
_INSIDE = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}
_SCALAR_END = re.compile(r"[,\]})\s<]")


class TextBuffer:
    """The streamed text and a position in it. The markers or options of one method call must not contain each other."""

    def __init__(self) -> None:
        self._text = ""
        self._dropped = 0  # characters before `_text`
        self._position = 0
        self._marks: list[int] = []
        self.ended = False
        """True once the text is complete."""
        self.truncated = False
        """True if the text ends in the middle, so that the beginning of a marker at its end belongs to the marker."""
        self.completes_options = False
        """True if the beginning of an option at the end of the text counts as the option."""

    def feed(self, text: str) -> None:
        """Appends text and drops the text before the first mark."""
        start = min(self._marks, default=self._position)
        self._text = self._text[start:] + text
        self._dropped += start
        self._position -= start
        self._marks = [mark - start for mark in self._marks]

    @property
    def rest(self) -> str:
        """The text from the position to the end of the buffer."""
        return self._text[self._position :]

    @property
    def consumed(self) -> int:
        """Number of characters of the whole text before the position."""
        return self._dropped + self._position

    @property
    def decided(self) -> int:
        """Number of characters of the whole text before the first mark and the position."""
        return self._dropped + min(self._marks, default=self._position)

    def mark(self, before: int = 0) -> None:
        """Marks the position minus `before` characters. The routine must not have yielded since it passed them."""
        self._marks.append(self._position - before)

    def rewind(self) -> None:
        """Moves the position to the last mark and removes the mark."""
        self._position = self._marks.pop()

    def drop_mark(self) -> None:
        """Removes the last mark."""
        self._marks.pop()

    def clear_marks(self) -> None:
        """Removes all marks."""
        self._marks.clear()

    def advance(self, size: int) -> str:
        """Moves the position by `size` characters, which must be in the buffer, and returns them."""
        self._position += size
        return self._text[self._position - size : self._position]

    def until(self, markers: Sequence[str], sink: TextSink, *, texts: Sequence[str] = ()) -> Parse[str | None]:
        """Passes the text before the first marker to `sink`, moves behind the marker and returns the marker.

        Returns None if the text ends first. The beginning of a marker at the end of a truncated text is dropped, unless
        the marker is one of `texts`.
        """
        while True:
            rest = self.rest
            found = [(at, marker) for marker in markers if (at := rest.find(marker)) >= 0]
            if found:
                at, marker = min(found)
                if at:
                    sink(self.advance(at))
                self.advance(len(marker))
                return marker
            if self.ended:
                markers = [marker for marker in markers if marker not in texts] if self.truncated else ()
            held = partial_match_length(rest, markers)
            if size := len(rest) - held:
                sink(self.advance(size))
            if self.ended:
                self.advance(held)
                return None
            yield

    def collect(self, markers: Sequence[str]) -> Parse[tuple[str, str | None]]:
        """Returns the text before the first marker, and the marker. The marker is None if the text ends first."""
        parts: list[str] = []
        marker = yield from self.until(markers, parts.append)
        return "".join(parts), marker

    def peek(self, *options: str) -> Parse[str | None]:
        """Returns the option that follows after white space. Returns None if no option follows. The position stays.

        The beginning of an option at the end of the text counts as the option if `completes_options` is set.
        """
        while True:
            rest = self.rest.lstrip()
            for option in options:
                if rest.startswith(option):
                    return option
            begun = next((option for option in options if option.startswith(rest)), None)
            if self.ended:
                return begun if rest and self.completes_options else None
            if begun is None:
                return None
            yield

    def accept(self, *options: str) -> Parse[str | None]:
        """Returns the option that follows after white space, and moves behind the option. Returns None, without moving,
        if no option follows."""
        option = yield from self.peek(*options)
        if option is not None:
            self._skip_space()
            self.advance(min(len(option), len(self.rest)))
        return option

    def value(self, sink: TextSink, quotes: str = '"') -> Parse[bool]:
        """Passes the next JSON value, without preceding white space, to `sink` as it arrives. Returns False if the text
        ends before the value is complete.

        Brackets are only counted; the value is not validated. With both kinds of quotes in `quotes` the value is a
        Python literal or a bracketed expression.
        """
        while not self.rest.lstrip():
            if self.ended:
                return False
            yield
        self._skip_space()
        if self.rest[0] not in '{[("' and self.rest[0] not in quotes:
            return (yield from self._scalar(sink))
        scanner = _BracketScanner(quotes)
        while True:
            size = scanner.feed(self.rest)
            if size:
                sink(self.advance(size))
            if scanner.done or self.ended:
                return scanner.done
            yield

    def _skip_space(self) -> None:
        rest = self.rest
        self.advance(len(rest) - len(rest.lstrip()))

    def _scalar(self, sink: TextSink) -> Parse[bool]:
        parts: list[str] = []
        while True:
            end = _SCALAR_END.search(self.rest)
            parts.append(self.advance(end.start() if end else len(self.rest)))
            if end or self.ended:
                sink("".join(parts))
                return end is not None
            yield


class _BracketScanner:
    """Finds the end of a value that begins with a bracket or a quote."""

    def __init__(self, quotes: str) -> None:
        self._outside = _OUTSIDE[quotes]
        self._quote = ""  # the quote of the open string, empty outside strings
        self._escaped = False
        self._depth = 0
        self.done = False

    def feed(self, text: str) -> int:
        """Returns the number of leading characters of `text` that belong to the value."""
        at = 0
        while at < len(text) and not self.done:
            if self._escaped:
                self._escaped, at = False, at + 1
                continue
            found = (_INSIDE[self._quote] if self._quote else self._outside).search(text, at)
            if found is None:
                return len(text)
            at = found.end()
            self._step(found.group())
        return at

    def _step(self, char: str) -> None:
        if self._quote:
            self._escaped = char == "\\"
            self._quote = self._quote if self._escaped else ""
        elif char in "\"'":
            self._quote = char
        else:
            self._depth += 1 if char in "{[(" else -1
        self.done = not self._quote and self._depth <= 0
