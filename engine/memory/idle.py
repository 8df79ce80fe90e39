"""Sequences that no request runs, and what keeping them has cost."""

from __future__ import annotations

from collections.abc import KeysView
from typing import NamedTuple

IDLE_STEPS = 512
"""Steps for which an idle sequence is kept while it is not known what that costs."""
AHEAD = 32
"""Steps that are likely to follow whatever is asked: what they will cost counts as if it had been paid."""


class Use(NamedTuple):
    """When a sequence was last of use: the step, and the rent that a cell had cost until then."""

    step: int
    rent: float


class Idle:
    """The idle sequences, the longest unused first."""

    def __init__(self) -> None:
        self._uses: dict[int, Use] = {}
        self._step = 0
        self._rent = 0.0
        self.rate = 0.0
        """Seconds by which a resident cell makes the next step dearer; 0 if that is not known."""

    def __contains__(self, seq: int) -> bool:
        return seq in self._uses

    def __len__(self) -> int:
        return len(self._uses)

    @property
    def sequences(self) -> KeysView[int]:
        """All of them, as a set."""
        return self._uses.keys()

    def oldest(self, but: int = -1) -> int:
        """The longest unused one other than `but`. There is one."""
        return next(seq for seq in self._uses if seq != but)

    def use(self, seq: int) -> None:
        """Adds `seq`, or marks it as of use just now."""
        self._uses.pop(seq, None)
        self._uses[seq] = Use(self._step, self._rent)

    def remove(self, seq: int) -> None:
        """Takes `seq` out."""
        del self._uses[seq]

    def age(self) -> None:
        """Counts a step."""
        self._step += 1
        self._rent += self.rate

    def due(self, price: float) -> bool:
        """Whether keeping the oldest has cost, or is about to, as much as `price` seconds for each cell, for which it
        can be had again.

        Renting is then beyond the price of buying; nobody who does not know the future can be sure to do better than
        twice the best. No step, no cost: an engine at rest keeps all.
        """
        if not self._uses:
            return False
        use = next(iter(self._uses.values()))
        if not price or not (self.rate or self._rent):
            return self._step - use.step > IDLE_STEPS
        return self._rent - use.rent + AHEAD * self.rate > price
