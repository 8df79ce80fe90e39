"""The policy of per-slot KV as tables: which slot takes a prompt, and which running sequence changes its slot."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.placement import Costs, SlotOption, added_passes, choose_slot, displacement, move_target, worth_copying

# Computing a token costs as much as moving 1,000 tokens; an extra pass costs as much as computing two tokens.
COSTS = Costs(compute=1e-3, move=1e-6, extra_pass=2e-3)


def option(seq: int, kept: int = 0, lost: int = 0, unsaved: int = 0, age: int = 0) -> SlotOption:
    return SlotOption(seq, kept, lost, unsaved, age)


@pytest.mark.parametrize(
    ("case", "options", "source", "running", "chosen"),
    [
        ("the lowest of the empty slots", [option(2), option(0), option(1)], 0, [], 0),
        ("the slot that holds the prefix", [option(0), option(1, kept=500, lost=3)], 500, [], 1),
        (
            "the slot that holds more of the prefix",
            [option(0, kept=300, lost=100), option(1, kept=500, lost=100)],
            500,
            [],
            1,
        ),
        (
            "an empty slot and a copy rather than cutting another conversation that was just used",
            [option(0), option(1, kept=500, lost=5000)],
            500,
            [],
            0,
        ),
        ("the slot whose content is saved", [option(0, lost=500, unsaved=500), option(1, lost=500)], 0, [], 1),
        ("the slot that is unused longer", [option(0, lost=500, age=1), option(1, lost=500, age=900)], 0, [], 1),
        ("the slot with the shorter content", [option(0, lost=900), option(1, lost=500)], 0, [], 1),
        ("a slot next to a running one", [option(0), option(4)], 0, [3], 4),
        ("the slot between two running ones", [option(0), option(4), option(8)], 0, [3, 5, 7], 4),
        (
            "a slot next to a running one rather than the slot that holds a short prefix",
            [option(0, kept=5), option(4)],
            5,
            [3],
            4,
        ),
    ],
)
def test_choice(case: str, options: list[SlotOption], source: int, running: list[int], chosen: int) -> None:
    assert choose_slot(options, source, running, COSTS, offloads=True).seq == chosen, case


def test_the_preferred_slot_is_chosen_unless_another_holds_what_cannot_be_copied() -> None:
    options = [option(0), option(1, lost=5000), option(2, kept=500)]
    assert choose_slot(options, 500, [], COSTS, offloads=True, preferred=1).seq == 2, "a copy costs a little"
    assert choose_slot(options[:2], 500, [], COSTS, offloads=True, preferred=1).seq == 1
    assert choose_slot([option(0), option(1)], 0, [], COSTS, offloads=True, preferred=1).seq == 1
    assert choose_slot(options, 0, [], COSTS, offloads=True, preferred=7).seq == 2


def test_without_offload_lost_tokens_cost_their_computation() -> None:
    costs = Costs(compute=1e-3, move=1e-6)
    options = [option(0, lost=100), option(1, kept=100, lost=0)]
    assert choose_slot(options, 100, [], costs, offloads=True).seq == 1
    far = [option(0, lost=1000), option(1, kept=90)]
    assert choose_slot(far, 100, [], costs, offloads=False).seq == 1
    assert displacement(far[0], costs, offloads=False) == pytest.approx(0.5 * 1000 * 1e-3)
    assert displacement(far[0], costs, offloads=True) == pytest.approx(0.5 * 1000 * 1e-6)
    unmeasured = displacement(option(0, lost=1000, age=512), Costs(move=1e-6), offloads=False)
    assert unmeasured == pytest.approx(0.25 * 1000 * 1e-3)


@pytest.mark.parametrize(
    ("source", "kept", "costs", "copies"),
    [
        (100, 0, Costs(compute=1e-3, move=1e-6), True),
        (100, 100, Costs(compute=1e-3, move=1e-6), False),
        (10_000, 9_995, Costs(compute=1e-3, move=1e-6), False),
        (10_000, 9_985, Costs(compute=1e-3, move=1e-6), True),
        (100, 99, Costs(move=1e-6), True),
        (10_000, 9_995, Costs(move=1e-6), False),
        (0, 0, Costs(), False),
        (5, 10, Costs(), False),
    ],
)
def test_copies_are_cheaper_than_computing(source: int, kept: int, costs: Costs, copies: bool) -> None:
    assert worth_copying(source, kept, costs) == copies


def passes(running: Collection[int]) -> int:
    """Returns the number of passes of a step with one row for each id."""
    ids = sorted(running)
    return bool(ids) + sum(above != below + 1 for below, above in pairwise(ids))


some_ids = st.sets(st.integers(0, 12))


@given(some_ids, st.integers(0, 13))
def test_gaps_are_the_passes_that_a_sequence_adds(running: set[int], seq: int) -> None:
    running.discard(seq)
    assert added_passes(seq, running) == (passes({*running, seq}) - passes(running) if running else 0)


@given(some_ids)
def test_a_move_saves_a_pass_and_is_found_if_there_is_one(running: set[int]) -> None:
    free = set(range(max(running, default=0))) - running
    saving = [
        (source, target)
        for source, target in product(running, free)
        if passes(running - {source} | {target}) < passes(running)
    ]
    assert (move_target(running) in saving) if saving else move_target(running) is None


def test_a_gap_below_all_running_slots_costs_nothing() -> None:
    assert move_target([3]) is None
    assert move_target([2, 3]) is None
    assert move_target([]) is None
    assert move_target([0, 2]) == (2, 1)
