"""Log probabilities against a softmax in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling import BadLogits, logprob
from engine.sampling.candidates import Row


def log_softmax(row: Row) -> list[float]:
    peak = float(row.max())
    normaliser = math.log(math.fsum(math.exp(float(logit) - peak) for logit in row))
    return [float(logit) - peak - normaliser for logit in row]


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 40, 5000]),
    st.sampled_from([0.01, 3.0, 30.0]),
    st.booleans(),
    st.integers(0, 25),
)
def test_against_float64(seed: int, size: int, scale: float, ties: bool, count: int) -> None:
    rng = np.random.default_rng(seed)
    row = (rng.normal(size=size) * scale + 20).astype(np.float32)
    row = row.round(0) if ties else row
    row.flags.writeable = False
    token = int(rng.integers(size))
    expected = log_softmax(row)
    result = logprob(row, token, count)
    order = sorted(range(size), key=lambda token: (-row[token], token))[:count]
    assert result.token == token
    assert result.logprob == pytest.approx(expected[token], abs=1e-5)
    assert [token for token, _ in result.top] == order
    assert [value for _, value in result.top] == pytest.approx([expected[token] for token in order], abs=1e-5)


@pytest.mark.parametrize("size", [49_152, 151_936])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_a_whole_vocabulary(size: int, scale: float) -> None:
    row = (np.random.default_rng(size).normal(size=size) * scale).astype(np.float32)
    assert logprob(row, 5, 0).logprob == pytest.approx(log_softmax(row)[5], abs=1e-5)


def test_certainty_is_not_rounded_up() -> None:
    """The log probability is 0.0 only if the probability is 1 in float64."""
    row = np.full(50_000, -1000.0, np.float32)
    row[7] = 0.0
    assert logprob(row, 7, 1).logprob == 0.0
    row[8] = -20.0
    result = logprob(row, 7, 2)
    assert result.logprob == pytest.approx(-math.exp(-20), rel=1e-6)
    assert result.top == ((7, result.logprob), (8, result.logprob - 20.0))


def test_banned_tokens_are_not_reported() -> None:
    row = np.array([1.0, -np.inf, 1.0, -np.inf], np.float32)
    assert dict(logprob(row, 2, 4).top) == pytest.approx({0: -math.log(2), 2: -math.log(2)})


def test_values_are_plain_numbers() -> None:
    result = logprob(np.zeros(9, np.float32), 3, 2)
    assert [type(result.logprob), *map(type, result.top[0])] == [float, int, float]


def test_bad_rows() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(BadLogits):
            logprob(np.array([0.0, bad], np.float32), 0, 1)
