"""SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that flips half of the bits for any change."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD_MASK = 2**64 - 1
# 2^64 divided by the golden ratio, odd: the generator's increment.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15

_FIRST_FACTOR = 0xBF58476D1CE4E5B9
_SECOND_FACTOR = 0x94D049BB133111EB
# Converted to numpy once, because a conversion costs more than an operation on a short array.
_FIRST_FACTOR_U64, _SECOND_FACTOR_U64 = map(np.uint64, (_FIRST_FACTOR, _SECOND_FACTOR))
_27, _30, _31 = map(np.uint64, (27, 30, 31))


def finalize(bits: int) -> int:
    """Returns the value of SplitMix64's finaliser for `bits`, 0 to 2^64 - 1."""
    bits = (bits ^ bits >> 30) * _FIRST_FACTOR & WORD_MASK
    bits = (bits ^ bits >> 27) * _SECOND_FACTOR & WORD_MASK
    return bits ^ bits >> 31


def finalize_array(bits: NDArray[np.uint64]) -> None:
    """Replaces each element of `bits` by `finalize` of it, in place."""
    bits ^= bits >> _30
    bits *= _FIRST_FACTOR_U64
    bits ^= bits >> _27
    bits *= _SECOND_FACTOR_U64
    bits ^= bits >> _31


def mix(value: int) -> int:
    """Returns the first output of the generator with the seed `value`."""
    return finalize(value + GOLDEN_GAMMA & WORD_MASK)
