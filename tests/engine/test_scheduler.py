"""The scheduler's policy as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from engine.scheduler import (
    Admission,
    FreeCapacity,
    Hold,
    InFlightPrefix,
    Plan,
    ScheduledRows,
    SequenceView,
    StepLimits,
    WaitingView,
    admit,
    plan,
    plan_decoding,
    reduce_rows,
    save_points,
)

WIDE_LIMITS = StepLimits(rows=64, outputs=64, prompt_rows=64)
MANY_CELLS = FreeCapacity(slots=4, free_cells=1000, evictable_cells=0)


def view(
    key: int, known: int, computed: int, drafts: int = 0, exclusive: int = 0, *, blocked: int = 0, waited: float = 1.0
) -> SequenceView:
    return SequenceView(key, known, computed, drafts, exclusive, blocked, waited)


@pytest.mark.parametrize(
    ("case", "sequences", "room", "limits", "rows"),
    [
        ("nothing runs", [], MANY_CELLS, WIDE_LIMITS, []),
        ("one decodes", [view(1, 10, 9)], MANY_CELLS, WIDE_LIMITS, [ScheduledRows(1, 1)]),
        ("one is prefilled", [view(1, 10, 0)], MANY_CELLS, WIDE_LIMITS, [ScheduledRows(1, 10)]),
        (
            "drafts are verified with a row",
            [view(1, 10, 9, drafts=4)],
            MANY_CELLS,
            WIDE_LIMITS,
            [ScheduledRows(1, 1, 4)],
        ),
        (
            "prefill shares the step",
            [view(1, 10, 9), view(2, 40, 8)],
            MANY_CELLS,
            WIDE_LIMITS,
            [ScheduledRows(1, 1), ScheduledRows(2, 32)],
        ),
        (
            "the budget limits prompts, not decoding",
            [view(1, 10, 9), view(2, 400, 0)],
            MANY_CELLS,
            StepLimits(64, 64, 5),
            [ScheduledRows(1, 1), ScheduledRows(2, 5)],
        ),
        (
            "a short prompt passes a long one that came at the same time",
            [view(1, 4000, 0), view(2, 20, 0)],
            MANY_CELLS,
            StepLimits(64, 64, 60),
            [ScheduledRows(2, 20), ScheduledRows(1, 40)],
        ),
        (
            "the shortest two of three prompts fill the step",
            [view(1, 90, 0), view(2, 30, 0), view(3, 25, 0)],
            MANY_CELLS,
            StepLimits(64, 64, 48),
            [ScheduledRows(3, 25), ScheduledRows(2, 23)],
        ),
        (
            "a long prompt gains weight as it waits",
            [view(1, 400, 0, waited=30.0), view(2, 20, 0, waited=1.0)],
            MANY_CELLS,
            StepLimits(64, 64, 60),
            [ScheduledRows(1, 60)],
        ),
        (
            "a prompt gains weight with what is computed of it",
            [view(1, 400, 390), view(2, 20, 0)],
            MANY_CELLS,
            StepLimits(64, 64, 15),
            [ScheduledRows(1, 10), ScheduledRows(2, 5)],
        ),
        (
            "prompts of equal length finish in the order of their arrival",
            [view(1, 90, 0, waited=2.0), view(2, 90, 0, waited=1.0), view(3, 90, 0, waited=3.0)],
            MANY_CELLS,
            StepLimits(64, 64, 64),
            [ScheduledRows(3, 64)],
        ),
        (
            "the oldest of equal ratios is first",
            [view(1, 90, 0), view(2, 90, 0)],
            MANY_CELLS,
            StepLimits(64, 64, 1),
            [ScheduledRows(1, 1)],
        ),
        (
            "tokens after a block to load are not computed",
            [view(1, 90, 0, blocked=70), view(2, 90, 0, blocked=90)],
            MANY_CELLS,
            WIDE_LIMITS,
            [ScheduledRows(1, 20)],
        ),
        (
            "outputs limit drafts, one being kept for each sequence",
            [view(1, 10, 9, drafts=9), view(2, 10, 9, drafts=9)],
            MANY_CELLS,
            StepLimits(64, 6, 64),
            [ScheduledRows(1, 1, 2), ScheduledRows(2, 1, 2)],
        ),
        (
            "a short draft leaves its share to the others",
            [view(1, 10, 9, drafts=1), view(2, 10, 9, drafts=9)],
            MANY_CELLS,
            StepLimits(64, 8, 64),
            [ScheduledRows(1, 1, 1), ScheduledRows(2, 1, 5)],
        ),
        (
            "drafts are given up before idle prefixes are",
            [view(1, 10, 9, drafts=9)],
            FreeCapacity(0, free_cells=1, evictable_cells=50),
            WIDE_LIMITS,
            [ScheduledRows(1, 1)],
        ),
        ("the batch limits prompts", [view(1, 900, 0)], MANY_CELLS, StepLimits(64, 64, 500), [ScheduledRows(1, 64)]),
        (
            "cells limit prompts",
            [view(1, 900, 0)],
            FreeCapacity(0, free_cells=3, evictable_cells=4),
            WIDE_LIMITS,
            [ScheduledRows(1, 7)],
        ),
    ],
)
def test_rows(
    case: str, sequences: list[SequenceView], room: FreeCapacity, limits: StepLimits, rows: list[ScheduledRows]
) -> None:
    assert plan(sequences, room, limits) == Plan(tuple(rows)), case


def test_the_newest_is_preempted_when_decoding_finds_no_cells() -> None:
    sequences = [view(1, 50, 49, exclusive=49), view(2, 30, 29, exclusive=9), view(3, 20, 19, exclusive=1)]
    assert plan(sequences, FreeCapacity(0, free_cells=1, evictable_cells=0), WIDE_LIMITS) == Plan(
        (ScheduledRows(1, 1), ScheduledRows(2, 1)), (3,)
    )


def test_two_prompts_without_cells_do_not_block_each_other() -> None:
    sequences = [view(1, 90, 50, exclusive=50), view(2, 90, 50, exclusive=50)]
    assert plan(sequences, FreeCapacity(0, free_cells=0, evictable_cells=0), WIDE_LIMITS) == Plan(
        (ScheduledRows(1, 40),), (2,)
    )


def test_a_step_without_cells_is_tried_with_fewer_rows() -> None:
    assert reduce_rows([ScheduledRows(1, 1, 3), ScheduledRows(2, 8)]) == (ScheduledRows(1, 1), ScheduledRows(2, 8))
    assert reduce_rows([ScheduledRows(1, 1), ScheduledRows(2, 8), ScheduledRows(3, 3)]) == (
        ScheduledRows(1, 1),
        ScheduledRows(2, 4),
        ScheduledRows(3, 2),
    )
    assert reduce_rows([ScheduledRows(1, 1), ScheduledRows(2, 1), ScheduledRows(3, 1)]) == (ScheduledRows(1, 1),)
    assert reduce_rows([ScheduledRows(1, 1)]) == ()


def test_whole_states_are_saved_shortly_before_the_end_of_a_prompt() -> None:
    assert save_points(100, divisible=False) == (96,)
    assert save_points(32, divisible=False) == ()
    assert save_points(100, divisible=True) == ()


def waiting(
    key: int, known: int, resident: int = 0, idle: int = 0, in_flight: InFlightPrefix | None = None
) -> WaitingView:
    return WaitingView(key, known, resident, idle, resident, in_flight)


@pytest.mark.parametrize(
    ("case", "requests", "sequences", "room", "start", "holds"),
    [
        ("no request waits", [], [], MANY_CELLS, None, []),
        ("the first request in the queue starts", [waiting(1, 10), waiting(2, 10)], [], MANY_CELLS, 1, []),
        ("no slot", [waiting(1, 10)], [], FreeCapacity(0, 1000, 0), None, []),
        (
            "a request whose prefix is in flight is held, and lets others pass",
            [waiting(1, 100, 10, in_flight=InFlightPrefix(9, 90)), waiting(2, 10)],
            [view(9, 200, 10)],
            MANY_CELLS,
            2,
            [Hold(1, 9, 90)],
        ),
        (
            "a held request starts once the prefix is resident",
            [waiting(1, 100, 90, in_flight=InFlightPrefix(9, 90))],
            [view(9, 200, 95)],
            MANY_CELLS,
            1,
            [],
        ),
        (
            "a prefix in flight must be longer by enough",
            [waiting(1, 100, 59, in_flight=InFlightPrefix(9, 90))],
            [view(9, 200, 59)],
            MANY_CELLS,
            1,
            [],
        ),
        (
            "a request is not held for a prefix that it can load",
            [WaitingView(1, 100, 10, 0, 90, InFlightPrefix(9, 90))],
            [view(9, 200, 10)],
            MANY_CELLS,
            1,
            [],
        ),
        (
            "a prefix that will not be saved cannot be shared",
            [waiting(1, 100, 10, in_flight=InFlightPrefix(9, 90, can_save=False))],
            [view(9, 200, 10)],
            MANY_CELLS,
            1,
            [],
        ),
        (
            "nothing is in flight if nothing runs",
            [waiting(1, 100, 10, 0, InFlightPrefix(9, 90))],
            [],
            MANY_CELLS,
            1,
            [],
        ),
        ("running sequences are not preempted", [waiting(1, 100)], [view(9, 50, 49)], FreeCapacity(1, 90, 0), None, []),
        ("a prefix counts once", [waiting(1, 100, 80)], [view(9, 90, 89)], FreeCapacity(1, 60, 0), 1, []),
        (
            "an idle prefix that a request shares cannot be evicted",
            [waiting(1, 100, 80, 80)],
            [view(9, 9, 8)],
            FreeCapacity(1, 0, 90),
            None,
            [],
        ),
        (
            "idle prefixes are evicted for a request",
            [waiting(1, 100)],
            [view(9, 9, 8)],
            FreeCapacity(1, 10, 200),
            1,
            [],
        ),
        (
            "the first request in the queue does not starve",
            [waiting(1, 500), waiting(2, 5)],
            [view(9, 9, 8)],
            FreeCapacity(1, 90, 0),
            None,
            [],
        ),
        ("if nothing runs, any request starts", [waiting(1, 190)], [], FreeCapacity(1, 10, 190), 1, []),
    ],
)
def test_admission(
    case: str,
    requests: list[WaitingView],
    sequences: list[SequenceView],
    room: FreeCapacity,
    start: int | None,
    holds: list[Hold],
) -> None:
    admission = admit(requests, sequences, room)
    assert (admission.start, list(admission.holds)) == (start, holds), case
    assert admission.blocked is None or start is None


def test_the_first_request_that_does_not_fit_is_blocked() -> None:
    requests = [waiting(1, 500), waiting(2, 5)]
    assert admit(requests, [view(9, 9, 8)], FreeCapacity(1, 90, 0)) == Admission(None, (), blocked=1)


VIEWS = st.lists(
    st.tuples(st.integers(1, 300), st.integers(1, 60), st.integers(0, 9), st.integers(0, 50), st.floats(0, 9)),
    min_size=1,
    max_size=8,
)


@given(VIEWS, st.integers(0, 300), st.integers(0, 300), st.integers(1, 80))
def test_a_plan_keeps_every_limit_and_always_has_rows(
    shapes: list[tuple[int, int, int, int, float]], free: int, idle: int, prompt_rows: int
) -> None:
    sequences = [
        view(key, known + more, known, drafts if more == 1 else 0, exclusive, waited=waited)
        for key, (known, more, drafts, exclusive, waited) in enumerate(shapes)
    ]
    limits = StepLimits(rows=64, outputs=16, prompt_rows=prompt_rows)
    planned = plan(sequences, FreeCapacity(0, free, idle + 1), limits)
    rows = sum(part.tokens + part.drafts for part in planned.rows)
    freed = sum(each.exclusive for each in sequences if each.key in planned.preempt)
    assert 0 < rows <= limits.rows
    assert rows <= free + idle + 1 + freed
    assert sum(1 + part.drafts for part in planned.rows) <= limits.outputs
    for part in planned.rows:
        each = next(each for each in sequences if each.key == part.key)
        assert part.key not in planned.preempt
        assert part.tokens <= each.num_uncomputed
        assert part.drafts <= each.drafts
    kept = [each for each in sequences if each.key not in planned.preempt]
    assert {each.key for each in kept if each.num_uncomputed == 1} <= {part.key for part in planned.rows}


# Single rows are computed by other kernels than several.
NO_SINGLE_ROWS = StepLimits(rows=64, outputs=64, prompt_rows=64, min_prompt_rows=2, ubatch=16)


@pytest.mark.parametrize(
    ("case", "sequences", "limits", "rows"),
    [
        (
            "no single row is left for later",
            [view(1, 11, 0)],
            structs.replace(NO_SINGLE_ROWS, prompt_rows=10),
            [ScheduledRows(1, 9)],
        ),
        (
            "three rows are not split",
            [view(1, 3, 0)],
            structs.replace(NO_SINGLE_ROWS, prompt_rows=2),
            [ScheduledRows(1, 3)],
        ),
        ("no pass of one row", [view(1, 17, 0)], NO_SINGLE_ROWS, [ScheduledRows(1, 15)]),
        ("no pass of one row after several passes", [view(1, 33, 0)], NO_SINGLE_ROWS, [ScheduledRows(1, 31)]),
        ("two rows in the last pass", [view(1, 18, 0)], NO_SINGLE_ROWS, [ScheduledRows(1, 18)]),
        (
            "one row before a block to load",
            [view(1, 10, 9), structs.replace(view(2, 40, 8), blocked=31)],
            NO_SINGLE_ROWS,
            [ScheduledRows(1, 1), ScheduledRows(2, 1)],
        ),
        (
            "drafts leave a prompt its rows",
            [view(1, 10, 9, drafts=60), view(2, 40, 8)],
            structs.replace(NO_SINGLE_ROWS, rows=16, prompt_rows=2),
            [ScheduledRows(1, 1, 12), ScheduledRows(2, 3)],
        ),
        (
            "one row is taken if only one fits",
            [view(1, 10, 9), view(2, 40, 8)],
            structs.replace(NO_SINGLE_ROWS, rows=2),
            [ScheduledRows(1, 1), ScheduledRows(2, 1)],
        ),
    ],
)
def test_prompt_rows_are_not_single_where_possible(
    case: str, sequences: list[SequenceView], limits: StepLimits, rows: list[ScheduledRows]
) -> None:
    assert plan(sequences, MANY_CELLS, limits) == Plan(tuple(rows)), case


@given(
    drafts=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    free=st.integers(0, 24),
    evictable=st.integers(0, 8),
    outputs=st.integers(5, 24),
)
def test_a_plan_of_decoding_sequences_is_the_general_one(
    drafts: list[int], free: int, evictable: int, outputs: int
) -> None:
    views = [view(key, 10, 9, draft, exclusive=1) for key, draft in enumerate(drafts)]
    capacity, limits = FreeCapacity(0, free, evictable), StepLimits(rows=outputs + 3, outputs=outputs, prompt_rows=0)
    found = plan_decoding(dict(enumerate(drafts)), capacity, limits)
    if found is not None:
        assert found == plan(views, capacity, limits)
    else:
        assert sum(drafts) + len(drafts) > min(outputs, free)
