"""The requests without a slot, and the in-flight prefixes that these requests may share."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from heapq import heapify, heappop, heapreplace

from engine.fairness import QueueEntry, Rank, TokenCounters, rank
from engine.kv import KVCache, PrefixTree
from engine.scheduler import Hold, InFlightPrefix, WaitingView
from engine.sequence import Sequence


class Waiting:
    """The queue. Fair queueing orders the owners (`engine.fairness`); the requests of an owner are in the order of
    their priorities, deadlines and arrivals, of equal deadlines preempted ones first. Belongs to the engine thread."""

    def __init__(self, kv: KVCache, counters: TokenCounters) -> None:
        self._kv = kv
        self._counters = counters
        self._sequences: dict[int, Sequence] = {}
        self._queues: dict[str, list[QueueEntry]] = {}  # by owner, sorted, none empty
        self._entries: dict[int, QueueEntry] = {}
        self._holds: dict[int, Hold] = {}
        self._in_flight = PrefixTree()  # the tokens of the prefilling sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __getitem__(self, key: int) -> Sequence:
        return self._sequences[key]

    def put(self, sequence: Sequence) -> None:
        """Adds a new sequence, or one that yielded its slot to another owner."""
        self._insert(sequence, is_new=True)

    def put_first(self, sequence: Sequence) -> None:
        """Adds a preempted sequence, which resumes before others of its owner, priority and deadline."""
        self._insert(sequence, is_new=False)

    def _insert(self, sequence: Sequence, *, is_new: bool) -> None:
        entry = QueueEntry(sequence.request.priority, sequence.due, is_new, sequence.key)
        self._sequences[sequence.key], self._entries[sequence.key] = sequence, entry
        insort(self._queues.setdefault(sequence.request.owner, []), entry)

    def get(self, key: int) -> Sequence | None:
        """Returns the waiting sequence with this key. None if no such sequence waits."""
        return self._sequences.get(key)

    def discard(self, sequence: Sequence) -> None:
        """Removes `sequence` from the queue and from the in-flight prefixes. No effect where it is absent."""
        self.remove_in_flight(sequence)
        self._holds.pop(sequence.key, None)
        if self._sequences.pop(sequence.key, None) is None:
            return
        queue, entry = self._queues[sequence.request.owner], self._entries.pop(sequence.key)
        del queue[bisect_left(queue, entry)]
        if not queue:
            del self._queues[sequence.request.owner]

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

    @property
    def has_in_flight(self) -> bool:
        """True if there are in-flight prefixes."""
        return self._in_flight.cells > 0

    def remove_in_flight(self, sequence: Sequence) -> None:
        """Removes the tokens of `sequence` from the in-flight prefixes. No effect if they are absent."""
        if sequence.key in self._in_flight:
            self._in_flight.remove(sequence.key)

    # ── order ──

    def first(self, running: Mapping[int, Sequence]) -> Sequence:
        """Returns the first sequence of the queue, which may be held. Requires that a sequence waits."""
        return next(self._in_order(running))

    def _in_order(self, running: Mapping[int, Sequence]) -> Iterator[Sequence]:
        counts = Counter(sequence.request.owner for sequence in running.values())

        def place(owner: str, index: int) -> tuple[Rank, str, int]:
            entry = self._queues[owner][index]
            share = counts[owner] / self._sequences[entry.key].request.weight
            return rank(entry, share, self._counters[owner]), owner, index

        heap = [place(owner, 0) for owner in self._queues]
        heapify(heap)
        while heap:
            _, owner, index = heap[0]
            yield self._sequences[self._queues[owner][index].key]
            if index + 1 < len(self._queues[owner]):
                heapreplace(heap, place(owner, index + 1))
            else:
                heappop(heap)

    # ── views ──

    def views(self, running: Mapping[int, Sequence]) -> Iterator[WaitingView]:
        """Yields the scheduler's input for the sequences that are not held. Each view is made when it is needed,
        because it takes a match of the whole prompt.

        A hold ends once its tokens are in cells or its source no longer runs.
        """
        for sequence in self._in_order(running):
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
