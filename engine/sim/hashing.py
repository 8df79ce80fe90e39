"""Hashes of token histories, from which the simulated model draws its output.

A hash is the state of a linear congruential generator (Knuth's MMIX). The increment of each step is the next token plus
1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.splitmix import WORD_MASK

Hashes = NDArray[np.uint64]

# Multiplier of Knuth's MMIX generator.
HISTORY_FACTOR = 6364136223846793005
# Second multiplier of SplitMix64's finalizer.
DRAW_FACTOR = 0x94D049BB133111EB


def next_hash(history: int, token: int) -> int:
    """Returns the hash of a history plus `token`. `history` is the hash of the history."""
    return (history * HISTORY_FACTOR + token + 1) & WORD_MASK


def draws(hashes: Hashes) -> NDArray[np.intp]:
    """Returns a pseudorandom number in [0, 2^24) for each hash."""
    mixed = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(DRAW_FACTOR)
    return (mixed >> np.uint64(40)).astype(np.intp)
