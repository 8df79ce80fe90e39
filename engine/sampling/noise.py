"""Keyed Gumbel noise: randomness that is a pure function of a seed, a position and a token.

The law of a pick at temperature T over the candidates that truncation left:

    pick = argmax over token of logit[token] / T + gumbel(seed, position, token)

By the Gumbel-max trick (Gumbel 1954) that is an exact draw from softmax(logit / T), and nothing was consumed by
it: a retry, a resumption, another batch or a draft in between cannot change it, and a draft model that picks with
the same noise often agrees (Daliri, Musco, Suresh 2024). `position` is the number of tokens before the one picked.

Bits come from SplitMix64 (Steele, Lea, Flood 2014), a counter-based generator: seed and position are hashed, one
after the other, to the start of a stream, and a token is the index of its number there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

REACH = 40.0
"""More than the noise spans (from -3.6 to 35.4): a token whose logit / T is this far below the best is never picked."""

_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_CHOICES = 0x2545F4914F6CDD1D  # sets the seeds of choices apart from the streams of positions
_CHUNK = 8192  # temporaries of more than 64 KiB cost more to map than to compute


def gumbel(seed: int, position: int, tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    """Standard Gumbel noise, [tokens]; entry i depends on nothing but the seed, the position and token i."""
    start = np.uint64(_start(seed, position))
    if len(tokens) <= _CHUNK:
        return _gumbel(start, tokens)
    chunks = range(0, len(tokens), _CHUNK)
    return np.concatenate([_gumbel(start, tokens[at : at + _CHUNK]) for at in chunks])


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A number in (0, 1) beside the tokens' own: streams count down from 2^64 - 1, where no token id is."""
    bits = _finalize(_start(seed, position) + (_WORD - stream) * _GOLDEN & _WORD)
    return ((bits >> 14) + 0.5) * 2.0**-50


def derive(seed: int, index: int) -> int:
    """The seed, below 2^63, of choice `index` of a request: choice 0 keeps the request's own."""
    return _mix(_mix(seed ^ _CHOICES) + index) >> 1 if index else seed


def _start(seed: int, position: int) -> int:
    return _mix(_mix(seed) + position)


def _mix(value: int) -> int:
    return _finalize(value + _GOLDEN & _WORD)


def _finalize(bits: int) -> int:
    bits = (bits ^ bits >> 30) * _FIRST & _WORD
    bits = (bits ^ bits >> 27) * _SECOND & _WORD
    return bits ^ bits >> 31


_U_GOLDEN, _U_FIRST, _U_SECOND = map(np.uint64, (_GOLDEN, _FIRST, _SECOND))
_U14, _U27, _U30, _U31 = map(np.uint64, (14, 27, 30, 31))


def _gumbel(start: np.uint64, tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    bits = tokens.astype(np.uint64)
    bits *= _U_GOLDEN
    bits += start
    bits ^= bits >> _U30
    bits *= _U_FIRST
    bits ^= bits >> _U27
    bits *= _U_SECOND
    bits ^= bits >> _U31
    bits >>= _U14
    # 50 bits and a half: never 0, never 1, and no further apart than REACH after two logarithms.
    noise = bits.astype(np.float64)
    noise += 0.5
    noise *= 2.0**-50
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)
