"""What one step has to tell its readers, handed to the event loop in a single call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.contract import Failed, Finished, Logprob, Reading


class News(NamedTuple):
    """New tokens of one stream, how far its prompt is read, or its terminal update."""

    key: int
    ids: Sequence[int]
    logprobs: Sequence[Logprob]
    other: Finished | Failed | Reading | None


class Outbox:
    """Collects on the engine thread; `deliver` runs on the event loop, once for each flush."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[News]], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._items: list[News] = []

    def tokens(self, key: int, ids: Sequence[int], logprobs: Sequence[Logprob]) -> None:
        """Adds tokens of a stream."""
        self._items.append(News(key, ids, logprobs, None))

    def reading(self, key: int, reading: Reading | None) -> None:
        """Adds how far a stream's prompt is read, if that is to be told."""
        if reading is not None:
            self._items.append(News(key, (), (), reading))

    def end(self, key: int, end: Finished | Failed) -> None:
        """Adds the one terminal update of a stream."""
        self._items.append(News(key, (), (), end))

    def flush(self) -> None:
        """Hands everything over. A loop that has closed has no readers left."""
        if not self._items:
            return
        items, self._items = self._items, []
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, items)
