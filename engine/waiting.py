"""Who waits for a slot, and whose prompts are being read that others wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from engine.memory import Cells, RadixTree
from engine.scheduler import HOLD_BACK, WaitingView
from engine.streams import Stream

AGAIN = 4
"""Tokens at the end of a prompt that are computed again when it comes back, by a model that keeps one state for all of
a text: the last one always is, and templates often end with some that the next turn spells otherwise."""


class Waiting:
    """The streams that wait, the first to come first, and the prompts that running streams have promised to read."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._queue: deque[Stream] = deque()
        self._promises = RadixTree()
        self._readers: dict[int, Stream] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._queue)

    def put(self, stream: Stream) -> None:
        """Adds a stream at the end."""
        self._queue.append(stream)

    def put_first(self, stream: Stream) -> None:
        """Adds one that was retracted: it starts again before all others."""
        self._queue.appendleft(stream)

    def get(self, key: int) -> Stream | None:
        """The stream of that key, if it waits."""
        return next((stream for stream in self._queue if stream.key == key), None)

    def take(self, key: int) -> Stream:
        """Takes out the stream of that key, which waits."""
        stream = self.get(key)
        assert stream is not None, "it waits"
        self._queue.remove(stream)
        return stream

    def discard(self, stream: Stream) -> None:
        """Takes `stream` out if it waits."""
        if stream in self._queue:
            self._queue.remove(stream)

    def promise(self, stream: Stream) -> None:
        """`stream` runs and will have all its tokens in cells soon; if they are more than one."""
        if stream.behind > 1:
            self._readers[stream.key] = stream
            self._promises.begin(stream.key, stream.request.salt)
            self._promises.extend(stream.key, stream.tokens)
            if not self._cells.context.partial and len(stream.tokens) > HOLD_BACK:
                stream.held.stop_at(len(stream.tokens) - AGAIN)

    def unpromise(self, stream: Stream) -> None:
        """Nobody need wait for the prompt of `stream` any more: it was read, or will not be."""
        if self._readers.pop(stream.key, None) is not None:
            self._promises.remove(stream.key)

    def _stopped(self, stream: Stream) -> bool:
        """Whether what `stream` shares with the prompt that is being read will be saved on the way."""
        reader = self._readers.get(stream.waits_for)
        return reader is not None and stream.promised >= HOLD_BACK and reader.held.stop_at(stream.promised)

    def views(self) -> Iterator[WaitingView]:
        """What the policy may know of those who wait, one by one: what is not looked at costs nothing."""
        return map(self._view, self._queue)

    def _view(self, stream: Stream) -> WaitingView:
        known, salt = len(stream.tokens), stream.request.salt
        reader = self._readers.get(stream.waits_for)
        if reader is not None and reader.held.length < stream.promised:
            return WaitingView(stream.key, known, 0, 0, stream.promised)
        found = self._cells.find(stream.tokens, salt)
        stream.waits_for, stream.promised = self._promises.match(stream.tokens[:-1], salt)
        if not self._cells.context.partial and not self._stopped(stream):
            stream.promised = 0
        return WaitingView(stream.key, known, found.length, found.idle, stream.promised, found.reach)
