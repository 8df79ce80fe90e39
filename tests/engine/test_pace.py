"""The learned cost of a step, acceptance of drafts, lengths of drafts, and the number of prompt rows that fit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate, product
from operator import mul
from pathlib import Path
from statistics import geometric_mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulated import PER_SLOT, UNIFIED, Machine, jumping, oracle, simulate
from engine.backend import HostWork, Logits, State, no_host_work
from engine.config import SIMULATED_MODEL, EngineConfig
from engine.pace import (
    AcceptanceEstimate,
    DraftChooser,
    Layout,
    PrefillWait,
    SequenceRows,
    StepCost,
    StepShape,
    UpcomingStep,
    calibrate,
    load_calibration,
    save_calibration,
    warm_up,
)
from engine.pace.acceptance import MIN_CHANCE, PRIOR_CHANCE
from engine.pace.calibration import Calibration
from engine.pace.curve import Curve
from engine.pace.lengths import best_lengths, equal_lengths, pick_draft
from engine.sim.context import SimContext
from engine.sim.costs import SimCost, flat, free, linear

FREE = SimCost(free)


def decode(rows: int, cells: int = 0) -> StepShape:
    """Returns the shape of a step of one pass with unified KV and `cells` resident cells."""
    return StepShape((rows,), rows * cells)


def upcoming_step(count: int, max_rows: int) -> UpcomingStep:
    """Returns an upcoming step of `count` sequences, to which `max_rows` draft rows may be added."""
    return UpcomingStep(tuple(SequenceRows(seq) for seq in range(count)), count, 0, max_rows)


def test_decoding_sequences_keep_half_their_speed() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.observe(decode(4), 0, 0.020)
        rows = cost.prompt_rows(decode(4), 0.0, 0.5)
        cost.observe(decode(4), rows, 0.020 + rows * 0.004)
    assert rows == 5, "five rows of 4 ms fill the second 20 ms"


def test_a_step_target_is_kept() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.observe(decode(4), 0, 0.020)
        rows = cost.prompt_rows(decode(4), 0.1, 0.5)
        cost.observe(decode(4), rows, 0.020 + rows * 0.004)
    assert rows == 20


def test_a_target_below_a_step_without_prompts_still_computes_one_row() -> None:
    cost = StepCost()
    cost.observe(decode(4), 0, 0.020)
    cost.observe(decode(4), 8, 0.060)
    assert cost.prompt_rows(decode(4), 0.005, 0.5) == 1


def test_chunks_grow_step_by_step_where_rows_are_free() -> None:
    cost, sizes = StepCost(), []
    cost.observe(decode(1), 0, 0.010)
    for _ in range(40):
        sizes.append(cost.prompt_rows(decode(1), 0.0, 0.5))
        cost.observe(decode(1), sizes[-1], 0.0101)
    opened = [size for size in sizes if size]  # a size of 0 is a step that measures decoding alone
    assert opened == sorted(opened)
    assert opened[-1] > 1000


def test_the_first_chunk_beside_decoding_is_as_long_as_a_measured_prompt() -> None:
    cost = StepCost(Curve({1: 0.02, 128: 0.026}))
    for rows in (64, 128, 256, 512):
        cost.observe(StepShape(), rows, 0.02 + 0.00005 * rows)
    assert cost.prompt_rows(decode(3), 0.0, 0.5, prefilling=3.0) > 200, "small chunks would pay for a pass each"
    cost.observe(decode(3), 400, 0.02 + 0.04)
    assert cost.prompt_rows(decode(3), 0.0, 0.5, prefilling=3.0) > 300


def test_rows_in_a_pass_of_their_own_follow_the_curve() -> None:
    """The first rows of such a pass cost as much as a whole pass, so their mean cost would keep the chunks small."""
    cost = StepCost(Curve({1: 0.025, 4: 0.040, 16: 0.117, 32: 0.226}))
    for seconds, rows in ((0.0, 10), (0.1, 7), (0.3, 32)):
        for _ in range(3):
            chosen = cost.prompt_rows(decode(4), seconds, 0.5, own_pass=True)
            assert 0.8 * rows <= chosen <= 1.3 * rows
            cost.observe(decode(4), 1, 0.025, own_pass=True)
    cost.observe(decode(4), 0, 0.04)
    assert cost.prompt_rows(decode(4), 0.0, 0.5, prefilling=4.0, own_pass=True) > 20
    assert cost.prompt_rows(decode(4), 0.01, 0.5, own_pass=True) == 1
    mixed = StepCost(cost.curve)
    assert mixed.prompt_rows(decode(4), 0.0, 0.5) == cost.prompt_rows(decode(4), 0.0, 0.5), "nothing is learned of it"


def test_a_prompt_alone_fills_the_idle_step() -> None:
    cost = StepCost()
    for _ in range(20):
        rows = cost.prompt_rows(StepShape(), 0.0, 0.5)
        cost.observe(StepShape(), rows, rows * 0.002)
    assert rows == 250


def test_an_outlier_moves_little() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.observe(decode(2), 0, 0.010)
    cost.observe(decode(2), 0, 1.0)
    assert cost.decode_seconds(decode(2)) < 0.0115


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.01), (2, 0.02), (3, 0.03), (8, 0.08), (16, 0.16)])
def test_unmeasured_row_counts_are_interpolated(rows: int, seconds: float) -> None:
    cost = StepCost()
    assert cost.decode_seconds(decode(rows)) == 0.0
    for known in (2, 4, 8):
        cost.curve.put(known, known / 100)
    expected = seconds if rows >= 2 else 0.02
    assert cost.decode_seconds(decode(rows)) == pytest.approx(expected)


class SimulatedClock:
    """A clock that only simulated steps advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ClockedContext(SimContext):
    """A context whose steps advance a clock by their cost, and whose states can be shifted."""

    shifts = True

    def __init__(self, clock: SimulatedClock, cost: SimCost, *, unified: bool, cells: int) -> None:
        super().__init__(
            EngineConfig.of(path=SIMULATED_MODEL, slots=16, context=cells, outputs=64, kv_unified=unified), FREE
        )
        self._clock, self._true = clock, cost
        self.flash = cost.flash
        self.true = Layout(unified, self.ubatch, cost.flash)

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """Adds the step's cost to the clock."""
        self._clock.now += self._true.seconds(self.true.shape(self._step_rows(), self.cells - len(self._free_cells)))
        return super().decode(host_work)

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """Moves the start of a state; its hashes stay."""
        moved = state.view(np.uint64).copy()
        moved[0] += by
        return moved.view(np.uint8)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("measured", [False, True])
def test_a_calibration_measures_passes_and_cells(
    measured: bool, unified: bool, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, true = SimulatedClock(), SimCost(lambda rows: 0.01 + 0.002 * rows, 2e-6, flash)
    monkeypatch.setattr(time, "perf_counter", clock)
    context = ClockedContext(clock, true, unified=unified, cells=16 * 1200)
    found = calibrate(context) if measured else None
    cost = warm_up(context, found)
    assert not any(context.length(seq) for seq in range(context.sequences))
    assert cost.layout == context.true
    assert len(cost.curve.points) == (24 if measured else 1), "as far as rows may have logits"
    if found is not None:
        assert (found.unified, found.flash) == (unified, flash)
        assert found.row_cell == pytest.approx(2e-6, rel=0.05)
        assert found.rows[16] == pytest.approx(0.042, rel=0.02)
        shape = cost.layout.shape([SequenceRows(seq, 1, 700) for seq in range(8)], 8 * 700)
        assert cost.decode_seconds(shape) == pytest.approx(true.seconds(shape), rel=0.02)


def test_cells_are_computed_where_states_cannot_be_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimulatedClock()
    monkeypatch.setattr(time, "perf_counter", clock)
    quick = ClockedContext(clock, SimCost(lambda rows: 0.01 + 0.002 * rows, 2e-6), unified=False, cells=16 * 1200)
    slow = ClockedContext(clock, SimCost(lambda rows: 0.02 * rows, 2e-6), unified=False, cells=16 * 1200)
    quick.shifts = slow.shifts = False
    assert calibrate(quick).row_cell == pytest.approx(2e-6, rel=0.05)
    begun = clock.now
    assert calibrate(slow).row_cell == 0.0, "too few cells are computed in time"
    assert clock.now - begun < 7


@pytest.mark.parametrize("cells", [128, 200, 256, 1024])
def test_the_cells_of_one_slot_are_not_exceeded(cells: int) -> None:
    config = EngineConfig.of(path=SIMULATED_MODEL, slots=1, context=cells, kv_unified=False)
    context = SimContext(config, SimCost(free))
    assert calibrate(context).row_cell >= 0.0
    assert context.length(0) == 0


def test_cells_that_cannot_be_copied_are_not_measured() -> None:
    context = ClockedContext(SimulatedClock(), SimCost(free, 1.0), unified=False, cells=16 * 200)
    context.partial = False
    assert calibrate(context).row_cell == 0.0


def test_a_delayed_step_does_not_make_the_next_ones_long() -> None:
    cost, sizes = StepCost(), []
    for step in range(200):
        cost.observe(decode(4), 0, 0.020)
        sizes.append(cost.prompt_rows(decode(4), 0.0, 0.5))
        delay = 20.0 if step % 17 == 3 else 1.0
        cost.observe(decode(4), sizes[-1], delay * (0.020 + sizes[-1] * 0.004))
    assert max(sizes[50:]) <= 5


# ── the curve ──


def test_jumps_are_kept() -> None:
    cost = StepCost()
    for rows, seconds in {1: 0.02, 2: 0.04, 3: 0.06, 4: 0.03, 8: 0.05}.items():
        cost.curve.put(rows, seconds, 3)
    for _ in range(100):
        cost.observe(decode(3), 0, 0.06)
        cost.observe(decode(4), 0, 0.03)
    assert cost.decode_seconds(decode(3)) == pytest.approx(0.06, rel=0.02)
    assert cost.decode_seconds(decode(4)) == pytest.approx(0.03, rel=0.02)


def test_a_machine_that_gets_slower_does_not_bend_the_curve() -> None:
    cost = StepCost()
    for rows in (1, 2, 4, 8):
        cost.curve.put(rows, 0.01 + 0.002 * rows, 3)
    for _ in range(100):
        cost.observe(decode(1), 0, 3 * 0.012)
    assert cost.decode_seconds(decode(1)) == pytest.approx(0.036, rel=0.05)
    assert cost.decode_seconds(decode(8)) / cost.decode_seconds(decode(1)) == pytest.approx(0.026 / 0.012, rel=0.35)
    assert cost.load_factor > 2


def test_a_jump_that_was_not_measured_at_start_is_learned() -> None:
    cost = StepCost()
    for rows in (1, 8, 16):
        cost.curve.put(rows, 0.01 * rows, 3)
    for _ in range(30):
        cost.observe(decode(1), 0, 0.01)
        cost.observe(decode(9), 0, 0.18)
    assert cost.decode_seconds(decode(9)) == pytest.approx(0.18, rel=0.1)
    assert cost.decode_seconds(decode(8)) == pytest.approx(0.08, rel=0.25)
    assert cost.decode_seconds(decode(16)) == pytest.approx(0.16, rel=0.25)


def test_resident_cells_make_every_row_dearer() -> None:
    cost = StepCost()
    cost.curve.put(1, 0.01, 3)
    cost.curve.put(8, 0.03, 3)
    cost.row_cell = 1e-6
    assert cost.decode_seconds(decode(8, 1000)) == pytest.approx(0.03 + 8e-3)
    assert [*cost.unified_steps(1, 7, 1000)][7] == pytest.approx(0.03 + 8e-3)
    for _ in range(3000):  # the true cost of a cell is twice `row_cell`
        for rows in (1, 8):
            cost.observe(decode(rows), 0, (0.01 if rows == 1 else 0.03))
            cost.observe(decode(rows, 20_000), 0, (0.01 if rows == 1 else 0.03) + 2e-6 * rows * 20_000)
    assert cost.resident_cell(1) == pytest.approx(2e-6, rel=0.15)


def test_prompt_rows_settle_where_a_row_is_cheapest() -> None:
    cost = StepCost()
    for rows in range(1, 65):
        cost.curve.put(rows, 0.01 + 0.002 * rows + (0.01 if rows % 4 else 0.0), 3)
    cost.observe(decode(3), 10, 0.06)
    for _ in range(8):
        assert (3 + cost.prompt_rows(decode(3), 0.06, 0.5)) % 4 == 0


@given(st.dictionaries(st.integers(1, 300), st.floats(0.001, 9.0), min_size=1), st.integers(1, 500))
def test_a_curve_goes_through_the_measured_points(points: dict[int, float], rows: int) -> None:
    curve = Curve()
    for count, seconds in points.items():
        curve.put(count, seconds)
    for count, seconds in points.items():
        assert curve.seconds(count) == seconds
        assert curve.line(rows)[count] == pytest.approx(seconds) if count <= rows else True
    low = min(points.values())
    assert curve.seconds(rows) >= low * 0.999
    if rows > max(points):
        assert curve.seconds(rows) == pytest.approx(points[max(points)] * rows / max(points))


def test_a_calibration_is_found_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_calibration("this model") is None
    measured = Calibration({1: 0.01, 4: 0.02}, 1e-6, 0.003, False, True)
    save_calibration("this model", measured)
    assert load_calibration("this model") == measured
    assert load_calibration("another") is None
    for path in (tmp_path / "paceline").iterdir():
        path.write_bytes(b"torn")
    assert load_calibration("this model") is None
    for bad in (Calibration({4: 0.02}, 0.0, 0.1), Calibration({1: 0.0}, 0.0, 0.1), Calibration({1: 1.0}, -1.0, 0.1)):
        save_calibration("this model", bad)
        assert load_calibration("this model") is None


def test_a_calibration_that_cannot_be_saved_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "paceline").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_calibration("this model", Calibration({1: 0.01}, 0.0, 0.003))
    assert "cannot save the calibration" in caplog.text


# ── chances ──


def record(acceptance: AcceptanceEstimate, compared: int, right: int) -> None:
    """Records a verification: `right` tokens are accepted and, if `compared` is larger, the next token is rejected."""
    acceptance.observe(0, min(compared, right), right < compared)


def test_acceptance_is_learned_from_drafts() -> None:
    of_all = AcceptanceEstimate()
    assert of_all.chance(0) == PRIOR_CHANCE
    for _ in range(100):
        record(of_all, 4, 2)  # the third token is always wrong
    assert of_all.chance(0) > 0.95
    assert of_all.chance(2) < 0.1
    assert of_all.chance(3) < 0.1, "the position is never reached, so its chance is close to that of the one before"
    assert 1.8 < sum(of_all.curve(64)) < 2.2
    of_one = AcceptanceEstimate(of_all)
    assert of_one.chance(2) == of_all.chance(2)
    for _ in range(50):
        record(of_one, 4, 4)
    assert sum(of_one.curve(4)) > 3.5


def test_a_stated_chance_counts_by_the_acceptance_of_its_class() -> None:
    acceptance = AcceptanceEstimate()
    for _ in range(100):
        acceptance.observe(0, 0, True, (0.99,))
        acceptance.observe(0, 1, False, (0.5,))
    assert acceptance.chance(0, 0.99) < 0.1
    assert acceptance.chance(0, 0.5) > 0.9
    assert len(acceptance.curve(3, (0.99, 0.99, 0.5))) == 1, f"less likely than {MIN_CHANCE}"


def test_a_draft_accepted_as_a_whole_is_no_evidence_about_later_positions() -> None:
    acceptance = AcceptanceEstimate()
    for _ in range(100):
        record(acceptance, 2, 2)
    assert sum(acceptance.curve(8)) > 5
    assert [*acceptance.curve(8)] == sorted(acceptance.curve(8), reverse=True)


# ── lengths ──

curves = st.lists(st.lists(st.floats(0.05, 1.0), max_size=5), min_size=1, max_size=4)


def brute_force(chances: Sequence[Sequence[float]], seconds: Sequence[float]) -> float:
    """Returns the best rate of all lengths; a rate is the geometric mean of the speeds times their number."""
    best = 0.0
    for lengths in product(*(range(len(curve) + 1) for curve in chances)):
        if sum(lengths) < len(seconds):
            speeds = [
                (1 + sum(curve[:length])) / seconds[sum(lengths)]
                for curve, length in zip(chances, lengths, strict=True)
            ]
            best = max(best, len(speeds) * geometric_mean(speeds))
    return best


@given(curves, st.lists(st.floats(0.5, 3.0), min_size=21, max_size=21), st.integers(1, 21))
def test_lengths_are_the_best_for_any_cost_curve(raw: list[list[float]], seconds: list[float], most: int) -> None:
    chances = [[*accumulate(curve, mul)] for curve in raw]
    costs = np.array(seconds[:most])
    found = best_lengths(chances, costs, len(chances))
    gain = sum(sum(curve[:length]) for curve, length in zip(chances, found.lengths, strict=True))
    assert found.gain == pytest.approx(gain)
    assert all(length <= len(curve) for curve, length in zip(chances, found.lengths, strict=True))
    assert found.rate == pytest.approx(brute_force(chances, seconds[:most]))


def test_one_repetitive_sequence_does_not_delay_the_others() -> None:
    certain, rows = [1.0] * 64, np.arange(65, dtype=np.float64)
    assert best_lengths([certain], 0.025 + 0.005 * rows, 1).lengths == [64], "alone"
    beside_three = best_lengths([certain], 0.04 + 0.005 * rows, 4)
    assert beside_three.lengths == [1], "64 would double the tokens per second, at a ninth of the others' speed"
    assert best_lengths([certain], 0.04 + 0.00005 * rows, 4).lengths == [64], "where rows are nearly free"


def test_a_higher_price_of_a_row_favours_the_shorter_draft() -> None:
    sure, long = [0.9, 0.85], [0.5] * 12
    assert pick_draft([sure, long], 0.0) == 1
    assert pick_draft([sure, long], 0.45) == 0


@given(st.lists(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4), min_size=1, max_size=3), st.floats(0.0, 1.0))
def test_equal_lengths_are_the_best(raw: list[list[float]], each: float) -> None:
    chances = [[*accumulate(curve, mul)] for curve in raw]
    costs = np.array([1.0 + 0.1 * rows for rows in range(13)])
    by_length = costs[: len(chances) * max(map(len, chances)) + 1 : len(chances)]
    most, rate = equal_lengths(chances, by_length, len(chances), each)
    rates = [
        len(chances)
        * geometric_mean([1 + sum(curve[:count]) for curve in chances])
        / (costs[count * len(chances)] + each * count)
        for count in range(max(map(len, chances)) + 1)
    ]
    assert rate == pytest.approx(max(rates))
    assert rates[most] == pytest.approx(rate)
    most, rate = equal_lengths(chances, by_length, len(chances), each, 2)
    assert rate == pytest.approx(max([rates[0], *rates[2:]]))


def test_a_batched_proposer_is_tried_only_if_it_can_pay() -> None:
    cost = StepCost()
    cost.curve.put(1, 0.03, 3)
    cost.curve.put(32, 0.5, 3)
    chooser = DraftChooser(cost)
    for _ in range(1000):
        chooser.observe_step([SequenceRows(0)], 0, 0, 0.03)
    load = upcoming_step(1, 100)
    rate = 1 / 0.03
    assert chooser.equal_lengths([[0.7] * 8], [0], (1, 8), load, 0.03, rate, 0.0) == (0, rate)
    assert chooser.equal_lengths([[0.2] * 8], [0], (1, 8), load, 0.001, rate, 2.0) == (0, rate), (
        "not enough is saved up"
    )
    most, _ = chooser.equal_lengths([[0.2] * 8], [0], (1, 8), load, 0.001, rate, 0.2)
    assert most > 0, "a trial, as drafting may pay"
    assert chooser.equal_lengths([[0.2] * 8], [0], (1, 8), load, 0.001, rate, 0.2) == (0, rate), "there is one trial"
    most, _ = chooser.equal_lengths([[0.9**position for position in range(1, 9)]], [0], (1, 8), load, 0.001, rate, 0.0)
    assert most > 2
    for _ in range(1000):
        chooser.observe_step([SequenceRows(0)], 0, 0, 0.03)
    most, _ = chooser.equal_lengths([[]], [0], (1, 8), load, 0.001, rate, 0.0)
    assert most > 0, "trials never end for good"


# ── the whole policy, in simulated time ──


@pytest.mark.parametrize("layout", [UNIFIED, PER_SLOT], ids=["unified", "per slot"])
@pytest.mark.parametrize("clients", [1, 4, 16])
def test_on_a_flat_curve_the_speed_is_near_an_oracle(clients: int, layout: Layout) -> None:
    rates = [lambda _: 0.8] * clients
    runs = [simulate(flat, rates, 1200 // clients, warmup_steps=100, seed=seed, layout=layout) for seed in range(4)]
    rate = sum(ran.tokens for ran in runs) / sum(ran.seconds for ran in runs)
    assert rate > 0.96 * oracle(flat, [0.8] * clients), "3 % of the speed, and 1 % for randomness"


@pytest.mark.parametrize("layout", [UNIFIED, PER_SLOT], ids=["unified", "per slot"])
@pytest.mark.parametrize("machine", [linear, jumping])
@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("clients", [1, 3, 8])
def test_drafts_are_never_slower_than_none(machine: Machine, chance: float, clients: int, layout: Layout) -> None:
    ran = simulate(machine, [lambda _: chance] * clients, 500, layout=layout)
    assert ran.rate > 0.98 * clients / machine(clients)
    assert ran.trial_rows <= 0.02 * ran.rows


def test_a_change_of_acceptance_is_followed() -> None:
    ran = simulate(jumping, [lambda step: 0.9 if step < 300 or step >= 600 else 0.05], 900)
    assert sum(ran.drafted[250:300]) > 100
    assert sum(ran.drafted[350:600]) < 100
    assert sum(ran.drafted[650:]) > 500


def test_a_decision_keeps_to_the_rows_of_a_step() -> None:
    """Many long drafts are cut to the rows of a step; `python -m bench.simulated` prints the time of a decision."""
    cost = StepCost()
    cost.curve.put(1, 0.02, 3)
    cost.curve.put(128, 0.03, 3)
    slots = [[[0.9**position for position in range(1, 65)]] * 2] * 16
    choice = DraftChooser(cost).choose(slots, range(16), upcoming_step(16, 112))
    assert sum(choice.lengths) == 112


def test_a_log_line_for_every_hundred_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "paceline.pace")
    cost = StepCost()
    cost.curve.put(1, 0.02, 3)
    cost.curve.put(8, 0.03, 3)
    chooser = DraftChooser(cost)
    for _ in range(150):
        choice = chooser.decide([[[0.9, 0.8]]], [0], upcoming_step(1, 8))
        assert choice.lengths == [2]
        chooser.observe_step([SequenceRows(0, 3)], 0, 0, cost.decode_seconds(decode(3)))
        assessed = chooser.assess(2, 1)
        assert assessed.saved == pytest.approx(0.02)
        assert assessed.spent == pytest.approx(cost.decode_seconds(decode(3)) - 0.02)
    (line,) = caplog.messages
    assert line.startswith(
        "100 steps: 1.0 sequences, 2.0 drafted tokens, 1.70 expected to be accepted, 0.99 accepted; "
    )


def test_few_decoding_sequences_do_not_delay_many_prefilling_ones() -> None:
    cost = StepCost(Curve({1: 0.01, 64: 0.64}))
    cost.observe(StepShape(), 32, 0.32)
    assert cost.prompt_rows(decode(4), 0.0, 0.5) == cost.prompt_rows(decode(4), 0.0, 0.5, prefilling=0.25) == 4
    assert cost.prompt_rows(decode(1), 0.0, 0.5, prefilling=7.0) > 6
    assert cost.prompt_rows(decode(1), 0.02, 0.5, prefilling=7.0) == cost.prompt_rows(decode(1), 0.02, 0.5)
    assert cost.prompt_rows(decode(1), 0.0, 0.03, prefilling=7.0) == 3


def test_a_prompt_gains_rows_by_its_wait_relative_to_its_own_prefill() -> None:
    """A short prompt that waits gets more of a step; a long one gets as much only after a wait that fits its length."""
    cost = StepCost(Curve({1: 0.01, 64: 0.64}))
    cost.observe(StepShape(), 32, 0.32)
    cost.observe(decode(4), 64, 0.68)
    assert cost.prompt_row == pytest.approx(0.01)
    assert cost.prompt_rows(decode(4), 0.0, 10.0) == 4
    assert cost.prompt_rows(decode(4), 0.0, 10.0, waits=[PrefillWait(30.0, 3000)]) == 8
    short = cost.prompt_rows(decode(4), 0.0, 10.0, waits=[PrefillWait(30.0, 10)])
    assert short > 16
    assert cost.prompt_rows(decode(4), 0.0, 10.0, waits=[PrefillWait(30.0, 10), PrefillWait(1.0, 10)]) == short
