"""Keyed Gumbel noise: pseudorandom numbers that are a pure function of a seed, a position and a token.

At temperature T the picked token, among the candidates that remain after truncation, is

    argmax over token of logit[token] / T + gumbel(seed, position, token)

By the Gumbel-max trick (Gumbel 1954) the pick is an exact draw from softmax(logit / T). There is no generator state, so
a retry, a preemption, another batch or a draft cannot change a pick. A draft model that uses the same noise often picks
the same token (Daliri, Musco, Suresh 2024). `position` is the number of tokens before the picked one.

The random bits are those of SplitMix64: the start of a stream is a mix of seed and position, and the token id is the
index in the stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.splitmix import GOLDEN_GAMMA, WORD_MASK, finalize, finalize_array, mix

# The noise is between -3.6 and 35.4, so a token whose logit / T is this far below the maximum is never picked.
NOISE_SPAN = 40.0

# Makes the seeds of choices differ from the starts of streams.
_CHOICE_KEY = 0x2545F4914F6CDD1D
# Tokens of one chunk, so that temporary arrays have at most 64 KiB: mapping larger ones takes longer than computing.
_CHUNK_TOKENS = 8192
_U14 = np.uint64(14)
_GOLDEN_GAMMA_U64 = np.uint64(GOLDEN_GAMMA)


def gumbel(seed: int, position: int, tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    """Returns standard Gumbel noise, [tokens]; entry i depends only on the seed, the position and token i."""
    start = np.uint64(_stream_start(seed_key(seed), position))
    if len(tokens) <= _CHUNK_TOKENS:
        return _gumbel(start, tokens)
    chunks = range(0, len(tokens), _CHUNK_TOKENS)
    return np.concatenate([_gumbel(start, tokens[at : at + _CHUNK_TOKENS]) for at in chunks])


def seed_key(seed: int) -> int:
    """Returns the part of the noise that depends on the seed only."""
    return mix(seed)


def gumbel_rows(keys: Sequence[int], positions: Sequence[int], tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    """Returns the noise of `tokens`, [rows, tokens], given `seed_key` of the seed and the position of each row."""
    starts = [_stream_start(key, position) for key, position in zip(keys, positions, strict=True)]
    return _gumbel(np.array(starts, np.uint64)[:, None], tokens)


def gumbel_few(key: int, position: int, tokens: Sequence[int]) -> list[float]:
    """Returns the noise of few tokens in less time than `gumbel`, with other rounding errors. `key` is `seed_key` of
    the seed."""
    start = _stream_start(key, position)
    uniforms = [((finalize(token * GOLDEN_GAMMA + start & WORD_MASK) >> 14) + 0.5) * 2.0**-50 for token in tokens]
    return [-math.log(-math.log(each)) for each in uniforms]


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """Returns a uniform number in (0, 1) that is independent of the noise of all tokens.

    Each value of `stream` gives an independent number.
    """
    bits = finalize(_stream_start(seed_key(seed), position) + (WORD_MASK - stream) * GOLDEN_GAMMA & WORD_MASK)
    return ((bits >> 14) + 0.5) * 2.0**-50


def derive_seed(seed: int, index: int) -> int:
    """Returns the seed of choice `index` of a request, below 2^63. For choice 0 it is the request's own seed."""
    return mix(mix(seed ^ _CHOICE_KEY) + index) >> 1 if index else seed


def _stream_start(key: int, position: int) -> int:
    return mix(key + position)


def _gumbel(start: np.uint64 | NDArray[np.uint64], tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    bits = tokens.astype(np.uint64)
    bits *= _GOLDEN_GAMMA_U64
    bits += start
    finalize_array(bits)
    bits >>= _U14
    # (bits + 0.5) / 2^50 is never 0 or 1, and after two logarithms its range is smaller than NOISE_SPAN.
    noise = bits.astype(np.float64)
    noise += 0.5
    noise *= 2.0**-50
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)
