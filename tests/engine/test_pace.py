"""What is learnt of a step's cost and of drafts, and how many prompt rows fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pace import Acceptance, StepCost, warm_up
from engine.pace.acceptance import HOPE
from tests.toy import ToyContext


def test_streams_keep_half_their_speed() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.observe(4, 0, 0.020)
        rows = cost.prompt_rows(4, 0.0, 0.5)
        cost.observe(4, rows, 0.020 + rows * 0.004)
    assert rows == 5, "five rows of 4 ms fill the second 20 ms"


def test_a_step_target_is_kept() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.observe(4, 0, 0.020)
        rows = cost.prompt_rows(4, 0.1, 0.5)
        cost.observe(4, rows, 0.020 + rows * 0.004)
    assert rows == 20


def test_a_target_below_a_step_without_prompts_still_reads_one_row() -> None:
    cost = StepCost()
    cost.observe(4, 0, 0.020)
    cost.observe(4, 8, 0.060)
    assert cost.prompt_rows(4, 0.005, 0.5) == 1


def test_flat_costs_open_the_gate_step_by_step() -> None:
    cost, sizes = StepCost(), []
    cost.observe(1, 0, 0.010)
    for _ in range(40):
        sizes.append(cost.prompt_rows(1, 0.0, 0.5))
        cost.observe(1, sizes[-1], 0.0101)
    opened = [size for size in sizes if size]  # now and then a step measures the streams alone
    assert opened == sorted(opened)
    assert opened[-1] > 1000


def test_alone_a_prompt_takes_what_the_idle_step_allows() -> None:
    cost = StepCost()
    for _ in range(20):
        rows = cost.prompt_rows(0, 0.0, 0.5)
        cost.observe(0, rows, rows * 0.002)
    assert rows == 250


def test_an_outlier_moves_little() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.observe(2, 0, 0.010)
    cost.observe(2, 0, 1.0)
    assert cost.decode_seconds(2) < 0.0141


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.01), (2, 0.02), (3, 0.03), (8, 0.08), (16, 0.16)])
def test_counts_that_were_not_measured_lie_between_those_that_were(rows: int, seconds: float) -> None:
    cost = StepCost()
    assert cost.decode_seconds(rows) == 0.0
    for known in (2, 4, 8):
        cost.observe(known, 0, known / 100)
    expected = seconds if rows >= 2 else 0.02
    assert cost.decode_seconds(rows) == pytest.approx(expected)


def test_warm_up_leaves_no_cells() -> None:
    context, cost = ToyContext(), StepCost()
    warm_up(context, cost)
    assert context.used() == 0
    assert cost.decode_seconds(1) > 0


def test_a_step_that_was_held_up_does_not_make_the_next_ones_long() -> None:
    cost, sizes = StepCost(), []
    for step in range(200):
        cost.observe(4, 0, 0.020)
        sizes.append(cost.prompt_rows(4, 0.0, 0.5))
        held_up = 20.0 if step % 17 == 3 else 1.0
        cost.observe(4, sizes[-1], held_up * (0.020 + sizes[-1] * 0.004))
    assert max(sizes[50:]) <= 5


def test_acceptance_is_learnt_from_drafts() -> None:
    everybody = Acceptance()
    assert everybody.chance(0) == HOPE
    for _ in range(50):
        everybody.observe(4, 2)  # the third token is always wrong
    assert everybody.chance(0) > 0.95
    assert everybody.chance(2) < 0.1
    assert everybody.chance(3) == HOPE, "never reached"
    assert 1.8 < everybody.expected(2) <= 2
    assert everybody.expected(64) < 2.2
    one = Acceptance(everybody)
    assert one.chance(2) == everybody.chance(2)
    for _ in range(50):
        one.observe(4, 4)
    assert one.expected(4) > 3.5


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))), st.integers(0, 100))
def test_what_is_expected_of_a_draft_is_the_sum_over_its_places(drafts: list[tuple[int, int]], length: int) -> None:
    acceptance = Acceptance()
    for compared, right in drafts:
        acceptance.observe(compared, min(compared, right))
    reached, total = 1.0, 0.0
    for place in range(length):
        reached *= acceptance.chance(place)
        total += reached
    assert acceptance.expected(length) == pytest.approx(total)
