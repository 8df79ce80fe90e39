"""Finds parts of a prompt that were computed at other positions or after other tokens (`--cache-reuse`)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.kv.allocation import BlockToLoad
from engine.kv.block import BLOCK_TOKENS, Block
from engine.kv.tree import common_length
from engine.splitmix import GOLDEN_GAMMA

# Moving a shorter run costs more than computing it.
MIN_RUN_TOKENS = 16
# `Donor.seq` of stored tokens that are not in cells.
NOT_RESIDENT = -1
# The base is odd, so that it has an inverse modulo 2^64.
HASH_BASE = np.uint64(GOLDEN_GAMMA)
HASH_INVERSE = np.uint64(pow(int(HASH_BASE), -1, 2**64))


class TokenRun(NamedTuple):
    """`size` equal tokens, at position `start` of the prompt and at position `donor_start` of the donor."""

    start: int
    donor_start: int
    size: int


class Donor(NamedTuple):
    """A sequence whose blocks are moved to other positions for a prompt."""

    seq: int
    """Id of the sequence, or `NOT_RESIDENT`."""
    tokens: array[int]
    runs: list[TokenRun]
    """Runs that the prompt has in common with this sequence."""

    @property
    def runs_span(self) -> tuple[int, int]:
        """The donor's positions from the first token of all runs up to the end of the last one. Requires a run."""
        return min(run.donor_start for run in self.runs), max(run.donor_start + run.size for run in self.runs)


def runs(new: array[int], old: array[int], start: int, min_tokens: int) -> list[TokenRun]:
    """Returns the runs of at least `min_tokens` tokens that `new`, from `start` on, has in common with `old`. The runs
    are in the order of `new` and do not overlap.

    The search is greedy: the first window of `min_tokens` tokens of `new` that is also in `old` is extended as far as
    both are equal, and the search continues after it. Windows are found by polynomial hashes (Karp and Rabin 1987), and
    their tokens are compared.
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
        size = common_length(old, new, at, source)
        if size >= min_tokens:
            found.append(TokenRun(at, source, size))
            end = at + size
    return found


def best_donor(new: array[int], start: int, min_tokens: int, candidates: Iterable[tuple[int, array[int]]]) -> Donor:
    """Returns the candidate that has most tokens in common with `new` from `start` on. Returns a donor without runs if
    no candidate has a run. A candidate is a sequence id and its tokens."""
    longest, best = 0, Donor(NOT_RESIDENT, array("i"), [])
    for seq, tokens in candidates:
        found = runs(new, tokens, start, min_tokens)
        if (size := sum(run.size for run in found)) > longest:
            longest, best = size, Donor(seq, tokens, found)
    return best


def moved_blocks(run: TokenRun, blocks: Mapping[int, Block]) -> list[BlockToLoad]:
    """Returns the donor's blocks that hold `run`, to be loaded at the positions of the prompt, up to the first missing
    block. The keys of `blocks` are their starts."""
    to_load: list[BlockToLoad] = []
    shift, end_of_run = run.start - run.donor_start, run.donor_start + run.size
    for start in range(run.donor_start // BLOCK_TOKENS * BLOCK_TOKENS, end_of_run, BLOCK_TOKENS):
        block = blocks.get(start)
        if block is None:
            break
        begin, end = max(start, run.donor_start), min(block.end, end_of_run)
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
