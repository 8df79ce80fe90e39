"""Sequences that no request runs, and what keeping them has cost."""

from __future__ import annotations

from collections.abc import KeysView
from typing import NamedTuple

IDLE_STEPS = 512
"""Steps for which an idle sequence is kept while it is not known what that costs."""


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

    def age(self, rent: float) -> None:
        """Counts a step, in which every resident cell cost `rent` seconds; 0 if that is not known."""
        self._step += 1
        self._rent += rent

    def due(self, price: float) -> bool:
        """Whether keeping the oldest has cost as much as `price` seconds for each cell, for which it can be had again.

        Renting is then beyond the price of buying; nobody who does not know the future can be sure to do better than
        twice the best. No step, no cost: an engine at rest keeps all.
        """
        if not self._uses:
            return False
        use = next(iter(self._uses.values()))
        if not self._rent or not price:
            return self._step - use.step > IDLE_STEPS
        return self._rent - use.rent > price
