"""20,000 samples at one position follow the exact softmax of what truncation left, with any draft.

The law, and the chance that a guess is right, are computed here anew, from their definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.contract import Request, SamplingParams
from engine.sampling import Sampler, accept, likeliest
from engine.sampling.candidates import Row
from tests.engine.sampling.test_sampler import deviation, piece

SAMPLES, FEWER = 20_000, 2_000
VOCABULARY, PROMPT, POSITION = 200, 30, 37
HISTORY = range(POSITION)
Chances = NDArray[np.float64]

TARGET: Row = (np.random.default_rng(1).normal(size=VOCABULARY) * 2).astype(np.float32)
DRAFT: Row = TARGET + np.random.default_rng(2).normal(size=VOCABULARY).astype(np.float32)
"""The row of a model that sees the world much as the target does."""

GUESSES: dict[str, Callable[[Sampler], int]] = {
    "shared": lambda sampler: sampler.pick(DRAFT, HISTORY, PROMPT),
    "greedy": lambda sampler: likeliest(DRAFT),
    "off": lambda sampler: sampler.apart().pick(DRAFT, HISTORY, PROMPT),
}
"""How a draft model picks, by the names of the settings."""
LAWS = [
    SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.05),
    SamplingParams(temperature=0.7, top_k=30, top_p=0.9, min_p=0.02),
]


def softmax(logits: Chances) -> Chances:
    weights = np.exp(logits - logits.max())
    shares: Chances = weights / weights.sum()
    return shares


def law(row: Row, params: SamplingParams) -> Chances:
    """Softmax at the temperature of what top_k, top_p and min_p, each at temperature 1, leave of a row."""
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
    """The exact chance that a draft token is right, by its source.

    With the same Gumbel noise both models pick token i with chance 1 / sum over j of max(p_j / p_i, q_j / q_i)
    (Daliri, Musco, Suresh 2024). That is never less than p_i q_i, the chance if they pick apart.
    """
    both = ((target > 0) & (draft > 0)).nonzero()[0]
    shared = sum(1 / np.maximum(target / target[i], draft / draft[i]).sum() for i in both)
    return {"shared": float(shared), "greedy": float(target[DRAFT.argmax()]), "off": float(target @ draft)}


def emitted(sampler: Sampler, *draft: int) -> int:
    """The token at the position, after a draft was verified there as the engine does it."""
    return next(accept(draft, lambda row: sampler.pick(TARGET, HISTORY, PROMPT)))


@pytest.mark.parametrize("params", LAWS)
def test_every_sample_follows_the_law_with_any_draft(params: SamplingParams) -> None:
    request = Request(prompt=(0,) * PROMPT, sampling=params)
    samplers = [Sampler(request, seed, frozenset(), piece) for seed in range(SAMPLES)]
    chances = law(TARGET, params)
    alone = [emitted(sampler) for sampler in samplers]
    assert deviation(np.bincount(alone, minlength=VOCABULARY), chances * SAMPLES) < 4.0
    for name, due in agreement(chances, law(DRAFT, params)).items():
        some = samplers if name == "shared" else samplers[:FEWER]
        guesses = [GUESSES[name](sampler) for sampler in some]
        drawn = [emitted(sampler, guess) for sampler, guess in zip(some, guesses, strict=True)]
        assert drawn == alone[: len(some)]
        assert deviation(np.bincount(drawn, minlength=VOCABULARY), chances * len(some)) < 4.0
        right = sum(map(int.__eq__, guesses, drawn)) / len(some)
        assert right == pytest.approx(due, abs=4 * math.sqrt(due * (1 - due) / len(some))), name


@pytest.mark.parametrize("params", LAWS)
def test_the_same_noise_agrees_most(params: SamplingParams) -> None:
    chances = agreement(law(TARGET, params), law(DRAFT, params))
    assert chances["shared"] > 1.2 * max(chances["greedy"], chances["off"])
