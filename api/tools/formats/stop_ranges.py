"""The scope of stop strings in a message that may contain tool calls."""

from __future__ import annotations

from collections.abc import Sequence

from api.tools.formats.base import MessageParser
from engine import TextRange


class StopRanges(MessageParser):
    """A `StopScope`: stop strings apply to content and reasoning with its tags, but not inside of tool calls.

    OpenAI's models write calls outside of the text, so stop strings never cut their calls. The white space around calls
    belongs to the calls.
    """

    _found: list[TextRange]
    _space: TextRange | None = None  # white space that a call may follow

    @property
    def decided(self) -> int:
        """Number of leading characters of the output that are decided."""
        decided = self.buffer.decided
        return decided if self._space is None else min(decided, self._space[0])

    def ranges(self, text: str, *, final: bool) -> Sequence[TextRange]:
        """Appends `text` to the message. Returns the ranges to which stop strings apply, except those returned
        before."""
        self._found = []
        self.feed(text)
        if final:
            self.finish()
            if not self.num_calls:
                self._end_space()
        return self._found

    # ── called by formats ──

    def content(self, text: str) -> None:
        """Adds the range of the content that ends at the buffer's position, and earlier white space before it."""
        end = self.buffer.consumed
        start, after = end - len(text), end - len(text) + len(text.rstrip())
        if start < after:
            self._end_space()
            self._found.append((start, after))
            start = after
        if start < end:
            self._space = (self._space[0] if self._space and self._space[1] == start else start, end)

    def reasoning(self, text: str) -> None:
        """Adds the range of the reasoning that ends at the buffer's position."""
        if text:
            self._end_space()
            self._found.append((self.buffer.consumed - len(text), self.buffer.consumed))

    def reasoning_tag(self, text: str) -> None:
        """Adds the range of the tag that ends at the buffer's position."""
        self.reasoning(text)

    def begin_call(self, name: str, id: str = "") -> None:
        """Drops the white space before the call."""
        self._space = None
        super().begin_call(name, id)

    def _end_space(self) -> None:
        if self._space is not None:
            self._found.append(self._space)
            self._space = None
