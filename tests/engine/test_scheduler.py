"""The scheduler's policy as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler import Limits, Plan, Room, Rows, StreamView, WaitingView, admit, plan

WIDE = Limits(rows=64, outputs=64, prompt_rows=64)
ROOMY = Room(slots=4, free=1000, idle=0)


def stream(key: int, known: int, computed: int, drafts: int = 0, alone: int = 0) -> StreamView:
    return StreamView(key, known, computed, drafts, alone)


@pytest.mark.parametrize(
    ("case", "streams", "room", "limits", "rows"),
    [
        ("nobody", [], ROOMY, WIDE, []),
        ("one decodes", [stream(1, 10, 9)], ROOMY, WIDE, [Rows(1, 1)]),
        ("one reads", [stream(1, 10, 0)], ROOMY, WIDE, [Rows(1, 10)]),
        ("drafts go along", [stream(1, 10, 9, drafts=4)], ROOMY, WIDE, [Rows(1, 1, 4)]),
        ("a prompt goes beside", [stream(1, 10, 9), stream(2, 40, 8)], ROOMY, WIDE, [Rows(1, 1), Rows(2, 32)]),
        (
            "the budget limits prompts, not decoding",
            [stream(1, 10, 9), stream(2, 400, 0)],
            ROOMY,
            Limits(64, 64, 5),
            [Rows(1, 1), Rows(2, 5)],
        ),
        (
            "a short prompt is not stuck behind a long one",
            [stream(1, 4000, 0), stream(2, 20, 0)],
            ROOMY,
            Limits(64, 64, 60),
            [Rows(1, 40), Rows(2, 20)],
        ),
        (
            "half is shared out, with the rest the shortest is finished",
            [stream(1, 90, 0), stream(2, 30, 0), stream(3, 25, 0)],
            ROOMY,
            Limits(64, 64, 48),
            [Rows(1, 8), Rows(2, 15), Rows(3, 25)],
        ),
        (
            "a row that cannot be split goes to the oldest",
            [stream(1, 90, 0), stream(2, 90, 0)],
            ROOMY,
            Limits(64, 64, 1),
            [Rows(1, 1)],
        ),
        (
            "outputs limit drafts, one being kept for everyone",
            [stream(1, 10, 9, drafts=9), stream(2, 10, 9, drafts=9)],
            ROOMY,
            Limits(64, 6, 64),
            [Rows(1, 1, 2), Rows(2, 1, 2)],
        ),
        (
            "a short draft leaves its share to the others",
            [stream(1, 10, 9, drafts=1), stream(2, 10, 9, drafts=9)],
            ROOMY,
            Limits(64, 8, 64),
            [Rows(1, 1, 1), Rows(2, 1, 5)],
        ),
        (
            "drafts are given up before idle prefixes are",
            [stream(1, 10, 9, drafts=9)],
            Room(0, free=1, idle=50),
            WIDE,
            [Rows(1, 1)],
        ),
        ("the batch limits prompts", [stream(1, 900, 0)], ROOMY, Limits(64, 64, 500), [Rows(1, 64)]),
        ("cells limit prompts", [stream(1, 900, 0)], Room(0, free=3, idle=4), WIDE, [Rows(1, 7)]),
    ],
)
def test_rows(case: str, streams: list[StreamView], room: Room, limits: Limits, rows: list[Rows]) -> None:
    assert plan(streams, room, limits) == Plan(tuple(rows)), case


def test_the_newest_is_retracted_when_decoding_finds_no_cells() -> None:
    streams = [stream(1, 50, 49, alone=49), stream(2, 30, 29, alone=9), stream(3, 20, 19, alone=1)]
    assert plan(streams, Room(0, free=1, idle=0), WIDE) == Plan((Rows(1, 1), Rows(2, 1)), (3,))


def test_two_half_read_prompts_do_not_wait_for_each_other_for_ever() -> None:
    streams = [stream(1, 90, 50, alone=50), stream(2, 90, 50, alone=50)]
    assert plan(streams, Room(0, free=0, idle=0), WIDE) == Plan((Rows(1, 40),), (2,))


def waiting(key: int, known: int, resident: int = 0, idle: int = 0, promised: int = 0) -> WaitingView:
    return WaitingView(key, known, resident, idle, promised)


@pytest.mark.parametrize(
    ("case", "requests", "streams", "room", "chosen"),
    [
        ("nobody waits", [], [], ROOMY, None),
        ("first come", [waiting(1, 10), waiting(2, 10)], [], ROOMY, 1),
        ("no slot", [waiting(1, 10)], [], Room(0, 1000, 0), None),
        (
            "who shares a prefix that is being read waits, and lets others pass",
            [waiting(1, 100, resident=10, promised=90), waiting(2, 10)],
            [stream(9, 200, 10)],
            ROOMY,
            2,
        ),
        ("once it was read, it starts", [waiting(1, 100, 90, 0, 90)], [stream(9, 200, 95)], ROOMY, 1),
        ("a promise of nobody binds nobody", [waiting(1, 100, 10, 0, 90)], [], ROOMY, 1),
        ("what runs is not pushed out", [waiting(1, 100)], [stream(9, 50, 49)], Room(1, 90, 0), None),
        ("a prefix counts once", [waiting(1, 100, resident=80)], [stream(9, 90, 89)], Room(1, 60, 0), 1),
        (
            "an idle prefix that it shares cannot leave",
            [waiting(1, 100, 80, 80)],
            [stream(9, 9, 8)],
            Room(1, 0, 90),
            None,
        ),
        ("idle prefixes make room", [waiting(1, 100)], [stream(9, 9, 8)], Room(1, 10, 200), 1),
        ("the first does not starve", [waiting(1, 500), waiting(2, 5)], [stream(9, 9, 8)], Room(1, 90, 0), None),
        ("alone, anything starts", [waiting(1, 190)], [], Room(1, 10, 190), 1),
    ],
)
def test_admission(
    case: str, requests: list[WaitingView], streams: list[StreamView], room: Room, chosen: int | None
) -> None:
    assert admit(requests, streams, room) == chosen, case


VIEWS = st.lists(
    st.tuples(st.integers(1, 300), st.integers(1, 60), st.integers(0, 9), st.integers(0, 50)), min_size=1, max_size=8
)


@given(VIEWS, st.integers(0, 300), st.integers(0, 300), st.integers(1, 80))
def test_a_plan_keeps_every_limit_and_somebody_moves(
    shapes: list[tuple[int, int, int, int]], free: int, idle: int, prompt_rows: int
) -> None:
    streams = [
        stream(key, known + behind, known, drafts if behind == 1 else 0, alone)
        for key, (known, behind, drafts, alone) in enumerate(shapes)
    ]
    limits = Limits(rows=64, outputs=16, prompt_rows=prompt_rows)
    made = plan(streams, Room(0, free, idle + 1), limits)
    rows = sum(part.tokens + part.drafts for part in made.rows)
    freed = sum(view.alone for view in streams if view.key in made.retract)
    assert 0 < rows <= limits.rows
    assert rows <= free + idle + 1 + freed
    assert sum(1 + part.drafts for part in made.rows) <= limits.outputs
    for part in made.rows:
        view = next(view for view in streams if view.key == part.key)
        assert part.key not in made.retract
        assert part.tokens <= view.behind
        assert part.drafts <= view.drafts
    kept = [view for view in streams if view.key not in made.retract]
    assert {view.key for view in kept if view.behind == 1} <= {part.key for part in made.rows}
