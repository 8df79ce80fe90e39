"""Verification by sampling the target: the emitted tokens do not depend on the draft."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.contract import Request, SamplingParams
from engine.sampling import Sampler, sample_and_accept
from engine.sampling.candidates import Row

VOCABULARY = 20
PROMPT = (1, 2, 3)
SAMPLING = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.2, repeat_penalty=1.3, frequency_penalty=0.2, dry_multiplier=0.8),
    SamplingParams(top_k=0, top_p=1.0, min_p=0.0, xtc_probability=0.5, xtc_threshold=0.05, typical_p=0.9),
    SamplingParams(mirostat=1, mirostat_tau=2.0, mirostat_eta=0.9),
    SamplingParams(mirostat=2, mirostat_tau=1.0, mirostat_eta=0.9),
    SamplingParams(adaptive_target=0.4, adaptive_decay=0.3, min_p=0.01, dynatemp_range=0.5),
    SamplingParams(samplers=("temperature", "top_k", "penalties", "infill"), repeat_penalty=2.0, top_k=5),
]


@pytest.mark.parametrize(
    ("samples", "emitted"),
    [
        ([5, 6, 7, 8], [5, 6, 7, 8]),
        ([5, 6, 9, 8], [5, 6, 9]),
        ([9, 6, 7, 8], [9]),
    ],
)
def test_up_to_the_first_difference(samples: list[int], emitted: list[int]) -> None:
    sampled: list[int] = []

    def sample(row: int) -> int:
        sampled.append(row)
        return samples[row]

    assert list(sample_and_accept([5, 6, 7], sample)) == emitted
    assert sampled == list(range(len(emitted)))


def test_an_empty_draft_samples_one_row() -> None:
    assert list(sample_and_accept([], lambda row: 40 + row)) == [40]


def test_a_row_is_sampled_only_when_the_iterator_is_advanced() -> None:
    sampled: list[int] = []

    def sample(row: int) -> int:
        sampled.append(row)
        return 5 + row

    tokens = sample_and_accept([5, 6, 7], sample)
    assert sampled == []
    assert next(tokens) == 5
    assert sampled == [0]
    assert next(tokens) == 6
    assert sampled == [0, 1]


def model(history: Sequence[int]) -> Row:
    """Returns a row that depends on the whole history."""
    rng = np.random.default_rng([len(history), *history])
    return (rng.normal(size=VOCABULARY) * 3).astype(np.float32)


def run(sampler: Sampler, propose: Callable[[array[int]], list[int]], count: int) -> list[int]:
    """Returns `count` tokens generated with drafts; a row depends on the history and on the draft tokens before it."""
    history = array("i", PROMPT)
    while len(history) < len(PROMPT) + count:
        draft = propose(history)
        before = [*history]
        rows = [model([*before, *draft[:j]]) for j in range(len(draft) + 1)]
        for token in sample_and_accept(draft, lambda j, rows=rows: sampler.sample(rows[j], history, len(PROMPT))):  # type: ignore[misc]
            history.append(token)
    return [*history[len(PROMPT) : len(PROMPT) + count]]


@pytest.mark.parametrize("params", SAMPLING)
@settings(max_examples=40)
@given(st.integers(0, 2**63 - 1), st.data())
def test_no_draft_changes_a_token(params: SamplingParams, seed: int, data: st.DataObject) -> None:
    request = Request(prompt=PROMPT, sampling=params, min_tokens=3)
    own, other = (Sampler(request, seed, frozenset({0}), lambda token: b"\n" if token == 7 else b"x") for _ in "12")
    drafts = own.for_drafts(independent=False)
    alone = run(other, lambda history: [], 12)

    def propose(history: array[int]) -> list[int]:
        drafts.pick(model(history), history, len(PROMPT))  # the draft model's picks advance no state
        right = alone[len(history) - len(PROMPT) :][: data.draw(st.integers(0, 4))]
        return right + data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))

    assert run(own, propose, 12) == alone
