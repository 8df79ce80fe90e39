"""The keyed noise: a pure function, never infinite, and statistically independent between neighbouring keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.sampling.noise import NOISE_SPAN, derive_seed, gumbel, uniform

Floats = NDArray[np.float64]
seeds = st.integers(0, 2**63 - 1)
positions = st.integers(0, 2**31)


def uniforms(seed: int, position: int, tokens: NDArray[np.intp]) -> Floats:
    """Returns the uniform numbers from which the noise of `tokens` is computed."""
    noise: Floats = np.exp(-np.exp(-gumbel(seed, position, tokens)))
    return noise


def deviation(counts: NDArray[np.intp], expected: float) -> float:
    """Returns Pearson's chi-square of equally likely counts, in standard deviations from its mean."""
    chi_square = float(((counts - expected) ** 2).sum() / expected)
    freedom = counts.size - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def test_the_noise_is_pinned() -> None:
    """The values are fixed, so that a recorded seed gives the same tokens in every release."""
    tokens = np.array([0, 1, 49151, 151935])
    first = [1.0530590592834124, -0.6807578025137798, 0.7115001858537433, -0.19557984770366205]
    other = [-0.23160170097449095, -0.3379539671667559, 0.2597702829022208, -1.1083770024693613]
    assert gumbel(0, 0, tokens).tolist() == pytest.approx(first, rel=1e-12)
    assert gumbel(2**63 - 1, 4096, tokens).tolist() == pytest.approx(other, rel=1e-12)
    assert uniform(42, 7) == 0.531611080662469
    assert [derive_seed(42, index) for index in range(3)] == [42, 2513832144714455113, 6878160354806654338]


@given(seeds, positions, st.lists(st.integers(0, 200_000), min_size=1, max_size=50))
def test_the_noise_of_a_token_depends_on_no_other_token(seed: int, position: int, tokens: list[int]) -> None:
    alone = [float(gumbel(seed, position, np.array([token]))[0]) for token in tokens]
    assert gumbel(seed, position, np.array(tokens)).tolist() == alone
    assert gumbel(seed, position, np.array(tokens[::-1])).tolist() == alone[::-1]


def test_large_and_small_calls_agree() -> None:
    tokens = np.arange(151_936)
    whole = gumbel(3, 5, tokens)
    parts = [gumbel(3, 5, part) for part in np.array_split(tokens, 100)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.isfinite(whole).all()


def test_the_noise_has_a_smaller_range_than_its_span() -> None:
    smallest, largest = 0.5 * 2.0**-50, 1.0 - 0.5 * 2.0**-50
    assert 0.0 < smallest < largest < 1.0
    assert -math.log(-math.log(largest)) + math.log(-math.log(smallest)) < NOISE_SPAN - 1.0


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_uniform_along_each_axis(axis: str) -> None:
    count, bins = 65_536, 256
    if axis == "token":
        values = uniforms(11, 13, np.arange(count))
    elif axis == "position":
        values = np.concatenate([uniforms(11, position, np.arange(16)) for position in range(count // 16)])
    else:
        values = np.concatenate([uniforms(seed, 13, np.arange(16)) for seed in range(count // 16)])
    counts = np.bincount((values * bins).astype(np.intp), minlength=bins)
    assert abs(deviation(counts, count / bins)) < 4.0
    assert abs(float(values.mean()) - 0.5) < 4.0 * math.sqrt(1 / 12 / count)


@pytest.mark.parametrize(
    ("seed", "position", "token"),
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, -1), (1, -1, 0), (1, 0, -1), (2**32, 0, 0), (0, 2**16, 0), (0, 0, 2**12)],
)
def test_neighbours_are_independent(seed: int, position: int, token: int) -> None:
    """The chi-square of pairs over a 16 by 16 grid and their correlation are small."""
    tokens = np.arange(1, 17)
    keys = [(7 + i % 64, 100 + i // 64) for i in range(4096)]
    first = np.concatenate([uniforms(s, p, tokens) for s, p in keys])
    second = np.concatenate([uniforms(s + seed, p + position, tokens + token) for s, p in keys])
    pairs = (first * 16).astype(np.intp) * 16 + (second * 16).astype(np.intp)
    assert abs(deviation(np.bincount(pairs, minlength=256), len(pairs) / 256)) < 4.0
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 4.0 / math.sqrt(len(pairs))


def test_one_flipped_bit_of_a_key_changes_half_of_the_bits() -> None:
    def bits(seed: int, position: int) -> NDArray[np.uint64]:
        return (uniforms(seed, position, np.arange(64)) * 2.0**32).astype(np.uint64)

    for bit in range(63):
        changed = bits(12345, 678) ^ bits(12345 ^ 1 << bit, 678)
        assert 0.45 < np.bitwise_count(changed).mean() / 32 < 0.55
        if bit < 31:
            changed = bits(12345, 678) ^ bits(12345, 678 ^ 1 << bit)
            assert 0.45 < np.bitwise_count(changed).mean() / 32 < 0.55


def test_the_coin_is_uniform_and_independent_of_the_tokens() -> None:
    coins = np.array([uniform(5, position) for position in range(16_384)])
    assert 0.0 < coins.min() < coins.max() < 1.0
    assert abs(deviation(np.bincount((coins * 64).astype(np.intp), minlength=64), len(coins) / 64)) < 4.0
    other_coins = np.array([uniform(5, position, 1) for position in range(16_384)])
    tokens = np.concatenate([uniforms(5, position, np.array([0])) for position in range(16_384)])
    for others in (other_coins, tokens):
        assert abs(float(np.corrcoef(coins, others)[0, 1])) < 4.0 / math.sqrt(len(coins))
        assert not np.isclose(coins, others, rtol=0.0, atol=1e-12).any()


def test_a_coin_equals_the_noise_of_a_token_with_its_index() -> None:
    """The scalar and the vectorised generator agree; token ids are far below 2^64."""
    token = np.array([2**64 - 1], np.uint64).view(np.intp)
    assert uniform(9, 4) == pytest.approx(float(uniforms(9, 4, token)[0]), rel=1e-12)


@given(seeds, st.integers(0, 1000), st.integers(0, 1000))
def test_derived_seeds(seed: int, one: int, other: int) -> None:
    assert derive_seed(seed, 0) == seed
    assert 0 <= derive_seed(seed, one) < 2**63
    assert (derive_seed(seed, one) == derive_seed(seed, other)) == (one == other)
    assert derive_seed(seed, one + 1) != derive_seed((seed + 1) % 2**63, one + 1)
