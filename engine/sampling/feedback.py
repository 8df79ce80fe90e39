"""Samplers whose distribution depends on the probabilities of the tokens emitted before: Mirostat and adaptive-p.

The definitions are llama.cpp's. The state of a sampler advances once for each token that is sampled for the output, so
it is a function of the output alone, with or without drafts.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.sampling.candidates import Candidates, Row, candidates_within, top_candidates
from engine.sampling.noise import NOISE_SPAN
from engine.sampling.temperature import scaled, softmax
from engine.sampling_params import SamplingParams

# Most likely tokens from which Mirostat estimates the exponent of Zipf's law.
_ZIPF_TOKENS = 100
# adaptive-p: width of the distribution around the target, logit at the target, and sharpness of the decay.
_WIDTH = 0.3
_PEAK_LOGIT = 5.0
_SHARPNESS = 10.0


class Mirostat:
    """Mirostat (Basu et al. 2021): truncates so that the surprise of the output stays near `mirostat_tau` bits.

    Version 1 keeps the k most likely tokens, with k from an estimate of Zipf's law. Version 2 keeps the tokens whose
    surprise is at most `mu`.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._mu = 2.0 * params.mirostat_tau
        """Maximum surprise in bits."""

    def select(self, row: Row) -> Candidates:
        """Returns the kept tokens with their logits divided by the temperature. Raises BadLogits."""
        temperature = self._params.temperature
        if self._params.mirostat == 1:
            k = self._zipf_tokens(scaled(top_candidates(row, _ZIPF_TOKENS).logits, temperature), len(row))
            found = top_candidates(row, k, NOISE_SPAN * temperature)
            return found._replace(logits=scaled(found.logits, temperature))
        found = candidates_within(row, NOISE_SPAN * temperature)
        found = found._replace(logits=scaled(found.logits, temperature))
        kept = -np.log2(softmax(found.logits)) <= self._mu
        return found.select(kept if kept.any() else np.array([int(found.logits.argmax())]))

    def advance(self, probability: float) -> None:
        """Moves `mu` after a token that had this probability among the kept tokens."""
        surprise = -math.log2(max(probability, 1e-300))
        self._mu -= self._params.mirostat_eta * (surprise - self._params.mirostat_tau)

    def _zipf_tokens(self, logits: NDArray[np.float64], vocabulary: int) -> int:
        """Returns the number of tokens to keep. `logits` are those of the most likely tokens, in descending order."""
        ratios = -np.diff(logits)
        steps = np.log(np.arange(2, len(logits) + 1) / np.arange(1, len(logits)))
        exponent = float((steps * ratios).sum() / (steps * steps).sum()) if len(steps) else math.nan
        excess = exponent - 1.0
        if not math.isfinite(exponent) or exponent <= 0.0 or excess == 0.0:
            return 1
        # In logarithms: the power of 2 overflows for a large `mu`.
        share = math.log(excess / -math.expm1(-excess * math.log(vocabulary)))
        size = (share + self._mu * math.log(2.0)) / exponent
        return max(1, min(vocabulary, int(math.exp(min(size, math.log(vocabulary) + 1.0)))))


class AdaptiveP:
    """adaptive-p (llama.cpp): prefers tokens with a probability near a target, which is moved so that the average
    probability of the output approaches `adaptive_target`."""

    def __init__(self, params: SamplingParams) -> None:
        self._target = params.adaptive_target
        self._decay = params.adaptive_decay
        self._weighted_sum = self._target / (1.0 - self._decay)
        self._total_weight = 1.0 / (1.0 - self._decay)

    def reshape(self, found: Candidates) -> Candidates:
        """Returns the candidates with logits that fall with the distance of the probability from the target. The result
        has the `probabilities` of `found`."""
        target = min(max(2.0 * self._target - self._weighted_sum / self._total_weight, 0.0), 1.0)
        probabilities = softmax(found.logits)
        distance = np.abs(probabilities - target) / _WIDTH
        logits = _PEAK_LOGIT - _SHARPNESS * distance * distance / (1.0 + distance)
        return Candidates(found.ids, logits, probabilities=probabilities)

    def advance(self, probability: float) -> None:
        """Adds the probability that an emitted token had before `reshape` to the average."""
        self._weighted_sum = probability + self._decay * self._weighted_sum
        self._total_weight = 1.0 + self._decay * self._total_weight
