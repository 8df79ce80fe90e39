"""Which parts of a prompt were computed before, at other places or after other texts."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.memory.lease import Coming
from engine.memory.pieces import PIECE, Piece
from engine.memory.radix import RadixTree, common
from engine.memory.store import TEXTS, Store

LEAST = 16
"""Tokens of a part of a changed prompt that is worth moving."""
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that it has an inverse modulo 2^64."""
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))


class Run(NamedTuple):
    """`size` tokens that stand at position `new` of one text and at `old` of another."""

    new: int
    old: int
    size: int


def runs(new: array[int], old: array[int], start: int, least: int) -> list[Run]:
    """Runs of at least `least` tokens of `old` that `new` has from `start` on, in the order of `new`, none overlapping.

    Greedy: the first place of `new` from which so many recur is taken as far as they do. Windows of `least` tokens are
    found by polynomial hashes (Karp and Rabin 1987) and compared.
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


class Likest(NamedTuple):
    """The text of which most can be had: the sequence that holds it, -1 if none does, and its runs."""

    seq: int
    text: array[int]
    runs: list[Run]


def likest(new: array[int], salt: str, start: int, least: int, tree: RadixTree, store: Store, but: int) -> Likest:
    """Of the texts of this salt that are resident, `but` excepted, or were stored lately, the one of which most of
    `new` from `start` on can be had; without runs if there is none."""
    latest = islice((seq for seq in tree.sequences(salt) if seq != but), TEXTS)
    texts = [(seq, tree.tokens(seq)) for seq in latest]
    texts += [(-1, text) for text in store.latest(new, salt)]
    most, best = 0, Likest(-1, array("i"), [])
    for seq, text in texts:
        found = runs(new, text, start, least)
        if (size := sum(run.size for run in found)) > most:
            most, best = size, Likest(seq, text, found)
    return best


def moved(run: Run, pieces: Mapping[int, Piece]) -> list[Coming]:
    """The pieces of the old text, by their start, that hold `run`, to be loaded where the new text has it, up to the
    first that is missing."""
    coming: list[Coming] = []
    shift = run.new - run.old
    for start in range(run.old // PIECE * PIECE, run.old + run.size, PIECE):
        piece = pieces.get(start)
        if piece is None:
            break
        begin, end = max(start, run.old), min(piece.end, run.old + run.size)
        coming.append(Coming(piece, begin + shift, end + shift, shift))
    return coming


def _hashes(tokens: array[int], width: int) -> NDArray[np.uint64]:
    """A hash of each window of `width` tokens."""
    values = np.frombuffer(tokens, np.int32).astype(np.uint64) + np.uint64(1)
    powers = np.cumprod(np.full(len(values), BASE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])
    inverses = np.cumprod(np.full(len(values), INVERSE))
    hashes: NDArray[np.uint64] = (sums[width:] - sums[:-width]) * inverses[: len(values) - width + 1]
    return hashes
