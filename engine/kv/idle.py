"""Idle sequences in LRU order, and what keeping them has cost."""

from __future__ import annotations

from collections.abc import Container, KeysView
from typing import NamedTuple

# Steps for which an idle sequence is kept while the cost of keeping it is unknown.
UNPRICED_STEPS = 512
# Steps that are likely to follow in any case: their cost counts as if it had been paid.
EXPECTED_STEPS = 32


class Use(NamedTuple):
    """The last use of a sequence: the step, and the sum of all rents per cell until then."""

    step: int
    rent: float


class Idle:
    """The sequences that stay in the context without a running request, least recently used first."""

    def __init__(self) -> None:
        self._uses: dict[int, Use] = {}
        self._step = 0
        self._rent = 0.0
        self.rate = 0.0
        """Seconds by which one resident cell lengthens the next step; 0 if that is unknown."""

    def __contains__(self, seq: int) -> bool:
        return seq in self._uses

    def __len__(self) -> int:
        return len(self._uses)

    @property
    def sequences(self) -> KeysView[int]:
        """All of them, as a set."""
        return self._uses.keys()

    def oldest(self, but: Container[int] = ()) -> int:
        """The least recently used one that is not in `but`. There is one."""
        return next(seq for seq in self._uses if seq not in but)

    def age(self, seq: int) -> int:
        """Steps since the last use of `seq`."""
        return self._step - self._uses[seq].step

    def use(self, seq: int) -> None:
        """Adds `seq`, or marks it as used now."""
        self._uses.pop(seq, None)
        self._uses[seq] = Use(self._step, self._rent)

    def remove(self, seq: int) -> None:
        """Removes `seq`."""
        del self._uses[seq]

    def step(self) -> None:
        """Counts a step."""
        self._step += 1
        self._rent += self.rate

    def due(self, price: float) -> bool:
        """True if the least recently used sequence should be evicted, where restoring one of its cells costs `price`
        seconds.

        Ski-rental rule: evict once the cost of keeping the cells exceeds the cost of restoring them; at most twice the
        optimum. Without steps there is no cost, so an idle engine keeps everything.
        """
        if not self._uses:
            return False
        use = next(iter(self._uses.values()))
        if not price or not (self.rate or self._rent):
            return self._step - use.step > UNPRICED_STEPS
        return self._rent - use.rent + EXPECTED_STEPS * self.rate > price
