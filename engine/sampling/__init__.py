"""From logits to tokens: penalties, truncation, keyed noise, verification of drafts, log probabilities.

noise       randomness as a function of seed, position and token: the law of a pick
candidates  the likely tokens of a row, without sorting the vocabulary
truncate    top_k, typical_p, top_p, min_p, XTC
penalties   repeat, presence and frequency penalties, DRY
sampler     all of it for one request
accept      drafts against rows
logprobs    what to report of a row
budget      ends reasoning that has become too long
"""

from engine.sampling.accept import accept
from engine.sampling.budget import Budget
from engine.sampling.candidates import BadLogits, likeliest, spread
from engine.sampling.logprobs import logprob
from engine.sampling.noise import derive
from engine.sampling.sampler import Sampler

__all__ = ["BadLogits", "Budget", "Sampler", "accept", "derive", "likeliest", "logprob", "spread"]
