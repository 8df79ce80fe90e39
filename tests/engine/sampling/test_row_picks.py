"""The picks of all rows together are those of the stages of each row, to the bit, and no row changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from engine.contract import Request, SamplingParams
from engine.sampling import UNPICKED, RowMaxima, Sampler, pick_rows, row_picks
from engine.sampling.noise import gumbel

VALUES = st.sampled_from([-np.inf, -3.0, -1.0, 0.0, 0.5, 2.0, 2.5, 9.0])
ROWS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=VALUES)
# One line; whole lines; a width without a divisor near it, so that some tokens follow the last whole line.
VOCABULARIES = (7, 512, 6144, 4099, 12_289)


@given(ROWS)
def test_the_peaks_are_the_two_highest_logits_of_each_row(rows: np.ndarray) -> None:
    before = rows.copy()
    maxima = RowMaxima(rows)
    assert np.array_equal(rows, before)
    for row, token, highest, second in zip(rows, *(each.tolist() for each in maxima.peaks), strict=True):
        assert [each.item() for each in RowMaxima(row[None]).peaks] == [token, highest, second]
        ordered = sorted(row.tolist(), reverse=True)
        assert (token, highest) == (row.tolist().index(ordered[0]), ordered[0])
        assert second == (ordered[1] if len(ordered) > 1 else -np.inf)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ties_between_columns_and_lines_are_won_by_the_lowest_token(vocabulary: int) -> None:
    source = np.random.default_rng(vocabulary)
    rows = source.integers(0, 4, (40, vocabulary)).astype(np.float32)
    rows[20:] += source.integers(0, 2, (20, vocabulary)) * 10
    maxima = RowMaxima(rows)
    assert maxima.peaks.tokens.tolist() == rows.argmax(axis=1).tolist()
    assert np.array_equal(np.hstack([RowMaxima(row[None]).peaks for row in rows]), maxima.peaks)
    lone = np.zeros((vocabulary, vocabulary), np.float32) if vocabulary < 600 else np.zeros((3, vocabulary), np.float32)
    at = np.arange(vocabulary) if vocabulary < 600 else np.array([0, vocabulary - 1, vocabulary // 2])
    lone[np.arange(len(lone)), at] = 1.0
    found = RowMaxima(lone)
    assert found.peaks.tokens.tolist() == at.tolist()
    assert set(found.peaks.second.tolist()) == {0.0}


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5]),
    top_k=st.sampled_from([1, 3, 40, 256, 300, 0]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(params=st.lists(PARAMS, min_size=1, max_size=5), seed=st.integers(0, 2**40), ties=st.booleans())
def test_the_picks_of_all_rows_are_those_of_the_stages(
    vocabulary: int, params: list[SamplingParams], seed: int, ties: bool
) -> None:
    source = np.random.default_rng(seed)
    rows = source.normal(0.0, 3.0, (len(params), vocabulary)).astype(np.float32)
    if ties:
        rows = np.round(rows * 2).astype(np.float32) * np.float32(0.5)
    rows[source.random(rows.shape) < 0.1] = -np.inf
    rows[:, 3] = 5.0
    samplers = [
        Sampler(Request(prompt=(0,), sampling=each), seed + i, frozenset(), bytes) for i, each in enumerate(params)
    ]
    positions = [1 + i for i in range(len(params))]
    before = rows.copy()
    tokens = pick_rows(RowMaxima(rows), [sampler.row_params for sampler in samplers], positions)
    assert np.array_equal(rows, before)
    for i, (sampler, row, token) in enumerate(zip(samplers, rows, tokens, strict=True)):
        history = [0] * positions[i]
        found = sampler.candidates(row, history, 1)
        scores = found.logits + gumbel(seed + i, positions[i], found.ids)
        expected = found.ids[scores.argmax()] if len(found.ids) > 1 else found.ids[0]
        assert token in (expected, UNPICKED)
        assert (token == UNPICKED) <= (params[i].top_k in (0, 300))
        assert sampler.pick(row, history, 1) == expected


@pytest.mark.parametrize("margin", [0.05, 1e3])
def test_a_pick_that_rounding_errors_could_change_is_that_of_all_rows(
    margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = np.random.default_rng(1)
    rows = source.normal(0.0, 2.0, (200, 6144)).astype(np.float32)
    rows[:, 7:20] += source.normal(5.0, 2.0, (200, 13)).astype(np.float32)
    params = Sampler(Request(prompt=(0,), sampling=SamplingParams()), 3, frozenset(), bytes).row_params
    expected = pick_rows(RowMaxima(rows), [params] * 200, [*range(200)])
    monkeypatch.setattr(row_picks, "_MARGIN", margin)
    assert [pick_rows(RowMaxima(row[None]), [params], [at])[0] for at, row in enumerate(rows)] == expected


def test_rows_without_a_finite_maximum_are_not_picked() -> None:
    rows = np.array([[0.0, np.nan, 3.0], [np.inf, 0.0, 1.0], [-np.inf] * 3, [0.0, 1.0, 9.0]], np.float32)
    for temperature in (0.0, 0.8):
        sampler = Sampler(Request(prompt=(0,), sampling=SamplingParams(temperature=temperature)), 0, frozenset(), bytes)
        maxima = RowMaxima(rows)
        assert math.isnan(maxima.peaks.highest[0])
        assert pick_rows(maxima, [sampler.row_params] * 4, [1] * 4) == [UNPICKED] * 3 + [2]
    assert pick_rows(RowMaxima(np.empty((0, 5), np.float32)), [], []) == []


def test_rows_without_parameters_are_not_picked() -> None:
    rows = np.array([[0.0, 1.0, 9.0]], np.float32)
    params = SamplingParams(mirostat=2)
    sampler = Sampler(Request(prompt=(0,), sampling=params), 0, frozenset(), bytes)
    assert pick_rows(RowMaxima(rows), [sampler.row_params], [1]) == [UNPICKED]
