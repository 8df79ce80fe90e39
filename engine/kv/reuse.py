"""Which parts of a prompt were computed before, at other positions or after other tokens (`--cache-reuse`)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.kv.allocation import BlockToLoad
from engine.kv.block import BLOCK_TOKENS, Block
from engine.kv.tree import common

# Tokens of a recurring part that is worth moving.
LEAST_RUN_TOKENS = 16
# Odd, so that it has an inverse modulo 2^64.
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)
HASH_INVERSE = np.uint64(pow(int(HASH_BASE), -1, 2**64))


class Run(NamedTuple):
    """`size` tokens that stand at position `new` of one sequence and at `old` of another."""

    new: int
    old: int
    size: int


class Donor(NamedTuple):
    """The sequence of which most can be reused: its id, -1 if it is not resident, its tokens, and the runs."""

    seq: int
    tokens: array[int]
    runs: list[Run]


def runs(new: array[int], old: array[int], start: int, least: int) -> list[Run]:
    """Runs of at least `least` tokens of `old` that `new` has from `start` on, in the order of `new`, without overlap.

    Greedy: at the first position of `new` where `least` tokens recur, the run is extended as far as it goes. Windows of
    `least` tokens are found by polynomial hashes (Karp and Rabin 1987) and compared.
    """
    found: list[Run] = []
    if len(new) - start < least or len(old) < least:
        return found
    known = {value: at for at, value in enumerate(_hashes(old, least).tolist())}
    hashes = _hashes(new, least)
    hits = start + np.flatnonzero(np.isin(hashes[start:], np.fromiter(known, np.uint64, len(known))))
    end = start
    for at in hits.tolist():
        if at < end:
            continue
        place = known[int(hashes[at])]
        size = common(old, new, at, place)
        if size >= least:
            found.append(Run(at, place, size))
            end = at + size
    return found


def best_donor(new: array[int], start: int, least: int, candidates: Iterable[tuple[int, array[int]]]) -> Donor:
    """Of `candidates`, ids with their tokens, the one that shares most of `new` from `start` on; without runs if none
    shares anything."""
    most, best = 0, Donor(-1, array("i"), [])
    for seq, tokens in candidates:
        found = runs(new, tokens, start, least)
        if (size := sum(run.size for run in found)) > most:
            most, best = size, Donor(seq, tokens, found)
    return best


def shifted(run: Run, blocks: Mapping[int, Block]) -> list[BlockToLoad]:
    """The blocks of the old sequence, given by their start, that hold `run`, to be loaded at its new positions, up to
    the first that is missing."""
    to_load: list[BlockToLoad] = []
    shift = run.new - run.old
    for start in range(run.old // BLOCK_TOKENS * BLOCK_TOKENS, run.old + run.size, BLOCK_TOKENS):
        block = blocks.get(start)
        if block is None:
            break
        begin, end = max(start, run.old), min(block.end, run.old + run.size)
        to_load.append(BlockToLoad(block, begin + shift, end + shift, shift))
    return to_load


def _hashes(tokens: array[int], width: int) -> NDArray[np.uint64]:
    """A hash of each window of `width` tokens."""
    values = np.frombuffer(tokens, np.int32).astype(np.uint64) + np.uint64(1)
    powers = np.cumprod(np.full(len(values), HASH_BASE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])
    inverses = np.cumprod(np.full(len(values), HASH_INVERSE))
    hashes: NDArray[np.uint64] = (sums[width:] - sums[:-width]) * inverses[: len(values) - width + 1]
    return hashes
