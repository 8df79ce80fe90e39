"""The peaks of all rows together are those of each row, and no row changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from engine.contract import Request, SamplingParams
from engine.sampling import Peak, Sampler, row_peaks
from engine.sampling.peaks import row_peak

VALUES = st.sampled_from([-np.inf, -3.0, -1.0, 0.0, 0.5, 2.0, 2.5, 9.0])
ROWS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=VALUES)


@given(ROWS)
def test_peaks_of_all_rows_are_those_of_each(rows: np.ndarray) -> None:
    before = rows.copy()
    found = row_peaks(rows)
    assert np.array_equal(rows, before)
    assert found == [row_peak(row) for row in rows]
    for peak, row in zip(found, rows, strict=True):
        ordered = sorted(row.tolist(), reverse=True)
        assert (peak.token, peak.highest) == (ordered and row.tolist().index(ordered[0]), ordered[0])
        assert peak.second == (ordered[1] if len(ordered) > 1 else -np.inf)


def test_a_row_with_nan_has_a_nan_peak() -> None:
    rows = np.array([[0.0, np.nan, 3.0]], np.float32)
    assert np.isnan(row_peaks(rows)[0].highest)
    assert np.isnan(row_peak(rows[0]).highest)
    assert row_peaks(np.empty((0, 5), np.float32)) == []


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@given(rows=ROWS, seed=st.integers(0, 9))
def test_a_known_peak_changes_no_pick(temperature: float, rows: np.ndarray, seed: int) -> None:
    rows = np.maximum(rows, -5.0)
    sampler = Sampler(
        Request(prompt=(0,), sampling=SamplingParams(temperature=temperature)), seed, frozenset({1}), lambda _: b"x"
    )
    for row, peak in zip(rows, row_peaks(rows), strict=True):
        assert isinstance(peak, Peak)
        assert sampler.sample(row, [0], 1, peak=peak) == sampler.pick(row, [0], 1)
