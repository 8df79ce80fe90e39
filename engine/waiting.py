"""The requests without a slot, and the in-flight prefixes that they may share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from engine.kv import KVCache, PrefixTree
from engine.scheduler import Hold, InFlight, WaitingView
from engine.sequence import Sequence


class Waiting:
    """The waiting sequences in the order of their arrival, preempted ones first. Belongs to the engine thread."""

    def __init__(self, kv: KVCache) -> None:
        self._kv = kv
        self._queue: deque[Sequence] = deque()
        self._holds: dict[int, Hold] = {}
        self._in_flight = PrefixTree()  # tokens of the prefilling sequences, by key

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def put(self, sequence: Sequence) -> None:
        """Adds a sequence at the end."""
        self._queue.append(sequence)

    def put_first(self, sequence: Sequence) -> None:
        """Adds a preempted sequence at the front."""
        self._queue.appendleft(sequence)

    def get(self, key: int) -> Sequence | None:
        """Returns the waiting sequence of that key; None if there is none."""
        return next((sequence for sequence in self._queue if sequence.key == key), None)

    def discard(self, sequence: Sequence) -> None:
        """Removes `sequence` from the queue, if it is there, and from the in-flight prefixes."""
        self.prefilled(sequence)
        self._holds.pop(sequence.key, None)
        if sequence in self._queue:
            self._queue.remove(sequence)

    def hold(self, holds: Iterable[Hold]) -> None:
        """Records holds; held requests have no view until their hold ends."""
        for hold in holds:
            self._holds[hold.key] = hold

    def unhold(self, on: int) -> None:
        """Ends the holds on the preempted sequence `on`, which may come back without the prefix."""
        for key in [key for key, hold in self._holds.items() if hold.on == on]:
            del self._holds[key]
            if (sequence := self.get(key)) is not None:
                sequence.match = None

    # ── in-flight prefixes ──

    def prefilling(self, sequence: Sequence) -> None:
        """Adds the tokens of `sequence`, which has started, to the in-flight prefixes if it is to be prefilled."""
        if sequence.num_uncomputed > 1:
            self._in_flight.begin(sequence.key, sequence.request.salt)
            self._in_flight.extend(sequence.key, sequence.tokens)

    def prefilled(self, sequence: Sequence) -> None:
        """Removes the tokens of `sequence` from the in-flight prefixes. No effect if they are not among them."""
        if sequence.key in self._in_flight:
            self._in_flight.remove(sequence.key)

    # ── views ──

    def views(self, running: Mapping[int, Sequence]) -> Iterator[WaitingView]:
        """Yields the scheduler's input for sequences that are not held. Views are made lazily, as each takes a match.

        A hold ends once its rows are computed or its sequence no longer runs.
        """
        for sequence in self._queue:
            hold = self._holds.get(sequence.key)
            on = running.get(hold.on) if hold is not None else None
            if hold is not None and on is not None and on.computed < hold.length:
                continue
            if hold is not None:
                del self._holds[sequence.key]
                sequence.match = None  # the match lacks the rows that the hold was for
            yield self._view(sequence, running)

    def _view(self, sequence: Sequence, running: Mapping[int, Sequence]) -> WaitingView:
        tokens, salt = sequence.tokens, sequence.request.salt
        sequence.match = match = self._kv.match(tokens, salt, sequence.match)
        key, length = self._in_flight.match(match.matchable, salt)
        in_flight = None
        if key in running:
            in_flight = InFlight(key, length, self._kv.can_share_at(running[key].seq, length))
        return WaitingView(sequence.key, len(tokens), match.length, match.idle, match.reach, in_flight)
