"""20,000 samples at one position follow the exact softmax of the truncated candidates, with any draft.

The distribution and the acceptance rates are computed here independently, from their definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.contract import Request, SamplingParams
from engine.sampling import Sampler, argmax_token, sample_and_accept
from engine.sampling.candidates import Row
from tests.engine.sampling.test_sampler import deviation, token_bytes

SAMPLES, FEWER_SAMPLES = 20_000, 2_000
VOCABULARY, PROMPT, POSITION = 200, 30, 37
HISTORY = range(POSITION)
Chances = NDArray[np.float64]

TARGET: Row = (np.random.default_rng(1).normal(size=VOCABULARY) * 2).astype(np.float32)
# The row of a draft model that is similar to the target.
DRAFT: Row = TARGET + np.random.default_rng(2).normal(size=VOCABULARY).astype(np.float32)

# Sampling of draft tokens, by the names of the settings.
DRAFTS: dict[str, Callable[[Sampler], int]] = {
    "shared": lambda sampler: sampler.pick(DRAFT, HISTORY, PROMPT),
    "greedy": lambda sampler: argmax_token(DRAFT),
    "off": lambda sampler: sampler.for_drafts(independent=True).pick(DRAFT, HISTORY, PROMPT),
}
PARAMS = [
    SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.05),
    SamplingParams(temperature=0.7, top_k=30, top_p=0.9, min_p=0.02),
]


def softmax(logits: Chances) -> Chances:
    weights = np.exp(logits - logits.max())
    shares: Chances = weights / weights.sum()
    return shares


def distribution(row: Row, params: SamplingParams) -> Chances:
    """Returns the softmax, at the temperature, of the tokens that top_k, top_p and min_p keep at temperature 1."""
    logits = row.astype(np.float64)
    left = np.argsort(-logits)[: params.top_k or VOCABULARY]
    held = softmax(logits[left]).cumsum()
    left = left[: int((held < params.top_p).sum()) + 1]
    shares = softmax(logits[left])
    left = left[shares >= params.min_p * shares[0]]
    chances = np.zeros(VOCABULARY)
    chances[left] = softmax(logits[left] / params.temperature)
    return chances


def agreement(target: Chances, draft: Chances) -> dict[str, float]:
    """Returns the exact acceptance rate of a draft token, by its source.

    With the same Gumbel noise both models pick token i with chance 1 / sum over j of max(p_j / p_i, q_j / q_i)
    (Daliri, Musco, Suresh 2024). This chance is never less than p_i q_i, the chance with independent noise.
    """
    both = ((target > 0) & (draft > 0)).nonzero()[0]
    shared = sum(1 / np.maximum(target / target[i], draft / draft[i]).sum() for i in both)
    return {"shared": float(shared), "greedy": float(target[DRAFT.argmax()]), "off": float(target @ draft)}


def emitted(sampler: Sampler, *draft: int) -> int:
    """Returns the token that the verification of `draft` emits at the position."""
    return next(sample_and_accept(draft, lambda row: sampler.pick(TARGET, HISTORY, PROMPT)))


@pytest.mark.parametrize("params", PARAMS)
def test_samples_follow_the_distribution_with_any_draft(params: SamplingParams) -> None:
    request = Request(prompt=(0,) * PROMPT, sampling=params)
    samplers = [Sampler(request, seed, frozenset(), token_bytes) for seed in range(SAMPLES)]
    chances = distribution(TARGET, params)
    alone = [emitted(sampler) for sampler in samplers]
    assert deviation(np.bincount(alone, minlength=VOCABULARY), chances * SAMPLES) < 4.0
    for name, due in agreement(chances, distribution(DRAFT, params)).items():
        some = samplers if name == "shared" else samplers[:FEWER_SAMPLES]
        drafted = [DRAFTS[name](sampler) for sampler in some]
        drawn = [emitted(sampler, token) for sampler, token in zip(some, drafted, strict=True)]
        assert drawn == alone[: len(some)]
        assert deviation(np.bincount(drawn, minlength=VOCABULARY), chances * len(some)) < 4.0
        right = sum(map(int.__eq__, drafted, drawn)) / len(some)
        assert right == pytest.approx(due, abs=4 * math.sqrt(due * (1 - due) / len(some))), name


@pytest.mark.parametrize("params", PARAMS)
def test_the_same_noise_agrees_most(params: SamplingParams) -> None:
    chances = agreement(distribution(TARGET, params), distribution(DRAFT, params))
    assert chances["shared"] > 1.2 * max(chances["greedy"], chances["off"])
