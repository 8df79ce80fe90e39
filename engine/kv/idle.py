"""Idle sequences in LRU order, and the ski-rental rule for their eviction."""

from __future__ import annotations

from collections.abc import Container, KeysView
from typing import NamedTuple

# Steps for which an idle sequence is kept while the cost of keeping it is unknown.
UNPRICED_STEPS = 512
# Steps that will probably follow before the sequence is used again. The rule counts their cost in advance.
_UPCOMING_STEPS = 32


class Use(NamedTuple):
    """The last use of a sequence: the number of its step, and the seconds that keeping one cell had cost up to it."""

    step: int
    cell_seconds: float


class Idle:
    """Sequences in the context without a running request, least recently used first."""

    def __init__(self) -> None:
        self._uses: dict[int, Use] = {}
        self._step = 0
        self._cell_seconds = 0.0  # seconds that one resident cell has cost in all steps so far
        self.cell_seconds_per_step = 0.0
        """Seconds by which one resident cell lengthens a step; 0 if unknown."""

    def __contains__(self, seq: int) -> bool:
        return seq in self._uses

    def __len__(self) -> int:
        return len(self._uses)

    @property
    def sequences(self) -> KeysView[int]:
        """The ids of all idle sequences, as a set."""
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

    def count_step(self) -> None:
        """Counts a step and the cost of keeping a cell for it."""
        self._step += 1
        self._cell_seconds += self.cell_seconds_per_step

    def eviction_due(self, restore_seconds: float) -> bool:
        """Returns True if the least recently used sequence should be evicted. `restore_seconds` is the cost of
        restoring one cell.

        Ski-rental rule: evict once the cost of keeping the cells exceeds the cost of restoring them; at most twice the
        optimum. Only steps add cost, so an idle engine keeps every sequence.
        """
        if not self._uses:
            return False
        use = next(iter(self._uses.values()))
        if not restore_seconds or not (self.cell_seconds_per_step or self._cell_seconds):
            return self._step - use.step > UNPRICED_STEPS
        kept_seconds = self._cell_seconds - use.cell_seconds
        return kept_seconds + _UPCOMING_STEPS * self.cell_seconds_per_step > restore_seconds
