"""Hashes of token histories, from which the simulated model draws its output.

A hash is the state of a linear congruential generator (Knuth's MMIX). The increment of each step is the next token plus
1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.splitmix import WORD_MASK

Hashes = NDArray[np.uint64]

# Multiplier of Knuth's MMIX generator.
HISTORY_FACTOR = 6364136223846793005
_INVERSE_FACTOR = pow(HISTORY_FACTOR, -1, 2**64)
# Second multiplier of SplitMix64's finalizer.
DRAW_FACTOR = 0x94D049BB133111EB


def next_hash(history: int, token: int) -> int:
    """Returns the hash of a history plus `token`. `history` is the hash of the history."""
    return (history * HISTORY_FACTOR + token + 1) & WORD_MASK


def draws(hashes: Hashes) -> NDArray[np.intp]:
    """Returns a pseudorandom number in [0, 2^24) for each hash."""
    mixed = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(DRAW_FACTOR)
    return (mixed >> np.uint64(40)).astype(np.intp)


def history_hashes(tokens: NDArray[np.int32], hashes: Sequence[int], counts: Sequence[int]) -> Hashes:
    """Returns the hash after each of `tokens`: the next `counts[i]` tokens, at least one, of each history i with hash
    `hashes[i]`.

    Modulo 2^64 and divided by the power of the factor with the index of the token, hashes are running sums.
    """
    size, firsts = 1 << len(tokens).bit_length(), np.cumsum(counts) - counts
    inverses = _powers(_INVERSE_FACTOR, size)
    parts = (tokens.astype(np.uint64) + np.uint64(1)) * inverses[: len(tokens)]
    sums = parts.cumsum()
    starts = np.array(hashes, np.uint64) * np.uint64(HISTORY_FACTOR) * inverses[firsts] - (sums - parts)[firsts]
    found: Hashes = _powers(HISTORY_FACTOR, size)[: len(tokens)] * (sums + np.repeat(starts, counts))
    return found


@lru_cache(64)
def _powers(factor: int, count: int) -> Hashes:
    """Returns the first `count` powers of `factor` modulo 2^64, from 1 on, as a read-only array."""
    powers = np.full(count, factor, np.uint64)
    powers[0] = 1
    return powers.cumprod()
