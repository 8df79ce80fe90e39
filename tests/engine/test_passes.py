"""Passes and attended cells of a step, against a port of the library's code, and lengths of drafts by passes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations, pairwise, product
from operator import mul

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pace import Curve, DraftChooser, Layout, SequenceRows, StepCost, StepShape, UpcomingStep
from engine.pace.chooser import DRAFT_MARGIN
from engine.pace.curve import Seconds
from engine.pace.lengths import best_lengths_per_slot
from engine.pace.passes import Columns, Pass, StepMatrix, padded, passes, segments, strips


def split_equal(seq_ids: Sequence[int], n_ubatch: int) -> list[list[int]]:
    """Returns the tokens of each ubatch: a port of `llama_batch_allocr::split_equal` with `sequential`, called
    repeatedly."""
    used = [False] * len(seq_ids)
    of_sequence: dict[int, list[int]] = {}
    for i, seq in enumerate(seq_ids):
        of_sequence.setdefault(seq, []).append(i)
    ubatches: list[list[int]] = []
    while True:
        current, last = list[int](), -1
        for i, seq in enumerate(seq_ids):
            if used[i]:
                continue
            add = seq not in current
            add = add and (not current or seq == last + 1)
            if add:
                current.append(seq)
                last = seq
                if len(current) > n_ubatch:
                    break
        if not current:
            return ubatches
        at = []
        for seq in current:
            index = 0
            while used[of_sequence[seq][index]]:
                index += 1
            at.append(index)
        taken: list[list[int]] = [[] for _ in current]
        while all(index < len(of_sequence[seq]) for seq, index in zip(current, at, strict=True)):
            for s, seq in enumerate(current):
                i = of_sequence[seq][at[s]]
                taken[s].append(i)
                used[i] = True
                at[s] += 1
            if (len(taken[0]) + 1) * len(current) > n_ubatch:
                break
        ubatches.append([i for part in taken for i in part])


def rows_of(counts: Sequence[int], gaps: Sequence[int] = (), cells: Sequence[int] = ()) -> list[SequenceRows]:
    """Returns sequences with `counts` rows; an id is skipped before each index in `gaps`."""
    ids = accumulate(2 if i in gaps else 1 for i in range(len(counts)))
    return [
        SequenceRows(seq - 1, rows, cells[i] if cells else 0)
        for i, (seq, rows) in enumerate(zip(ids, counts, strict=True))
    ]


many_rows = st.lists(st.integers(1, 9), min_size=1, max_size=12)
some_gaps = st.sets(st.integers(0, 11))


@given(many_rows, some_gaps, st.integers(1, 40))
def test_passes_are_those_of_the_library(counts: list[int], gaps: set[int], ubatch: int) -> None:
    rows = rows_of(counts, [*gaps])
    seq_ids = [part.seq for part in rows for _ in range(part.rows)]
    found = passes(rows, False, ubatch)
    expected = [sorted({seq_ids[i] for i in ubatch}) for ubatch in split_equal(seq_ids, ubatch)]
    assert [[rows[i].seq for i in range(each.first, each.first + each.sequences)] for each in found] == expected
    assert [each.total for each in found] == [len(taken) for taken in split_equal(seq_ids, ubatch)]
    assert sum(each.total for each in found) == sum(counts)


@pytest.mark.parametrize(
    ("counts", "gaps", "total"),
    [
        ([1] * 8, [], 1),
        ([1] * 8, [1, 2, 3, 4, 5, 6, 7], 8),
        ([1, 4, 1, 1], [], 2),
        ([1, 2, 3, 4, 1, 2, 3, 4], [], 7),
        ([1, 1, 1, 1, 4, 4, 4, 4], [], 2),
        ([1, 1, 1, 64], [], 2),
    ],
)
def test_equal_counts_of_consecutive_ids_share_a_pass(counts: list[int], gaps: list[int], total: int) -> None:
    assert len(passes(rows_of(counts, gaps), False, 512)) == total


def test_unified_passes_are_as_long_as_they_can_be() -> None:
    assert passes(rows_of([1, 4, 600]), True, 512) == (Pass(0, 1, 512), Pass(0, 1, 93))
    assert passes((), True, 512) == passes((), False, 512) == ()


def test_attended_cells_by_layout() -> None:
    rows = rows_of([1, 3, 1], cells=[100, 1000, 300])
    assert Layout(unified=True).shape(rows, 5000) == StepShape((5,), 25_000)
    assert Layout(unified=False, flash=True).shape(rows, 5000) == StepShape((3, 2), 100 + 3000 + 300)
    assert Layout(unified=False).shape(rows, 5000) == StepShape((3, 2), 5 * 1024), (
        "each row attends to the padded cells of the longest sequence"
    )
    assert padded(0) == padded(255) == 256
    assert padded(256) == 512
    assert Layout(unified=False).even(4, 400) == StepShape((4,), 4 * 256)
    assert Layout(unified=False, flash=True).even(0) == StepShape()


# ── many alternative steps at once ──


def brute_steps(
    cost: StepCost, rows: Sequence[SequenceRows], drafting: Sequence[int], lengths: StepMatrix
) -> list[float]:
    """Returns the result of `per_slot_steps`, computed step by step."""
    seconds = []
    for k in range(lengths.shape[1]):
        draft_rows = dict(zip(drafting, lengths[:, k].tolist(), strict=True))
        step = [part._replace(rows=part.rows + draft_rows.get(part.seq, 0)) for part in rows]
        seconds.append(cost.decode_seconds(cost.layout.shape(step)) + cost.host_seconds)
    return seconds


def jumping(rows: int) -> float:
    return 0.015 + 0.012 * rows + (0.02 if rows % 4 else 0.0)


@given(st.data(), many_rows, some_gaps, st.booleans(), st.sampled_from([12, 24, 512]))
def test_costs_of_alternative_steps_are_those_of_their_passes(
    data: st.DataObject, counts: list[int], gaps: set[int], flash: bool, ubatch: int
) -> None:
    cells = data.draw(st.lists(st.integers(0, 1200), min_size=len(counts), max_size=len(counts)))
    rows = rows_of(counts, [*gaps], cells)
    drafting = sorted(data.draw(st.sets(st.sampled_from([part.seq for part in rows]))))
    drawn = data.draw(st.lists(st.lists(st.integers(0, 6), min_size=len(drafting), max_size=len(drafting)), min_size=1))
    lengths = np.array(drawn, np.int16).reshape(len(drawn), len(drafting)).T
    cost = StepCost(Curve({n: jumping(n) for n in range(1, 200)}), Layout(False, ubatch, flash))
    cost.row_cell, cost.load_factor, cost.host_seconds = 1e-5, 1.3, 0.002
    columns = Columns.of(rows, drafting)
    found = cost.per_slot_steps(columns, columns.heights(lengths))
    assert found.tolist() == pytest.approx(brute_steps(cost, rows, drafting, lengths))


def test_sequences_without_drafts_share_columns() -> None:
    columns = Columns.of(rows_of([1, 1, 1, 1, 2, 1], gaps=[3], cells=[5, 5, 5, 5, 5, 300]), [1])
    assert columns.rows.tolist() == [1, 1, 1, 0, 1, 2, 1]
    assert Columns.of(rows_of([1] * 6), []).sequences.tolist() == [6]
    found = strips(columns, columns.heights(np.array([[0, 2]], np.int16)))
    assert sorted(zip(found.step.tolist(), (found.sequences * found.rows).tolist(), strict=True)) == [
        (0, 1),
        (0, 3),
        (0, 3),
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 3),
    ]


# ── lengths of drafts ──

drafts = st.lists(st.lists(st.floats(0.05, 1.0), max_size=4), min_size=1, max_size=4)
machines = st.sampled_from([lambda rows: 0.02 + 0.0005 * rows, lambda rows: 0.02 * rows, jumping])


def rate_of(curves: Sequence[Sequence[float]], lengths: Sequence[int], seconds: float) -> float:
    """Returns the geometric mean of the sequences' speeds, times their number."""
    gains = [1 + sum(curve[:length]) for curve, length in zip(curves, lengths, strict=True)]
    return float(len(gains) * np.prod(gains) ** (1 / len(gains)) / seconds)


def brute_force(cost: StepCost, curves: Sequence[Sequence[float]], max_total: int) -> dict[tuple[int, ...], float]:
    """Returns the rates of all possible lengths."""
    rates = {}
    for lengths in product(*(range(len(curve) + 1) for curve in curves)):
        if sum(lengths) <= max_total:
            shape = cost.layout.shape(rows_of([1 + length for length in lengths]))
            rates[lengths] = rate_of(curves, lengths, cost.decode_seconds(shape))
    return rates


@given(drafts, machines, st.integers(0, 16), st.integers(0, 2))
def test_lengths_by_passes_are_never_worse_than_the_compared_ones(
    raw: list[list[float]], machine: object, max_total: int, min_total: int
) -> None:
    curves = [[*accumulate(curve, mul)] for curve in raw]
    cost = StepCost(Curve({rows: machine(rows) for rows in range(1, 40)}), Layout(False))  # type: ignore[operator]
    columns = Columns.of(rows_of([1] * len(curves)), range(len(curves)))
    found = best_lengths_per_slot(
        curves,
        lambda lengths: cost.per_slot_steps(columns, columns.heights(lengths)),
        len(curves),
        max_total,
        min_total,
    )
    rates = brute_force(cost, curves, max_total)
    none = rates[(0,) * len(curves)]
    assert rates[(*found.lengths,)] == pytest.approx(found.rate)
    assert found.gain == pytest.approx(sum(sum(c[:n]) for c, n in zip(curves, found.lengths, strict=True)))
    if not min_total:
        assert found.rate >= none * (1 - 1e-9)
        for length in range(1, 5):
            if (lengths := tuple(min(length, len(curve)) for curve in curves)) in rates:
                assert found.rate >= rates[lengths] * (1 - 1e-6)
    elif max_total and sum(map(len, curves)) >= min_total:
        assert sum(found.lengths) >= min(min_total, max_total)
    assert found.rate >= 0.85 * max(rates.values()) or min_total


@given(drafts, machines)
def test_one_draft_beside_others_is_of_the_best_length(raw: list[list[float]], machine: object) -> None:
    curves = [[*accumulate(raw[0], mul)]] + [[] for _ in raw[1:]]
    cost = StepCost(Curve({rows: machine(rows) for rows in range(1, 40)}), Layout(False))  # type: ignore[operator]
    columns = Columns.of(rows_of([1] * len(curves)), range(len(curves)))
    found = best_lengths_per_slot(
        curves, lambda lengths: cost.per_slot_steps(columns, columns.heights(lengths)), len(curves), 16
    )
    assert found.rate == pytest.approx(max(brute_force(cost, curves, 16).values()))


def test_where_each_pass_has_a_cost_drafts_are_of_equal_length() -> None:
    cost = StepCost(Curve({1: 0.020, 128: 0.021}), Layout(False))
    unlike = [[0.9**position for position in range(1, 9)], [0.5**position for position in range(1, 5)]] * 4
    load = UpcomingStep(tuple(rows_of([1] * 8)), 8, 0, 112)
    choice = DraftChooser(cost).choose([[curve] for curve in unlike], range(8), load)
    assert set(choice.lengths) == {4}, "longer drafts for the likely ones would cost four more passes"
    cost = StepCost(Curve({1: 0.020, 128: 2.560}), Layout(False))
    assert sum(DraftChooser(cost).choose([[curve] for curve in unlike], range(8), load).lengths) == 0


def test_many_sequences_are_decided_by_fewer_alternatives() -> None:
    compared: list[int] = []

    def cost(lengths: StepMatrix) -> Seconds:
        compared.append(lengths.shape[1])
        return np.asarray(0.02 + 0.0001 * lengths.max(axis=0), np.float64)

    curves = [[0.9**position for position in range(1, 17)]] * 100
    found = best_lengths_per_slot(curves, cost, 100, 2000, steps=24)
    assert compared[0] <= 30
    assert set(found.lengths) == {16}


def test_fixed_drafts_and_gaps_are_part_of_the_step() -> None:
    cost = StepCost(Curve({1: 0.020, 128: 0.021}), Layout(False))
    load = UpcomingStep(tuple(rows_of([1] * 4)), 4, 0, 100).with_drafts({1: 3}, 2.0)
    assert load == UpcomingStep(tuple(rows_of([1, 4, 1, 1])), 6.0, 0, 97)
    chooser = DraftChooser(cost)
    assert chooser.rate(load) == pytest.approx(6.0 / cost.decode_seconds(StepShape((4, 3))))
    certain = [1.0] * 3
    choice = chooser.choose([[certain], [certain], [certain]], [0, 2, 3], load)
    assert choice.lengths == [3, 3, 3], "the drafts share the passes of the fixed draft"
    assert choice.rate > chooser.rate(load) * (1 - DRAFT_MARGIN)


def test_equal_lengths_share_a_pass() -> None:
    cost = StepCost(Curve({1: 0.020, 128: 0.021}), Layout(False))
    chooser, load = DraftChooser(cost), UpcomingStep(tuple(rows_of([1] * 4)), 4, 0, 100)
    curves = [[0.9**position for position in range(1, 9)]] * 4
    most, rate = chooser.equal_lengths(curves, [0, 1, 2, 3], (1, 8), load, 0.001, chooser.rate(load), 0.0)
    assert most == 8
    assert rate > 3 * chooser.rate(load)
    some, _ = chooser.equal_lengths(curves[:2], [0, 2], (1, 8), load, 0.001, chooser.rate(load), 0.0)
    assert some == 0, "each would need a pass of its own"


# ── learning ──


def test_passes_of_a_step_are_learned_together() -> None:
    cost = StepCost(Curve({1: 0.01, 4: 0.04, 8: 0.08}, 3), Layout(False))
    for _ in range(300):
        cost.observe(StepShape((4, 3)), 0, 0.020 + 0.030)
        cost.observe(StepShape((4,)), 0, 0.020)
        cost.observe(StepShape((1,)), 0, 0.010)
    assert cost.decode_seconds(StepShape((4,))) == pytest.approx(0.020, rel=0.05)
    assert cost.decode_seconds(StepShape((3,))) == pytest.approx(0.030, rel=0.1)
    assert cost.decode_seconds(StepShape((4, 3))) == pytest.approx(0.050, rel=0.05)


def test_a_resident_cell_costs_nothing_with_per_slot_kv() -> None:
    cost = StepCost(Curve({1: 0.01, 2: 0.012}), Layout(False))
    cost.row_cell = 1e-6
    assert cost.resident_cell(4) == 0.0
    assert cost.extra_pass == pytest.approx(0.008)
    cost.layout = Layout(True)
    assert cost.resident_cell(4) == pytest.approx(4e-6)
    assert cost.extra_pass == 0.0
    assert cost.even_seconds(2, 1000) == pytest.approx(0.014)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5000)), min_size=1, max_size=7), st.integers(0, 20_000))
def test_segments_are_the_cheapest_of_all_cuts(shapes: list[tuple[int, int]], pass_cells: int) -> None:
    rows = [SequenceRows(seq, count, cells) for seq, (count, cells) in enumerate(shapes)]

    def cost(cuts: Sequence[int]) -> float:
        parts = [rows[start:end] for start, end in pairwise((0, *cuts))]
        return sum(pass_cells + sum(part.rows for part in of) * max(padded(part.cells) for part in of) for of in parts)

    inner = [cuts for count in range(len(rows)) for cuts in combinations(range(1, len(rows)), count)]
    found = segments(rows, pass_cells)
    assert found[-1] == len(rows)
    assert cost(found) <= min(cost((*cuts, len(rows))) for cuts in inner) + pass_cells


def test_a_long_sequence_among_short_ones_has_a_pass_of_its_own() -> None:
    rows = [SequenceRows(seq, 1, 4096 if seq == 2 else 100) for seq in range(5)]
    assert segments(rows, 1000) == [2, 3, 5]
    assert segments([part._replace(cells=100) for part in rows], 1000) == [5]
