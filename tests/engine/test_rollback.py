"""Passes of steps with recurrent states, and the drafts that these passes permit."""

from __future__ import annotations

from random import Random

import pytest

from engine.pace import Curve, DraftChooser, Layout, StepCost, StepShape, UpcomingStep
from engine.pace.passes import SequenceRows
from engine.pace.recurrent_passes import RecurrentPass, lost_rollbacks
from engine.rollback import in_order, with_rollbacks
from engine.scheduler import ScheduledRows

UNIFIED = Layout(True, 64, False, recurrent=True, max_rollback=8)
PER_SLOT = UNIFIED._replace(unified=False)


def passes_of(layout: Layout, *rows: tuple[int, int]) -> list[tuple[tuple[int, ...], int]]:
    return [(each.seqs, each.rows) for each in layout.recurrent_passes([SequenceRows(*part) for part in rows])]


def test_passes_are_those_of_the_library() -> None:
    assert passes_of(UNIFIED, (0, 1), (7, 1), (3, 5), (4, 5)) == [((0, 7), 1), ((3, 4), 5)]
    assert passes_of(UNIFIED, (0, 5), (1, 1), (2, 3)) == [((0,), 5), ((1,), 1), ((2,), 3)], "tails stay together"
    assert passes_of(UNIFIED, (0, 1), (1, 60)) == [((0, 1), 1), ((1,), 59)]
    assert passes_of(UNIFIED, (0, 70)) == [((0,), 61), ((0,), 9)], "the last nine rows are in one pass"
    assert passes_of(UNIFIED._replace(max_rollback=0), (0, 1), (1, 3)) == [((0, 1), 1), ((1,), 2)]
    assert passes_of(PER_SLOT, (0, 1), (2, 1), (3, 1)) == [((0,), 1), ((2, 3), 1)]
    assert UNIFIED.shape([SequenceRows(0, 5), SequenceRows(1), SequenceRows(2)], 100) == StepShape((2, 5), 700)
    assert PER_SLOT.shape([SequenceRows(0, 5, 10), SequenceRows(1, 1, 20)]) == StepShape((1, 5), 70)


def test_a_later_pass_of_several_sequences_loses_snapshots() -> None:
    passes = [RecurrentPass((0,), 3), RecurrentPass((1, 2), 4), RecurrentPass((3,), 8)]
    assert lost_rollbacks(passes) == {0}
    assert lost_rollbacks([*passes, RecurrentPass((0, 3), 1)]) == {1, 2}


def test_drafts_get_a_common_length_only_if_rollbacks_would_be_lost() -> None:
    seqs = {key: key for key in range(6)}

    def drafts(*lengths: int) -> dict[int, int]:
        rows = [ScheduledRows(key, 1, length) for key, length in enumerate(lengths)]
        return {part.key: part.drafts for part in with_rollbacks(rows, seqs, UNIFIED)}

    assert drafts(0, 0, 3, 5) == {0: 0, 1: 0, 2: 3, 3: 5}
    assert drafts(0, 0, 5, 5) == {0: 0, 1: 0, 2: 5, 3: 5}
    assert drafts(2, 2, 5, 5) == {0: 0, 1: 0, 2: 5, 3: 5}
    assert drafts(4, 4, 5, 5) == {0: 4, 1: 4, 2: 4, 3: 4}
    prompts = [ScheduledRows(4, 40), ScheduledRows(5, 30), ScheduledRows(0, 1, 3)]
    assert [part.drafts for part in with_rollbacks(prompts, seqs, UNIFIED)] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_no_rollback_is_lost(seed: int) -> None:
    random = Random(seed)
    for _ in range(100):
        layout = random.choice([UNIFIED, PER_SLOT])._replace(ubatch=random.choice([10, 64]))
        seqs = dict(enumerate(random.sample(range(20), random.randint(1, 8))))
        rows = [ScheduledRows(key, random.choice([1, 1, 1, 30]), 0) for key in seqs]
        rows = [ScheduledRows(p.key, p.tokens, random.choice([0, 2, 5, 8]) * (p.tokens == 1)) for p in rows]
        placed = with_rollbacks(rows, seqs, layout)
        assert [part.key for part in placed] == [part.key for part in in_order(placed, seqs)]
        passes = layout.recurrent_passes(SequenceRows(seqs[p.key], p.tokens + p.drafts) for p in placed)
        assert not lost_rollbacks(passes) & {seqs[part.key] for part in placed if part.drafts}
        computed = {seq: sum(each.rows for each in passes if seq in each.seqs) for seq in seqs.values()}
        assert computed == {seqs[part.key]: part.tokens + part.drafts for part in placed}


def test_drafts_of_equal_length_share_a_pass_whatever_the_ids() -> None:
    """A pass of 12 rows costs 1.5 times as much as one of 3, a second pass as much as the first."""
    cost = StepCost(Curve({1: 1.0, 3: 1.0, 12: 1.5, 64: 4.0}), UNIFIED)
    step = UpcomingStep(tuple(SequenceRows(seq) for seq in (0, 5, 9)), 3.0, 100, 64)
    likely = [0.9, 0.8, 0.7, 0.6]
    every = DraftChooser(cost).choose([[likely]] * 3, [0, 5, 9], step)
    assert len(set(every.lengths)) == 1
    assert every.lengths[0] > 0
    assert DraftChooser(cost).choose([[likely[:1]]], [5], step).lengths == [0], "a pass of its own does not pay"
