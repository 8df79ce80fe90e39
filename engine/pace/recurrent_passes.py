"""Computes the passes of one decode with recurrent states, and the rollbacks that these passes make impossible.

llama.cpp's `split_equal` (`llama-batch.cpp`) puts the same number of rows of each sequence into a pass. Where the
library keeps snapshots of states, it also keeps the last rows of a sequence, `tail` in number, in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class RecurrentPass(NamedTuple):
    """One pass: `rows` rows of each of the sequences with the ids `seqs`."""

    seqs: tuple[int, ...]
    rows: int


def recurrent_passes(
    rows: Iterable[tuple[int, int]], ubatch: int, tail: int, *, consecutive: bool
) -> list[RecurrentPass]:
    """Returns the passes of a decode, in their order. `rows` has id and number of rows of each sequence, in the order
    of the batch. With `consecutive`, as with per-slot KV, a pass takes consecutive ascending ids only."""
    left, found = dict(rows), list[RecurrentPass]()
    while left:
        seqs = _first_sequences(left, ubatch, consecutive=consecutive)
        each = min(min(left[seq] for seq in seqs), max(1, ubatch // len(seqs)))
        if tail:
            seqs, each = _keep_tails(seqs, each, left, ubatch, tail)
        found.append(RecurrentPass(tuple(seqs), each))
        for seq in seqs:
            left[seq] -= each
            if not left[seq]:
                del left[seq]
    return found


def _first_sequences(left: Iterable[int], ubatch: int, *, consecutive: bool) -> list[int]:
    seqs: list[int] = []
    for seq in left:
        if not (consecutive and seqs and seq != seqs[-1] + 1):
            seqs.append(seq)
            if len(seqs) > ubatch:
                break
    return seqs


def _keep_tails(seqs: list[int], each: int, left: dict[int, int], ubatch: int, tail: int) -> tuple[list[int], int]:
    """Returns the sequences of a pass, and the rows of each, after those are left out of which fewer than `tail` rows
    would remain."""
    broken = [0 < left[seq] - each < tail for seq in seqs]
    if not broken[0]:
        return (seqs[: broken.index(True)] if True in broken else seqs), each
    rest = left[seqs[0]]
    return seqs[:1], rest if rest <= ubatch else rest - tail


def lost_rollbacks(passes: Sequence[RecurrentPass]) -> set[int]:
    """Returns the ids of sequences whose snapshots may be lost when the decode ends: a later pass of several sequences
    can move the state of a sequence, but does not move its snapshots."""
    done, lost = set[int](), set[int]()
    for each in passes:
        if len(each.seqs) > 1:
            lost |= done
        lost.difference_update(each.seqs)
        done.update(each.seqs)
    return lost
