"""The requests without a slot, and the in-flight prefixes that these requests may share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from engine.kv import KVCache, PrefixTree
from engine.scheduler import Hold, InFlightPrefix, WaitingView
from engine.sequence import Sequence


class Waiting:
    """The queue: waiting sequences in the order of their arrival, preempted ones first. `put` and `put_first` define
    the order. Belongs to the engine thread."""

    def __init__(self, kv: KVCache) -> None:
        self._kv = kv
        self._queue: deque[Sequence] = deque()
        self._holds: dict[int, Hold] = {}
        self._in_flight = PrefixTree()  # the tokens of the prefilling sequences

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
        """Returns the waiting sequence with this key. None if no such sequence waits."""
        return next((sequence for sequence in self._queue if sequence.key == key), None)

    def discard(self, sequence: Sequence) -> None:
        """Removes `sequence` from the queue and from the in-flight prefixes. No effect where it is absent."""
        self.remove_in_flight(sequence)
        self._holds.pop(sequence.key, None)
        if sequence in self._queue:
            self._queue.remove(sequence)

    def hold(self, holds: Iterable[Hold]) -> None:
        """Records holds. `views` leaves out held requests until their holds end."""
        for hold in holds:
            self._holds[hold.key] = hold

    def unhold(self, source: int) -> None:
        """Ends the holds on the preempted sequence with key `source`, which may later resume without the prefix."""
        for key in [key for key, hold in self._holds.items() if hold.source == source]:
            del self._holds[key]
            if (sequence := self.get(key)) is not None:
                sequence.match = None

    # ── in-flight prefixes ──

    def add_in_flight(self, sequence: Sequence) -> None:
        """Adds the tokens of the started `sequence` to the in-flight prefixes, if it must be prefilled."""
        if sequence.num_uncomputed > 1:
            self._in_flight.begin(sequence.key, sequence.salt)
            self._in_flight.extend(sequence.key, sequence.tokens)

    def remove_in_flight(self, sequence: Sequence) -> None:
        """Removes the tokens of `sequence` from the in-flight prefixes. No effect if they are absent."""
        if sequence.key in self._in_flight:
            self._in_flight.remove(sequence.key)

    # ── views ──

    def views(self, running: Mapping[int, Sequence]) -> Iterator[WaitingView]:
        """Yields the scheduler's input for the sequences that are not held. Each view is made when it is needed,
        because it takes a match of the whole prompt.

        A hold ends once its tokens are in cells or its source no longer runs.
        """
        for sequence in self._queue:
            hold = self._holds.get(sequence.key)
            source = running.get(hold.source) if hold is not None else None
            if hold is not None and source is not None and source.computed < hold.length:
                continue
            if hold is not None:
                del self._holds[sequence.key]
                sequence.match = None  # the match is older than the tokens that the hold was for
            yield self._view(sequence, running)

    def _view(self, sequence: Sequence, running: Mapping[int, Sequence]) -> WaitingView:
        tokens, salt = sequence.tokens, sequence.salt
        sequence.match = match = self._kv.match(tokens, salt, sequence.match)
        key, length = self._in_flight.match(match.matchable, salt)
        in_flight = None
        if key in running:
            in_flight = InFlightPrefix(key, length, self._kv.can_share_at(running[key].seq, length))
        return WaitingView(sequence.key, len(tokens), match.length, match.idle_cells, match.known_length, in_flight)
