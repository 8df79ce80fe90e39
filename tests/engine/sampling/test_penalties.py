"""Penalties and DRY against naive references, and the cases of llama.cpp's own tests."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.contract import SamplingParams
from engine.sampling.candidates import Row
from engine.sampling.penalties import DryPenalty, apply_penalties
from engine.sampling.repeats import last_tokens, prefix_matches
from engine.text import TokenBytes

VOCABULARY = 12
histories = st.lists(st.integers(0, VOCABULARY - 1), max_size=60)
repeats = st.builds(
    lambda unit, times, tail: (unit * times + tail)[-80:],
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.integers(1, 8),
    st.lists(st.integers(0, 4), max_size=6),
)
windows = st.sampled_from([-1, 0, 1, 5, 64])


def letters(token: int) -> bytes:
    """Returns the bytes of a token: token 3 is a line feed, token 4 contains a line feed, the others are no
    breakers."""
    return {3: b"\n", 4: b"x\ny"}.get(token, b"x")


def plain(token: int) -> bytes:
    return b"x"


def random_row(seed: int) -> Row:
    row: Row = np.random.default_rng(seed).normal(size=VOCABULARY).astype(np.float32) * 4
    row[seed % VOCABULARY] = -np.inf
    return row


def probabilities(row: Row) -> list[float]:
    weights = np.exp(row.astype(np.float64) - row.max())
    return [float(weight) for weight in weights / weights.sum()]


def window(history: Sequence[int], last_n: int) -> list[int]:
    return list(history) if last_n < 0 else list(history)[max(0, len(history) - last_n) :]


def slow_penalties(row: Row, history: Sequence[int], params: SamplingParams) -> list[float]:
    result = [float(logit) for logit in row]
    seen = window(history, params.repeat_last_n)
    for token in set(seen):
        if result[token] <= 0:
            result[token] *= params.repeat_penalty
        else:
            result[token] /= params.repeat_penalty
        result[token] -= seen.count(token) * params.frequency_penalty + params.presence_penalty
    return result


def slow_dry(row: Row, history: Sequence[int], params: SamplingParams, token_bytes: TokenBytes) -> list[float]:
    """Returns the logits after DRY; compares the end of the history with the tokens before every earlier position."""
    result = [float(logit) for logit in row]
    seen = window(history, params.dry_penalty_last_n)
    breakers = {t for t in range(VOCABULARY) if any(b.encode() in token_bytes(t) for b in params.dry_sequence_breakers)}
    longest: dict[int, int] = {}
    for position in range(len(seen) - 1):
        size = 0
        while size <= position and seen[position - size] == seen[-1 - size] and seen[-1 - size] not in breakers:
            size += 1
        longest[seen[position + 1]] = max(size, longest.get(seen[position + 1], 0))
    for token, size in longest.items():
        if size >= params.dry_allowed_length and token not in breakers:
            result[token] -= params.dry_multiplier * params.dry_base ** (size - params.dry_allowed_length)
    return result


@given(histories, windows)
def test_last_tokens(history: list[int], last_n: int) -> None:
    assert list(last_tokens(array("i", history), last_n)) == window(history, last_n)


@given(
    st.integers(0, 1000),
    histories,
    windows,
    st.sampled_from([1.0, 1.1, 0.5, 50.0]),
    st.floats(-3, 3),
    st.floats(-3, 3),
)
def test_penalties(
    seed: int, history: list[int], last_n: int, repeat: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(
        repeat_last_n=last_n, repeat_penalty=repeat, presence_penalty=presence, frequency_penalty=frequency
    )
    row = random_row(seed)
    expected = slow_penalties(row, history, params)
    apply_penalties(row, array("i", history), params)
    assert row.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(
    st.integers(0, 1000),
    histories | repeats,
    windows,
    st.sampled_from([0.8, 2.0]),
    st.sampled_from([1.0, 1.1, 1.75]),
    st.sampled_from([0, 1, 2, 4, 20]),
    st.sampled_from([(), ("\n",), ("y", ""), ("absent",)]),
)
def test_dry(
    seed: int, history: list[int], last_n: int, multiplier: float, base: float, allowed: int, breakers: tuple[str, ...]
) -> None:
    params = SamplingParams(
        dry_penalty_last_n=last_n,
        dry_multiplier=multiplier,
        dry_base=base,
        dry_allowed_length=allowed,
        dry_sequence_breakers=breakers,
    )
    row = random_row(seed)
    used = SamplingParams(
        dry_penalty_last_n=last_n,
        dry_multiplier=multiplier,
        dry_base=base,
        dry_allowed_length=allowed,
        dry_sequence_breakers=tuple(filter(None, breakers)),
    )
    expected = slow_dry(row, history, used, letters)
    DryPenalty(params, letters).apply(row, array("i", history))
    assert row.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(repeats)
def test_prefix_matches(tokens: list[int]) -> None:
    expected = [0] * len(tokens)
    for at in range(1, len(tokens)):
        while at + expected[at] < len(tokens) and tokens[expected[at]] == tokens[at + expected[at]]:
            expected[at] += 1
    assert prefix_matches(tokens) == expected


@given(st.data(), windows, st.sampled_from([0, 1, 2]), st.sampled_from([(), ("\n",)]))
def test_dry_of_a_growing_history(data: st.DataObject, last_n: int, allowed: int, breakers: tuple[str, ...]) -> None:
    """Tokens, rejected drafts, context shifts and jumps in any order: each row is that of a new sampler."""
    assume(last_n != 0)
    params = SamplingParams(
        dry_multiplier=0.8, dry_penalty_last_n=last_n, dry_allowed_length=allowed, dry_sequence_breakers=breakers
    )
    own, history = DryPenalty(params, letters), array("i", data.draw(repeats))
    drafts = own.fork()
    for _ in range(data.draw(st.integers(1, 8))):
        penalty, tokens = own, array("i", data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
        match data.draw(st.sampled_from(["token", "draft", "shift", "jump"])):
            case "token":
                history += tokens
            case "shift":
                del history[2 : len(history) // 2]
            case "jump":
                history += tokens * 300
        is_draft = data.draw(st.booleans())
        given_history = history + tokens if is_draft else history
        row = random_row(1)
        expected = slow_dry(row, given_history[-400:], params, letters) if last_n > 0 else None
        fresh = row.copy()
        DryPenalty(params, letters).apply(fresh, array("i", given_history))
        (drafts if is_draft else penalty).apply(row, array("i", given_history))
        assert row.tolist() == fresh.tolist()
        assert expected is None or row.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


# The cases of llama.cpp's tests/test-sampling.cpp.
@pytest.mark.parametrize(
    ("history", "repeat", "frequency", "presence", "expected"),
    [
        ([0], 50.0, 0.0, 0.0, [0, 0.25, 0.25, 0.25, 0.25]),
        ([0, 1, 2], 50.0, 0.0, 0.0, [0, 0, 0, 0.5, 0.5]),
        ([0, 1, 2, 0, 0], 50.0, 0.0, 0.0, [0, 0, 0, 0.5, 0.5]),
        ([0], 1.0, 5.0, 5.0, [0.000011, 0.249997, 0.249997, 0.249997, 0.249997]),
        ([0, 1, 2], 1.0, 5.0, 5.0, [0.000023, 0.000023, 0.000023, 0.499966, 0.499966]),
        ([0, 1, 2, 0, 0], 1.0, 5.0, 5.0, [0.000000, 0.000023, 0.000023, 0.499977, 0.499977]),
    ],
)
def test_penalty_cases_of_llama_cpp(
    history: list[int], repeat: float, frequency: float, presence: float, expected: list[float]
) -> None:
    row = np.log(np.full(5, 0.2, np.float32))
    params = SamplingParams(repeat_penalty=repeat, frequency_penalty=frequency, presence_penalty=presence)
    apply_penalties(row, history, params)
    assert probabilities(row) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("history", "multiplier", "allowed", "last_n", "breaker", "expected"),
    [
        ([0, 1], 1.0, 2, 4, None, [0.25] * 4),
        ([0, 1, 2, 0, 1], 1.0, 2, 5, None, [0.296923, 0.296923, 0.109232, 0.296923]),
        ([0, 1, 3, 4, 0, 1], 1.0, 2, 6, 3, [0.2] * 5),
        ([0, 1, 2, 0, 1], 2.0, 2, 5, None, [0.241818, 0.241818, 0.032727, 0.241818, 0.241818]),
        ([0, 1, 2, 3, 4, 0, 1], 1.0, 4, 7, None, [0.2] * 5),
    ],
)
def test_dry_cases_of_llama_cpp(
    history: list[int], multiplier: float, allowed: int, last_n: int, breaker: int | None, expected: list[float]
) -> None:
    row = np.zeros(len(expected), np.float32)
    params = SamplingParams(
        dry_multiplier=multiplier, dry_base=1.1, dry_allowed_length=allowed, dry_penalty_last_n=last_n
    )
    DryPenalty(params, lambda token: b"\n" if token == breaker else b"x").apply(row, history)
    assert probabilities(row) == pytest.approx(expected, abs=1e-5)


def test_a_huge_dry_penalty_stays_finite() -> None:
    row = np.zeros(3, np.float32)
    params = SamplingParams(dry_multiplier=100.0, dry_base=100.0, dry_penalty_last_n=-1)
    DryPenalty(params, plain).apply(row, [1] * 5000)
    assert row[1] < -1e29
    assert np.isfinite(row).all()


@pytest.mark.parametrize("history", [[7] * 100_000, [1, 2] * 50_000, [*range(9), 1] * 10_000, [0, *[5] * 99_999]])
def test_dry_takes_linear_time(history: list[int]) -> None:
    row = np.zeros(VOCABULARY, np.float32)
    params = SamplingParams(dry_multiplier=0.8, dry_penalty_last_n=-1)
    start = time.perf_counter()
    DryPenalty(params, plain).apply(row, array("i", history))
    assert time.perf_counter() - start < 1.0
    assert math.isfinite(row.min())


def test_token_bytes_are_looked_up_once() -> None:
    looked_up: list[int] = []

    def token_bytes(token: int) -> bytes:
        looked_up.append(token)
        return b"x"

    dry = DryPenalty(SamplingParams(dry_multiplier=0.8), token_bytes)
    for _ in range(3):
        dry.apply(np.zeros(VOCABULARY, np.float32), [1, 2, 3, 1, 2])
    assert sorted(looked_up) == [1, 2, 3]
