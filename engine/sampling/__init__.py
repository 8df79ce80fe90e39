"""Sampling: picks a token from a row of logits, and verifies a draft by its rows.

noise       keyed Gumbel noise: a function of seed, position and token
candidates  selects the most likely tokens of a row without sorting the vocabulary
truncate    top_k, typical_p, top_p, min_p, XTC
penalties   repeat, presence and frequency penalties, DRY
sampler     applies all stages in order for one request
accept      verifies a draft by sampling the target model
logprobs    log probabilities of a row
reasoning   ends reasoning that exceeds its budget
"""

from engine.sampling.accept import sample_and_accept
from engine.sampling.candidates import BadLogits, Candidates, argmax_token, peak_and_mass
from engine.sampling.logprobs import candidate_logprob, logprob
from engine.sampling.noise import derive_seed
from engine.sampling.reasoning import ReasoningLimiter
from engine.sampling.sampler import Sampler

__all__ = [
    "BadLogits",
    "Candidates",
    "ReasoningLimiter",
    "Sampler",
    "argmax_token",
    "candidate_logprob",
    "derive_seed",
    "logprob",
    "peak_and_mass",
    "sample_and_accept",
]
