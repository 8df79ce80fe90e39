"""Sampling: from a row of logits to a token, and from a draft's rows to the accepted tokens.

noise       keyed Gumbel noise: randomness as a function of seed, position and token
candidates  the most likely tokens of a row, without sorting the vocabulary
truncate    top_k, typical_p, top_p, min_p, XTC
penalties   repeat, presence and frequency penalties, DRY
sampler     one request's sampler: all stages in order
accept      verification of a draft by sampling the target
logprobs    log probabilities of a row
reasoning   the limit on reasoning tokens
"""

from engine.sampling.accept import sample_and_accept
from engine.sampling.candidates import BadLogits, argmax_token, peak_and_mass
from engine.sampling.logprobs import logprob
from engine.sampling.noise import derive_seed
from engine.sampling.reasoning import ReasoningLimiter
from engine.sampling.sampler import Sampler

__all__ = [
    "BadLogits",
    "ReasoningLimiter",
    "Sampler",
    "argmax_token",
    "derive_seed",
    "logprob",
    "peak_and_mass",
    "sample_and_accept",
]
