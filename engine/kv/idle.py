"""Idle sequences in LRU order, and the cost of keeping them."""

from __future__ import annotations

from collections.abc import Container, KeysView
from typing import NamedTuple

# Steps for which an idle sequence is kept while the cost of keeping it is unknown.
UNPRICED_STEPS = 512
# Steps that are likely to follow in any case; their cost counts as already paid.
_UPCOMING_STEPS = 32


class Use(NamedTuple):
    """The last use of a sequence: the step, and the cost of keeping one cell from the first step until then."""

    step: int
    cell_seconds: float


class Idle:
    """Sequences in the context without a running request, least recently used first."""

    def __init__(self) -> None:
        self._uses: dict[int, Use] = {}
        self._step = 0
        self._cell_seconds = 0.0
        self.rate = 0.0
        """Seconds by which one resident cell lengthens the next step; 0 if that is unknown."""

    def __contains__(self, seq: int) -> bool:
        return seq in self._uses

    def __len__(self) -> int:
        return len(self._uses)

    @property
    def sequences(self) -> KeysView[int]:
        """All idle sequences, as a set."""
        return self._uses.keys()

    def oldest(self, but: Container[int] = ()) -> int:
        """Returns the least recently used sequence that is not in `but`. Raises StopIteration if there is none."""
        return next(seq for seq in self._uses if seq not in but)

    def age(self, seq: int) -> int:
        """Returns the number of steps since the last use of `seq`."""
        return self._step - self._uses[seq].step

    def use(self, seq: int) -> None:
        """Adds `seq`, or marks it as used now."""
        self._uses.pop(seq, None)
        self._uses[seq] = Use(self._step, self._cell_seconds)

    def remove(self, seq: int) -> None:
        """Removes `seq`."""
        del self._uses[seq]

    def step(self) -> None:
        """Counts a step."""
        self._step += 1
        self._cell_seconds += self.rate

    def due(self, price: float) -> bool:
        """True if the least recently used sequence should be evicted, where restoring one of its cells costs `price`
        seconds.

        Ski-rental rule: evict once the cost of keeping the cells exceeds the cost of restoring them; at most twice the
        optimum. Steps alone cause cost, so an idle engine keeps every sequence.
        """
        if not self._uses:
            return False
        use = next(iter(self._uses.values()))
        if not price or not (self.rate or self._cell_seconds):
            return self._step - use.step > UNPRICED_STEPS
        return self._cell_seconds - use.cell_seconds + _UPCOMING_STEPS * self.rate > price
