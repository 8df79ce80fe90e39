"""Chooses the alternatives that a step verifies: second tokens at one place of a draft. Pure functions.

If the draft's token at that place is wrong and the alternative is right, the step yields one token more. With shared
noise the alternative is right in 0.36 to 0.5 of these cases (Qwen2.5-Coder 0.5B for 1.5B, chat, T = 0 to 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, log1p
from typing import NamedTuple

from engine.pace.curve import Seconds
from engine.pace.lengths import Chances

# Seconds of an alternative besides those of its row: ids and mask in the library, the choice and the pick.
ALTERNATIVE_SECONDS = 60e-6
# Weight of older observations at each new one.
_DECAY = 0.99
# The initial chance that an alternative is right if the draft's token is wrong, and its weight in observations.
_PRIOR_CHANCE, _PRIOR_WEIGHT = 0.25, 8.0


class SecondChance:
    """Chance, learned from every draft, that an alternative is right if the draft's token at its place is wrong."""

    def __init__(self) -> None:
        self._observed = _PRIOR_WEIGHT
        self._right = _PRIOR_WEIGHT * _PRIOR_CHANCE

    @property
    def chance(self) -> float:
        """The current estimate."""
        return self._right / self._observed

    def observe(self, *, right: bool) -> None:
        """Records an alternative at the first place at which its draft was wrong."""
        self._observed = _DECAY * self._observed + 1.0
        self._right = _DECAY * self._right + right


class AlternativeOption(NamedTuple):
    """A place of a chosen draft at which an alternative can be verified."""

    place: int
    gain: float
    """Expected number of further accepted tokens."""
    tokens: float
    """Expected number of tokens that the step yields for the sequence without the alternative."""

    @property
    def worth(self) -> float:
        """The logarithm of the factor by which the alternative raises the speed of its sequence."""
        return log1p(self.gain / self.tokens)


def best_place(curve: Chances, second_choices: Sequence[int], chance: float) -> AlternativeOption | None:
    """Returns the place at which a draft is most likely to end, among those with a second choice; -1 is none.

    `curve` has the chances of the tokens that are verified, each that it and all before it are accepted, and `chance`
    is that of the alternative if the token is wrong. None if there is no such place.
    """
    pairs = enumerate(zip((1.0, *curve), curve, strict=False))
    ends = [(before - after, -i) for i, (before, after) in pairs if second_choices[i] >= 0]
    if not ends:
        return None
    end, place = max(ends)
    return AlternativeOption(-place, end * chance, 1.0 + sum(curve))


def choose_options(
    options: Sequence[AlternativeOption | None], seconds: Seconds, sequences: float, most: int
) -> list[int]:
    """Returns the indices of the options to verify, at most `most`, so that the product of all speeds is greatest.

    `seconds[k]` is the cost of the step with `k` alternatives, and `sequences` is the number of sequences in it.
    """
    worths = {i: option.worth for i, option in enumerate(options) if option is not None}
    order = sorted(worths, key=lambda i: -worths[i])[: max(0, min(most, len(seconds) - 1))]
    best, best_count, worth = 0.0, 0, 0.0
    for count, i in enumerate(order, 1):
        worth += worths[i]
        total = worth - sequences * log((seconds[count] + count * ALTERNATIVE_SECONDS) / seconds[0])
        if total > best:
            best, best_count = total, count
    return order[:best_count]
