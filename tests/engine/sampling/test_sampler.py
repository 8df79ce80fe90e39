"""Picks of a sampler: distribution, independence, purity, bans and errors."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.contract import Request, SamplingParams
from engine.sampling import BadLogits, Sampler, candidate_logprob, derive_seed
from engine.sampling.candidates import Row
from engine.sampling.noise import gumbel
from engine.sampling.stages import run_stages
from tests.engine.sampling.test_truncate import no_other, truncations

PURE: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def token_bytes(token: int) -> bytes:
    return b"\n" if token == 7 else b"x"


def sampler(
    seed: int = 1,
    *,
    ends: Sequence[int] = (),
    min_tokens: int = 0,
    ignore_eos: bool = False,
    stop_tokens: tuple[int, ...] = (),
    **params: Any,
) -> Sampler:
    request = Request(
        prompt=(0,),
        sampling=SamplingParams(**params),
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_tokens=stop_tokens,
    )
    return Sampler(request, seed, frozenset(ends), token_bytes)


def random_row(seed: int, size: int = 40, scale: float = 2.0) -> Row:
    row: Row = (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)
    row.flags.writeable = False
    return row


rows = st.builds(random_row, st.integers(0, 2**32), st.sampled_from([1, 2, 40, 300, 5000]), st.floats(0.0, 10.0))
some_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([-1, 0, 1, 5, 40]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "typical_p": st.sampled_from([1.0, 0.8]),
        "repeat_penalty": st.sampled_from([1.0, 1.3]),
        "repeat_last_n": st.sampled_from([0, -1, 64]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "dry_multiplier": st.sampled_from([0.0, 0.8]),
        "xtc_probability": st.sampled_from([0.0, 0.5]),
        "logit_bias": st.sampled_from([(), ((0, 2.5),)]),
    }
)


def softmax(row: Row, params: SamplingParams) -> NDArray[np.float64]:
    """Returns the exact distribution of a pick, [vocabulary]."""
    found = run_stages(row, params, truncations(params, apply_xtc=False), no_other)
    result = np.zeros(len(row))
    result[found.ids] = np.exp((found.logits - found.logits.max()) / params.temperature)
    result /= result.sum()
    return result


def deviation(counts: NDArray[np.intp], expected: NDArray[np.float64]) -> float:
    """Returns Pearson's chi-square in standard deviations from its mean; rare cells are pooled."""
    assert not counts[expected == 0.0].any(), "a token of probability 0 was picked"
    rare = expected < 8.0
    seen = np.append(counts[~rare], counts[rare].sum())
    due = np.append(expected[~rare], expected[rare].sum())
    seen, due = seen[due > 0], due[due > 0]
    freedom = max(1, len(due) - 1)
    return (float(((seen - due) ** 2 / due).sum()) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("params", "count"),
    [
        ({}, 20_000),
        ({**PURE, "temperature": 1.0}, 20_000),
        ({"temperature": 1.7, "top_k": 12, "typical_p": 0.8, "min_p": 0.0}, 5_000),
    ],
)
def test_picks_at_consecutive_positions_follow_the_softmax(params: dict[str, Any], count: int) -> None:
    row, sampling = random_row(5), SamplingParams(**params)
    expected = softmax(row, sampling)
    pick = sampler(99, **params).pick
    picks = np.array([pick(row, range(length), 0) for length in range(1, count + 1)])
    assert deviation(np.bincount(picks, minlength=len(row)), expected * count) < 4.0
    pairs = np.bincount(picks[1:] * len(row) + picks[:-1], minlength=len(row) ** 2)
    assert deviation(pairs, np.outer(expected, expected).ravel() * (count - 1)) < 4.0


def test_picks_of_consecutive_seeds_follow_the_softmax() -> None:
    count = 10_000
    row, sampling = random_row(6), SamplingParams(temperature=1.0, top_k=0)
    expected = softmax(row, sampling)
    picks = np.array([sampler(seed, temperature=1.0, top_k=0).pick(row, range(50), 0) for seed in range(count)])
    assert deviation(np.bincount(picks, minlength=len(row)), expected * count) < 4.0
    pairs = np.bincount(picks[1:] * len(row) + picks[:-1], minlength=len(row) ** 2)
    assert deviation(pairs, np.outer(expected, expected).ravel() * (count - 1)) < 4.0


def test_choices_of_one_request_are_independent() -> None:
    row, sampling = random_row(8), SamplingParams(temperature=1.0)
    expected = softmax(row, sampling)
    one, other = (
        np.array([sampler(derive_seed(seed, index), temperature=1.0).pick(row, range(9), 0) for seed in range(5000)])
        for index in (0, 1)
    )
    pairs = np.bincount(one * len(row) + other, minlength=len(row) ** 2)
    assert deviation(pairs, np.outer(expected, expected).ravel() * 5000) < 4.0


@given(rows, st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.floats(0.05, 3.0))
def test_without_truncation_no_token_is_left_out(row: Row, seed: int, position: int, temperature: float) -> None:
    """The exclusion of tokens beyond the span of the noise changes no pick."""
    scores = row.astype(np.float64) / temperature + gumbel(seed, position, np.arange(len(row)))
    pick = sampler(seed, temperature=temperature, **PURE).pick
    assert pick(row, range(position), 0) == scores.argmax()


@given(rows, st.integers(0, 2**63 - 1), st.integers(0, 1000), some_params)
def test_the_formula(row: Row, seed: int, position: int, params: dict[str, Any]) -> None:
    params |= {"repeat_last_n": 0, "dry_multiplier": 0.0, "xtc_probability": 0.0, "logit_bias": (), "temperature": 0.7}
    sampling = SamplingParams(**params)
    found = run_stages(row, sampling, truncations(sampling, apply_xtc=False), no_other)
    scores = found.logits / 0.7 + gumbel(seed, position, found.ids)
    assert sampler(seed, **params).pick(row, range(position), 0) == found.ids[scores.argmax()]


@given(st.integers(0, 1000), st.sampled_from([3.0, 10.0, 50.0]), some_params, st.booleans(), st.integers(0, 3))
def test_a_dominant_token_is_the_pick_of_all_stages(
    number: int, scale: float, params: dict[str, Any], ignore_eos: bool, min_tokens: int
) -> None:
    row = random_row(number, scale=scale)
    quick, thorough = (sampler(ignore_eos=ignore_eos, min_tokens=min_tokens, ends=(1, 2), **params) for _ in range(2))
    thorough._pick_params = None
    assert quick.pick(row, [5] * 12, 11) == thorough.pick(row, [5] * 12, 11)


@given(rows, some_params, st.integers(0, 3), st.integers(0, 3))
def test_greedy_is_argmax(row: Row, params: dict[str, Any], min_tokens: int, extra_tokens: int) -> None:
    """At temperature 0 the pick is the argmax of a row that no stage changes."""
    params |= {"temperature": 0.0, "logit_bias": (), "dry_multiplier": 0.0, "repeat_last_n": 0}
    subject = sampler(ends=(0,), min_tokens=min_tokens, **params)
    assert subject.pick(row, [0, 1, *[0] * (min_tokens + extra_tokens)], 2) == row.argmax()


@given(rows, some_params, st.integers(0, 2**63 - 1))
def test_a_pick_is_pure(row: Row, params: dict[str, Any], seed: int) -> None:
    """A pick leaves the row, read-only here, unchanged, and depends neither on earlier picks nor on the history's
    type."""
    assume(len(row) > 1)
    history = [token % len(row) for token in (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1)]
    before = row.copy()
    subject = sampler(seed, ends=(1,), min_tokens=9, **params)
    first = subject.pick(row, array("i", history), 5)
    assert np.array_equal(row, before)
    subject.pick(random_row(1, len(row)), history[:7], 5)
    subject.pick(row, history[:9], 5)
    assert subject.pick(row, history, 5) == first
    assert sampler(seed, ends=(1,), min_tokens=9, **params).pick(row, tuple(history), 5) == first


def test_a_history_can_grow_after_a_pick() -> None:
    history = array("i", [1, 2, 3])
    subject = sampler(repeat_penalty=1.2, repeat_last_n=-1, dry_multiplier=1.0, dry_penalty_last_n=-1)
    for _ in range(5):
        history.append(subject.pick(random_row(3), history, 3))
    assert len(history) == 8


def test_end_and_stop_tokens_are_banned_before_min_tokens() -> None:
    row = np.zeros(6, np.float32)
    row[[1, 2, 3]] = [5.0, 4.0, 3.0]
    subject = sampler(ends=(1,), stop_tokens=(2,), min_tokens=2, temperature=0.0)
    assert [subject.pick(row, [0] * (4 + emitted), 4) for emitted in range(4)] == [3, 3, 1, 1]
    for seed in range(200):
        drawn = sampler(seed, ends=(1,), stop_tokens=(2,), min_tokens=2)
        assert drawn.pick(row, [0] * 5, 4) not in (1, 2)


def test_ignore_eos_bans_the_ends_for_good_but_not_the_stop_tokens() -> None:
    row = np.array([0.0, 9.0, 8.0, 0.0], np.float32)
    subject = sampler(ends=(1,), stop_tokens=(2,), ignore_eos=True, temperature=0.0)
    assert subject.pick(row, [0] * 100, 1) == 2


def test_bias_is_added_and_adds_up() -> None:
    row = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    assert sampler(temperature=0.0, logit_bias=((3, 4.0),)).pick(row, [0], 1) == 3
    assert sampler(temperature=0.0, logit_bias=((2, 1.5), (2, 1.0))).pick(row, [0], 1) == 2
    assert sampler(temperature=0.0, logit_bias=((0, -100.0), (1, -math.inf))).pick(row, [0], 1) == 2
    assert sampler(logit_bias=((3, 1e300),)).pick(row, [0], 1) == 3
    assert sampler(temperature=0.0, logit_bias=((0, -1e300),)).pick(row, [0], 1) == 1
    with pytest.raises(AssertionError):
        sampler(logit_bias=((-1, 1.0),))


def test_penalties_come_after_the_bias() -> None:
    row = np.array([1.0, 0.9], np.float32)
    # Token 0 has a bias of 1 and a penalty of 3: (1 + 1) / 3 = 0.67 is below 0.9. The reverse order gives 1 / 3 + 1 =
    # 1.33.
    assert sampler(temperature=0.0, repeat_penalty=3.0, logit_bias=((0, 1.0),)).pick(row, [0], 1) == 1


def test_xtc_acts_with_its_chance() -> None:
    row = np.array([2.0, 1.9, 0.0, -1.0], np.float32)
    subject = sampler(xtc_probability=0.3, xtc_threshold=0.2, temperature=1e-3, **PURE)
    picks = [subject.pick(row, range(length), 0) for length in range(4000)]
    assert set(picks) == {0, 1}
    assert picks.count(1) / 4000 == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    always = sampler(xtc_probability=1.0, xtc_threshold=0.2, temperature=1e-3)
    assert {always.pick(row, range(length), 0) for length in range(100)} == {1}


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e-9])
@pytest.mark.parametrize("truncation", [{}, PURE, {**PURE, "typical_p": 0.9}, {"xtc_probability": 1.0}])
def test_a_tiny_temperature_picks_the_most_likely_token(temperature: float, truncation: dict[str, Any]) -> None:
    row = random_row(2, 5000, 10.0)
    expected = sampler(temperature=1e-6, **truncation).pick(row, [0] * 9, 1)
    assert sampler(temperature=temperature, **truncation).pick(row, [0] * 9, 1) == expected
    tied = np.zeros(50, np.float32)
    drawn = sampler(temperature=temperature, **PURE)
    assert len({drawn.pick(tied, range(length), 0) for length in range(300)}) > 40


@pytest.mark.parametrize("temperature", [0.0, 1e-310, 0.8, 100.0])
@pytest.mark.parametrize("truncation", [{}, PURE, {"top_k": 0}, {**PURE, "min_p": 0.1}, {"typical_p": 0.9, "top_k": 0}])
def test_bad_logits(temperature: float, truncation: dict[str, Any]) -> None:
    for size in (8, 5000):
        for bad in (np.nan, np.inf):
            row = np.ones(size, np.float32)
            row[size // 2] = bad
            with pytest.raises(BadLogits):
                sampler(temperature=temperature, **truncation).pick(row, [0], 1)
        banned = np.full(size, -np.inf, np.float32)
        with pytest.raises(BadLogits):
            sampler(temperature=temperature, **truncation).pick(banned, [0], 1)
        banned[3] = 1.0
        assert sampler(temperature=temperature, **truncation).pick(banned, [0], 1) == 3
        with pytest.raises(BadLogits):
            sampler(temperature=temperature, ends=(3,), ignore_eos=True, **truncation).pick(banned, [0], 1)


def test_an_extreme_temperature_is_uniform() -> None:
    row = random_row(4, 8, 1.0)
    picks = [sampler(3, temperature=100.0, **PURE).pick(row, range(length), 0) for length in range(4000)]
    expected = softmax(row, SamplingParams(temperature=100.0, top_k=0, top_p=1.0, min_p=0.0)) * 4000
    assert deviation(np.bincount(picks, minlength=8), expected) < 4.0


@given(rows, some_params, st.integers(0, 2**32), st.floats(0.0, 1.0))
def test_a_grammar_permits_no_other_tokens(row: Row, params: dict[str, Any], seed: int, share: float) -> None:
    """The pick equals the pick from a row in which the forbidden tokens are banned."""
    permitted = np.random.default_rng(seed).random(len(row)) < share
    assume(permitted.any())
    banned = np.where(permitted, row, -np.inf).astype(np.float32)
    picked = sampler(seed, **params).pick(row, [0], 1, permitted=permitted)
    assert permitted[picked]
    assert picked == sampler(seed, **params).pick(banned, [0], 1)


def test_bans_apply_while_the_grammar_permits_another_token() -> None:
    row = random_row(3)
    permitted = np.zeros(len(row), np.bool_)
    permitted[[5, 9]] = True
    strict = sampler(temperature=0.0, ends=(5,), ignore_eos=True)
    assert strict.pick(row, [0], 1, permitted=permitted) == 9
    permitted[9] = False
    assert strict.pick(row, [0], 1, permitted=permitted) == 5
    with pytest.raises(BadLogits):
        strict.pick(np.full(40, np.nan, np.float32), [0], 1, permitted=permitted)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, top_k=5, top_p=1.0, min_p=0.0),
        SamplingParams(temperature=1.5, top_k=0, top_p=0.8, min_p=0.05),
        SamplingParams(temperature=0.5, top_k=0, typical_p=0.6, logit_bias=((3, 2.0),)),
        SamplingParams(temperature=0.9, presence_penalty=1.5, xtc_probability=1.0, xtc_threshold=0.05),
        SamplingParams(temperature=0.0),
    ],
    ids=str,
)
def test_picks_follow_the_candidates(params: SamplingParams) -> None:
    row = np.random.default_rng(1).normal(size=40).astype(np.float32) * 2
    history, counts, draws = [1, 3, 5], Counter[int](), 4000
    permitted = np.arange(40) % 3 != 0
    samplers = [Sampler(Request(prompt=(1,), sampling=params), seed, frozenset(), token_bytes) for seed in range(draws)]
    counts.update(each.pick(row, history, 3, permitted=permitted) for each in samplers)
    found = samplers[0].candidates(row, history, 3, permitted=permitted)
    for token in found.ids.tolist():
        chance = math.exp(candidate_logprob(found, token, 0).logprob)
        assert counts.pop(token, 0) / draws == pytest.approx(chance, abs=4 * math.sqrt(0.25 / draws))
    assert not counts, "no other token is picked"
    forbidden = candidate_logprob(found, 0, 3)
    assert forbidden.logprob == -math.inf
    assert [token for token, _ in forbidden.top] == found.ids[(-found.logits).argsort()[:3]].tolist()
