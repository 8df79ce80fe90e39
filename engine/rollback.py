"""The drafts of a step after which each sequence can be rolled back, for models with recurrent states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import structs

from engine.pace import Layout, SequenceRows
from engine.pace.recurrent_passes import lost_rollbacks
from engine.scheduler import ScheduledRows


def with_rollbacks(rows: Iterable[ScheduledRows], seqs: Mapping[int, int], layout: Layout) -> list[ScheduledRows]:
    """Returns `rows`, in the order of the batch, with such drafts that each sequence with a draft can be rolled back.

    `seqs` has the sequence id of each key. If the passes of the step would lose the snapshots of a sequence, all drafts
    get the length with the most draft tokens in all; drafts for which that does not suffice are dropped.
    """
    placed, equal = in_order(rows, seqs), False
    while lost := _lost_drafts(placed, seqs, layout):
        if equal:
            placed = [structs.replace(part, drafts=0) if part.key in lost else part for part in placed]
        else:
            length = _common_length([part.drafts for part in placed])
            placed = [structs.replace(part, drafts=length if part.drafts >= length else 0) for part in placed]
        placed, equal = in_order(placed, seqs), True
    return placed


def in_order(rows: Iterable[ScheduledRows], seqs: Mapping[int, int]) -> list[ScheduledRows]:
    """Returns `rows` in the order with the fewest passes: by number of rows, then by sequence id."""
    return sorted(rows, key=lambda part: (part.tokens + part.drafts, seqs[part.key]))


def _lost_drafts(placed: Iterable[ScheduledRows], seqs: Mapping[int, int], layout: Layout) -> set[int]:
    """Returns the keys of the sequences with drafts that cannot be rolled back after the step."""
    passes = layout.recurrent_passes([SequenceRows(seqs[part.key], part.tokens + part.drafts) for part in placed])
    lost = lost_rollbacks(passes)
    return {part.key for part in placed if part.drafts and seqs[part.key] in lost}


def _common_length(lengths: list[int]) -> int:
    """Returns the length with the most tokens in all, if longer drafts are cut to it and shorter ones dropped."""
    return max(filter(None, lengths), key=lambda length: length * sum(each >= length for each in lengths))
