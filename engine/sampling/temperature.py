"""The temperature stage, with a fixed or a dynamic temperature, as llama.cpp's `temp_ext` sampler defines it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.sampling_params import SamplingParams

# Minimum divisor of logits. Division by a lower temperature would overflow, and would give the same picks.
MIN_TEMPERATURE = 1e-300


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the probabilities of finite logits."""
    weights: NDArray[np.float64] = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights


def scaled(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Returns the logits less their maximum, divided by the temperature."""
    scores: NDArray[np.float64] = logits - logits.max()
    scores /= max(temperature, MIN_TEMPERATURE)
    return scores


def effective_temperature(logits: NDArray[np.float64], params: SamplingParams) -> float:
    """Returns the temperature for candidates with these logits.

    A dynamic temperature (Zhu et al. 2023) rises from `temperature - dynatemp_range`, but at least 0, to `temperature +
    dynatemp_range` with the entropy of the candidates, as a share of that of equally likely candidates.
    """
    if params.dynatemp_range <= 0.0:
        return params.temperature
    if len(logits) < 2:
        return 1.0
    probabilities = softmax(logits)
    positive = probabilities[probabilities > 0.0]
    share = -float((positive * np.log(positive)).sum()) / math.log(len(logits))
    low = max(0.0, params.temperature - params.dynatemp_range)
    high = params.temperature + params.dynatemp_range
    return low + (high - low) * float(min(max(share, 0.0), 1.0) ** params.dynatemp_exponent)
