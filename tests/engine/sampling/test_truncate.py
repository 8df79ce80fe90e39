"""Candidates and truncation against references in plain Python that sort the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from engine.contract import SamplingParams
from engine.sampling.candidates import (
    BadLogits,
    Candidates,
    Row,
    argmax_token,
    candidates_within,
    nucleus_candidates,
    peak_and_mass,
    top_candidates,
)
from engine.sampling.infill import infill
from engine.sampling.stages import active_stages, run_stages
from engine.sampling.truncate import min_p, top_p, typical_p, xtc
from engine.sampling_params import SamplerStage

SIZES = [1, 2, 5, 17, 40, 257, 700, 4096, 5003]


@st.composite
def rows(draw: st.DrawFn, sizes: Sequence[int] = SIZES) -> Row:
    """Draws rows of very different shapes: flat, peaked, with ties, with banned tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from(sizes))
    row = rng.normal(size=size) * draw(st.sampled_from([0.01, 0.5, 3.0, 20.0]))
    if (decimals := draw(st.sampled_from([None, 2, 0]))) is not None:
        row = row.round(decimals)
    if draw(st.booleans()):
        row[rng.integers(size)] += 8.0
    if draw(st.booleans()):
        row[rng.random(size) < 0.3] = -np.inf
    assume(np.isfinite(row.max()))
    row += draw(st.sampled_from([0.0, 15.0, -200.0]))
    result: Row = row.astype(np.float32)
    result.flags.writeable = False
    return result


def ranked(row: Row) -> list[int]:
    """Returns all tokens that are not banned, most likely first."""
    alive = [token for token in range(len(row)) if math.isfinite(row[token])]
    return sorted(alive, key=lambda token: (-row[token], token))


def shares(row: Row, tokens: Sequence[int]) -> list[float]:
    """Returns the probabilities of `tokens`, renormalised."""
    peak = max(float(row[token]) for token in tokens)
    weights = [math.exp(float(row[token]) - peak) for token in tokens]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def slow_top_p(row: Row, tokens: list[int], share: float) -> list[int]:
    held = 0.0
    for kept, probability in enumerate(shares(row, tokens), 1):
        held += probability
        assume(abs(held - share) > 1e-5)
        if held >= share:
            return tokens[:kept]
    return tokens


def slow_typical_p(row: Row, tokens: list[int], share: float) -> list[int]:
    probabilities = shares(row, tokens)
    assume(min(probabilities) > 0.0)
    entropy = -math.fsum(p * math.log(p) for p in probabilities)
    scores = [abs(-math.log(p) - entropy) for p in probabilities]
    order = sorted(range(len(tokens)), key=lambda i: (round(scores[i], 9), tokens[i]))
    held, kept = 0.0, []
    for i in order:
        held += probabilities[i]
        assume(abs(held - share) > 1e-9)
        kept.append(i)
        if held > share:
            break
    return [tokens[i] for i in sorted(kept)]


def slow_min_p(row: Row, tokens: list[int], share: float) -> list[int]:
    peak = max(float(row[token]) for token in tokens)
    gaps = [peak - float(row[token]) for token in tokens]
    assume(all(gap == 0.0 or abs(gap + math.log(share)) > 1e-9 for gap in gaps))
    return [token for token, gap in zip(tokens, gaps, strict=True) if math.exp(-gap) >= share]


def slow_xtc(row: Row, tokens: list[int], threshold: float) -> list[int]:
    probabilities = shares(row, tokens)
    assume(all(abs(p - threshold) > 1e-12 for p in probabilities))
    above = sum(p >= threshold for p in probabilities)
    return tokens[above - 1 :] if above > 1 and threshold <= 0.5 else tokens


def truncations(params: SamplingParams, *, apply_xtc: bool) -> tuple[SamplerStage, ...]:
    """Returns the active stages that drop candidates."""
    stages = [stage for stage in active_stages(params) if stage not in ("penalties", "dry", "temperature", "xtc")]
    return (*stages, "xtc") if apply_xtc else tuple(stages)


def no_other(stage: SamplerStage, found: Candidates) -> Candidates:
    raise AssertionError(stage)


def slow_truncate(row: Row, params: SamplingParams, apply_xtc: bool) -> list[int]:
    """Returns the tokens that remain after all stages, of those that are not banned."""
    tokens = ranked(row)
    if params.top_k > 0:
        tokens = tokens[: params.top_k]
    if params.typical_p < 1.0:
        tokens = slow_typical_p(row, tokens, params.typical_p)
    if params.top_p < 1.0:
        tokens = slow_top_p(row, tokens, params.top_p)
    if params.min_p > 0.0:
        tokens = slow_min_p(row, tokens, params.min_p)
    return slow_xtc(row, tokens, params.xtc_threshold) if apply_xtc else tokens


@pytest.mark.parametrize(
    ("probabilities", "ends", "left"),
    [
        ([0.4, 0.3, 0.2, 0.1], [0], [0]),  # an end token is likely
        ([0.05, 0.7, 0.2, 0.05], [0], [0, 1]),  # "a" and "abc" are merged with "ab"
        ([0.1, 0.3, 0.3, 0.3], [], [1]),
        ([0.25, 0.25, 0.25, 0.25], [], [1]),  # the other token is likely at first, but not among the likely ones
    ],
)
def test_infill(probabilities: list[float], ends: list[int], left: list[int]) -> None:
    texts = [b"", b"ab", b"abc", b"a"]
    row = np.log(np.array(probabilities, np.float32))
    found = infill(candidates_within(row, 40.0), row, np.array(ends, np.intp), texts.__getitem__)
    assert sorted(found.ids.tolist()) == left


def test_an_improbable_infill_ends() -> None:
    row = np.zeros(9, np.float32)
    row[8] = -9.0
    found = candidates_within(row, 5.0)
    texts = [bytes([65 + token]) for token in range(9)]
    assert infill(found, row, np.array([8]), texts.__getitem__).ids.tolist() == [8]
    row[8] = -np.inf
    assert infill(found, row, np.array([8]), texts.__getitem__).ids.tolist() == [0]


@given(rows(), st.integers(1, 300))
def test_top(row: Row, k: int) -> None:
    found = top_candidates(row, k)
    assert found.ids.tolist() == ranked(row)[:k]
    assert found.logits.tolist() == [float(row[token]) for token in found.ids]


@given(rows(), st.integers(1, 300), st.floats(0.0, 60.0))
def test_reach(row: Row, k: int, reach: float) -> None:
    order, peak = ranked(row), float(row.max())
    assume(all(abs(peak - reach - float(row[token])) > 1e-4 for token in order))
    near = [token for token in order if row[token] >= peak - reach]
    assert candidates_within(row, reach).ids.tolist() == sorted(near)
    assert top_candidates(row, k, reach).ids.tolist() == near[:k]


def test_a_flat_row_is_cut_by_token_id() -> None:
    row = np.zeros(9001, np.float32)
    assert top_candidates(row, 40).ids.tolist() == list(range(40))
    assert argmax_token(row) == 0
    row[[8990, 17]] = 1.0
    assert top_candidates(row, 3).ids.tolist() == [17, 8990, 0]
    assert argmax_token(row) == 17


@given(rows())
def test_peak_and_mass(row: Row) -> None:
    peak, mass = peak_and_mass(row)
    assert peak == row.max()
    assert mass == pytest.approx(math.fsum(math.exp(float(logit) - peak) for logit in row), rel=2e-6)


@given(rows(), st.floats(0.0, 0.9999), st.sampled_from([3.0, 40.0, 4000.0]))
def test_nucleus(row: Row, share: float, reach: float) -> None:
    found = nucleus_candidates(row, share, reach)
    order, peak = ranked(row), float(row.max())
    assume(all(abs(peak - reach - float(row[token])) > 1e-4 for token in order))
    assert found.ids.tolist() == order[: len(found.ids)]
    cut = slow_top_p(row, order, share)
    expected = [token for token in cut if row[token] >= peak - reach]
    assert found.ids[top_p(found.logits, share, found.mass)].tolist() == expected


@given(rows(), st.floats(0.0, 0.9999))
def test_top_p(row: Row, share: float) -> None:
    found = top_candidates(row, 300)
    assert found.ids[top_p(found.logits, share)].tolist() == slow_top_p(row, ranked(row)[:300], share)


@given(rows([1, 2, 5, 40, 300, 3000]), st.floats(0.0, 0.9999))
def test_typical_p(row: Row, share: float) -> None:
    assume(np.ptp(row[np.isfinite(row)]) < 40.0)
    found = candidates_within(row, 100.0)
    assert found.ids[typical_p(found.logits, share)].tolist() == slow_typical_p(row, ranked(row), share)


@given(rows(), st.floats(1e-9, 1.0))
def test_min_p(row: Row, share: float) -> None:
    found = candidates_within(row, 100.0)
    assert found.ids[min_p(found.logits, share)].tolist() == sorted(slow_min_p(row, ranked(row), share))


@given(rows(), st.floats(0.0, 1.0))
@example(np.zeros(3, np.float32), 0.1)
def test_xtc(row: Row, threshold: float) -> None:
    found = top_candidates(row, 300)
    assert found.ids[xtc(found.logits, threshold)].tolist() == slow_xtc(row, ranked(row)[:300], threshold)
    unsorted = candidates_within(row, 1000.0)
    expected = sorted(slow_xtc(row, ranked(row), threshold))
    assert unsorted.ids[xtc(unsorted.logits, threshold)].tolist() == expected


@given(
    rows(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3, 40, 10_000]),
    st.sampled_from([1.0, 0.9, 0.3]),
    st.sampled_from([1.0, 0.95, 0.5, 0.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([0.3, 1.0, 2.5]),
)
def test_all_stages(
    row: Row, apply_xtc: bool, top_k: int, typical: float, top: float, min_share: float, temperature: float
) -> None:
    params = SamplingParams(top_k=top_k, typical_p=typical, top_p=top, min_p=min_share, temperature=temperature)
    assume(np.ptp(row[np.isfinite(row)]) < 38.0 * min(1.0, temperature))
    found = run_stages(row, params, truncations(params, apply_xtc=apply_xtc), no_other)
    assert sorted(found.ids.tolist()) == sorted(slow_truncate(row, params, apply_xtc))


# The cases of llama.cpp's tests/test-sampling.cpp: probabilities, parameter, remaining tokens.
@pytest.mark.parametrize(
    ("stage", "probabilities", "value", "left"),
    [
        (top_p, [0.4, 0.3, 0.2, 0.1], 0.0, [0]),
        (top_p, [0.4, 0.3, 0.2, 0.1], 0.69, [0, 1]),
        (top_p, [0.4, 0.3, 0.2, 0.1], 0.8, [0, 1, 2]),
        (min_p, [0.1, 0.2, 0.3, 0.4], 0.24, [0, 1, 2, 3]),
        (min_p, [0.1, 0.2, 0.3, 0.4], 0.26, [1, 2, 3]),
        (min_p, [0.1, 0.2, 0.3, 0.4], 0.74, [2, 3]),
        (min_p, [0.1, 0.2, 0.3, 0.4], 1.0, [3]),
        (xtc, [0.4, 0.3, 0.2, 0.1], 0.09, [3]),
        (xtc, [0.4, 0.3, 0.2, 0.1], 0.19, [2, 3]),
        (xtc, [0.4, 0.3, 0.2, 0.1], 0.29, [1, 2, 3]),
        (xtc, [0.4, 0.3, 0.2, 0.1], 0.39, [0, 1, 2, 3]),
        (typical_p, [0.97, 0.01, 0.01, 0.01], 0.5, [0]),
        (typical_p, [0.4, 0.2, 0.2, 0.2], 0.5, [1, 2, 3]),
    ],
)
def test_cases_of_llama_cpp(
    stage: Callable[..., Any], probabilities: list[float], value: float, left: list[int]
) -> None:
    kept = stage(np.log(np.array(probabilities)), value)
    assert np.arange(len(probabilities))[kept].tolist() == left


@pytest.mark.parametrize("size", [8, 5000])
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.nan, np.inf], [-np.inf]])
def test_bad_rows(size: int, bad: list[float]) -> None:
    row = np.full(size, -np.inf if bad == [-np.inf] else 1.0, np.float32)
    row[[3, size - 2][: len(bad)]] = bad
    for function in (
        argmax_token,
        peak_and_mass,
        lambda row: candidates_within(row, 40.0),
        lambda row: top_candidates(row, 4),
    ):
        with pytest.raises(BadLogits):
            function(row)
    with pytest.raises(BadLogits):
        nucleus_candidates(row, 0.9, 40.0)
