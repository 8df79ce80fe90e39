"""Text as it comes, read by generators that wait for more of it by `yield`.

Nothing here looks at how the text was cut into pieces: a reader decides something as soon as the text so far decides
it, whatever follows, and not before. That is what makes a stream the same however tokens were grouped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A part of the reading, which yields when it needs more text and returns what it found."""
Tell = Callable[[str], object]
"""Gets text as soon as it is certain."""

_OUTSIDE = {quotes: re.compile(rf"[{quotes}{{}}()\[\]]") for quotes in ('"', "\"'")}
_INSIDE = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}
_SCALAR_END = re.compile(r"[,\]})\s<]")


def open_tail(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a marker, without being one.

    >>> open_tail("a <tool", ["<tool_call>", "<think>"])
    5
    """
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0


class Source:
    """The text that was not read yet. Of several markers or options that are asked for together, none begins or
    holds another."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._marks: list[int] = []
        self.ended = False
        """Whether no more text comes."""

    def feed(self, text: str) -> None:
        """Adds text."""
        start = min(self._marks, default=self._at)
        self._text = self._text[start:] + text
        self._at -= start
        self._marks = [mark - start for mark in self._marks]

    @property
    def rest(self) -> str:
        """What is there and was not read."""
        return self._text[self._at :]

    def mark(self, before: int = 0) -> None:
        """Remembers the place, or one so many characters before it; nothing was waited for since these."""
        self._marks.append(self._at - before)

    def rewind(self) -> None:
        """Goes back to the last mark, which is forgotten."""
        self._at = self._marks.pop()

    def drop(self) -> None:
        """Nobody will go back to the last mark."""
        self._marks.pop()

    def forget(self) -> None:
        """Nobody will go back to any mark."""
        self._marks.clear()

    def skip(self, size: int) -> str:
        """Reads so many characters, which are there."""
        self._at += size
        return self._text[self._at - size : self._at]

    def until(self, markers: Sequence[str], tell: Tell) -> Reading[str | None]:
        """Tells the text before the first marker, reads the marker too and returns it; None at the end of the text."""
        while True:
            rest = self.rest
            found = [(at, marker) for marker in markers if (at := rest.find(marker)) >= 0]
            if found:
                at, marker = min(found)
                if at:
                    tell(self.skip(at))
                self.skip(len(marker))
                return marker
            size = len(rest) - (0 if self.ended else open_tail(rest, markers))
            if size:
                tell(self.skip(size))
            if self.ended:
                return None
            yield

    def collect(self, markers: Sequence[str]) -> Reading[tuple[str, str | None]]:
        """The text before the first marker, and the marker; None at the end of the text."""
        parts: list[str] = []
        marker = yield from self.until(markers, parts.append)
        return "".join(parts), marker

    def sees(self, *options: str) -> Reading[str | None]:
        """Which option comes next, after white space; None if none does. Reads nothing."""
        while True:
            rest = self.rest.lstrip()
            for option in options:
                if rest.startswith(option):
                    return option
            if self.ended or (rest and not any(option.startswith(rest) for option in options)):
                return None
            yield

    def takes(self, *options: str) -> Reading[str | None]:
        """The same, but white space and option are read if there is one."""
        option = yield from self.sees(*options)
        if option is not None:
            rest = self.rest
            self.skip(len(rest) - len(rest.lstrip()) + len(option))
        return option

    def value(self, tell: Tell, quotes: str = '"') -> Reading[bool]:
        """Tells the next JSON value as it comes, without white space before it; whether it came to its end.

        Brackets are only counted, whether the value is right is for others. With `quotes` of both kinds it is a
        Python literal, or whatever brackets hold.
        """
        while not self.rest.lstrip():
            if self.ended:
                return False
            yield
        rest = self.rest
        self.skip(len(rest) - len(rest.lstrip()))
        if self.rest[0] not in '{[("' and self.rest[0] not in quotes:
            return (yield from self._scalar(tell))
        scan = _Scan(quotes)
        while True:
            size = scan.feed(self.rest)
            if size:
                tell(self.skip(size))
            if scan.done or self.ended:
                return scan.done
            yield

    def _scalar(self, tell: Tell) -> Reading[bool]:
        parts: list[str] = []
        while True:
            end = _SCALAR_END.search(self.rest)
            parts.append(self.skip(end.start() if end else len(self.rest)))
            if end or self.ended:
                tell("".join(parts))
                return end is not None
            yield


class _Scan:
    """Finds the end of a value that begins with a bracket or a quote."""

    def __init__(self, quotes: str) -> None:
        self._outside = _OUTSIDE[quotes]
        self._quote = ""  # inside a text, its kind
        self._escaped = False
        self._depth = 0
        self.done = False

    def feed(self, text: str) -> int:
        """How much of `text` still belongs to it."""
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

    def _step(self, sign: str) -> None:
        if self._quote:
            self._escaped = sign == "\\"
            self._quote = self._quote if self._escaped else ""
        elif sign in "\"'":
            self._quote = sign
        else:
            self._depth += 1 if sign in "{[(" else -1
        self.done = not self._quote and self._depth <= 0
