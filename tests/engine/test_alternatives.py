"""The choice of alternatives, and the paths of drafts with one."""

from __future__ import annotations

import numpy as np
import pytest

from engine.batch import AlternativeRow, Batch
from engine.pace import AlternativeOption, DraftChooser, SecondChance, SequenceRows, StepCost, UpcomingStep, best_place
from engine.pace.alternatives import ALTERNATIVE_SECONDS, choose_options
from engine.sampling import UNPICKED
from engine.sim.costs import flat, linear
from engine.speculate import Draft, DraftBounds, DraftCandidate, LastStep, SequenceProposers
from engine.speculate.planner import DraftPlanner
from engine.speculate.sampled_draft import SampledDraft
from engine.verify import followed_path
from tests.engine.test_sequence_proposers import FixedDraft


def test_the_place_is_that_at_which_the_draft_most_likely_ends() -> None:
    option = best_place([0.9, 0.4, 0.3], [5, 6, 7], 0.5)
    assert option is not None
    assert option == pytest.approx((1, 0.25, 2.6))
    assert best_place([0.9, 0.4], [5, -1], 0.5) == pytest.approx((0, 0.05, 2.3))
    assert best_place([0.9, 0.4], [-1, -1], 0.5) is None
    equal = best_place([0.5, 0.0], [5, 6], 0.5)
    assert equal is not None
    assert equal.place == 0, "of equal places the first"


def chosen(pass_seconds: object, sequences: int, most: int = 8, gain: float = 0.17) -> int:
    """Returns the number of alternatives in a step of `sequences` sequences with two draft tokens each."""
    rows = 3 * sequences
    seconds = np.array([pass_seconds(rows + count) for count in range(most + 1)])  # type: ignore[operator]
    options = [AlternativeOption(0, gain, 2.0)] * sequences
    return len(choose_options(options, seconds, sequences, most))


def test_alternatives_are_verified_where_rows_are_nearly_free() -> None:
    assert [chosen(flat, sequences) for sequences in (1, 4, 8)] == [1, 4, 8]
    assert [chosen(linear, sequences) for sequences in (1, 4, 8)] == [0, 0, 0]
    assert chosen(flat, 1, gain=0.001) == 0
    assert chosen(flat, 4, most=2) == 2
    assert chosen(lambda rows: ALTERNATIVE_SECONDS, 1) == 0, "the library and Python take time too"


def test_the_chooser_bounds_alternatives_by_rows_and_trials() -> None:
    cost = StepCost()
    for rows in (1, 64):
        cost.curve.put(rows, flat(rows))
    chooser, option = DraftChooser(cost), AlternativeOption(1, 0.2, 2.0)
    step = UpcomingStep((SequenceRows(0), SequenceRows(1)), 2, 0, max_more_rows=5, max_alternatives=8)
    assert chooser.choose_alternatives([option, None], 4, step) == [0]
    assert chooser.choose_alternatives([option, option], 4, step) == [0]
    assert chooser.choose_alternatives([option, option], 5, step) == []
    assert chooser.choose_alternatives([option], 0, step._replace(max_alternatives=0)) == []


def test_the_chance_of_second_choices_is_learned() -> None:
    second = SecondChance()
    prior = second.chance
    for number in range(200):
        second.observe(right=number % 2 == 0)
    assert prior < 0.45 < second.chance < 0.55


def test_the_path_is_that_of_the_picked_token() -> None:
    draft = (5, 6, 7, 9)  # 9 instead of 6
    assert followed_path(draft, 1, [5, 9, 1, 2, 3]) == ((5, 9), (5, 9, 3))
    assert followed_path(draft, 1, [5, 6, 7, 2, 3]) == ((5, 6, 7), [5, 6, 7, 2])
    assert followed_path(draft, 1, [5, 9, 1, 2, UNPICKED]) == ((5, 6, 7), [5, 9, 1, 2]), "its row is not sampled"


class DraftOfTwo(FixedDraft):
    """Proposes two tokens, each with a second choice."""

    def propose(self, limit: int) -> Draft:
        return Draft((1, 2), (), (3, 4)).cut(limit)


@pytest.mark.parametrize(("max_more_rows", "places"), [(7, [-1, -1]), (8, [-1, 0])])
def test_alternatives_leave_the_rows_of_drafts_with_a_fixed_order(max_more_rows: int, places: list[int]) -> None:
    cost = StepCost()
    for rows in (1, 64):
        cost.curve.put(rows, flat(rows))
    fixed = SequenceProposers({"suffix": FixedDraft([9] * 5)}, fixed=True)
    candidates = [
        DraftCandidate(fixed, 8, 8, 0),
        DraftCandidate(SequenceProposers({"suffix": DraftOfTwo([])}), 8, 8, 1, branches=True),
    ]
    step = UpcomingStep((SequenceRows(0), SequenceRows(1)), 2, 0, max_more_rows, max_alternatives=8)
    drafts = DraftPlanner(DraftChooser(cost)).plan(candidates, [], step, LastStep(0.1))
    assert [draft.place for draft in drafts] == places
    assert len(drafts[0].tokens) == 5


def test_an_alternative_attends_to_the_rows_before_its_position() -> None:
    batch = Batch(16)
    batch.add(3, 7, [1], 1)
    first = batch.rows
    assert batch.add(4, 10, [1, 2, 3, 9], 4) == 1
    batch.make_alternative(4, 12, first)
    assert batch.alternatives == [AlternativeRow(4, 1, 3)]
    assert (batch.rows, batch.outputs) == (5, 5)
    assert (batch.token[4], batch.pos[4], batch.seq[4], batch.output[4]) == (9, 12, 4, 1)
    batch.clear()
    assert batch.alternatives == []


def test_a_sampled_draft_has_a_second_choice_where_it_most_likely_ends() -> None:
    draft = SampledDraft(DraftBounds(), with_second_choices=True)
    draft.begin([1])
    for logits in ([0.0, 9.0, 1.0, 0.0], [3.0, 0.0, 2.5, 0.0], [0.0, 0.0, 1.0, 9.0], [np.nan, 0.0, 0.0, 0.0]):
        row = np.array(logits, np.float32)
        draft.extend(row, 8, 0.0, ())
        np.testing.assert_array_equal(row, np.array(logits, np.float32))
    found = draft.propose(8)
    assert (found.tokens, found.second_choices) == ((1, 0, 3), (2, 2, -1))
    assert draft.propose(1).second_choices == (2,)
    assert found.with_alternative(1).tokens == (1, 0, 3, 2)
    draft.clear_draft()
    assert not draft.propose(8).tokens
