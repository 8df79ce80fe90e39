"""Search for parts of a prompt that were computed at other positions or after other tokens (`--cache-reuse`)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.kv.allocation import BlockToLoad
from engine.kv.block import BLOCK_TOKENS, Block
from engine.kv.tree import common
from engine.splitmix import GOLDEN_GAMMA

# Shorter runs are not worth moving.
MIN_RUN_TOKENS = 16
# Odd, so that it has an inverse modulo 2^64.
HASH_BASE = np.uint64(GOLDEN_GAMMA)
HASH_INVERSE = np.uint64(pow(int(HASH_BASE), -1, 2**64))


class TokenRun(NamedTuple):
    """`size` equal tokens, at position `new` of one sequence and `old` of another."""

    new: int
    old: int
    size: int


class Donor(NamedTuple):
    """The sequence with most tokens to reuse: its id, -1 if it is not resident, its tokens, and the runs."""

    seq: int
    tokens: array[int]
    runs: list[TokenRun]


def runs(new: array[int], old: array[int], start: int, min_tokens: int) -> list[TokenRun]:
    """Returns the runs of at least `min_tokens` tokens that `new`, from `start` on, has in common with `old`, in the
    order of `new` and without overlap.

    Greedy: the first `min_tokens` tokens of `new` that recur are extended as far as they are equal. Windows of
    `min_tokens` tokens are found by polynomial hashes (Karp and Rabin 1987) and compared.
    """
    found: list[TokenRun] = []
    if len(new) - start < min_tokens or len(old) < min_tokens:
        return found
    known = {value: at for at, value in enumerate(_hashes(old, min_tokens).tolist())}
    hashes = _hashes(new, min_tokens)
    hits = start + np.flatnonzero(np.isin(hashes[start:], np.fromiter(known, np.uint64, len(known))))
    end = start
    for at in hits.tolist():
        if at < end:
            continue
        source = known[int(hashes[at])]
        size = common(old, new, at, source)
        if size >= min_tokens:
            found.append(TokenRun(at, source, size))
            end = at + size
    return found


def best_donor(new: array[int], start: int, min_tokens: int, candidates: Iterable[tuple[int, array[int]]]) -> Donor:
    """Returns the candidate (id and tokens) with most tokens of `new` from `start` on; a donor without runs if none has
    any."""
    longest, best = 0, Donor(-1, array("i"), [])
    for seq, tokens in candidates:
        found = runs(new, tokens, start, min_tokens)
        if (size := sum(run.size for run in found)) > longest:
            longest, best = size, Donor(seq, tokens, found)
    return best


def shifted(run: TokenRun, blocks: Mapping[int, Block]) -> list[BlockToLoad]:
    """Returns the blocks of the old sequence that hold `run`, to be loaded at its new positions, up to the first
    missing one. `blocks` are by their start."""
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
    """Returns a hash of each window of `width` tokens."""
    values = np.frombuffer(tokens, np.int32).astype(np.uint64) + np.uint64(1)
    powers = np.cumprod(np.full(len(values), HASH_BASE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])
    inverses = np.cumprod(np.full(len(values), HASH_INVERSE))
    hashes: NDArray[np.uint64] = (sums[width:] - sums[:-width]) * inverses[: len(values) - width + 1]
    return hashes
