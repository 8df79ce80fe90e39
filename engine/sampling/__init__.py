"""Sampling: picks a token from a row of logits, and verifies a draft by its rows.

noise        keyed Gumbel noise: a function of seed, position and token
peaks        the two highest logits of each row of a step
candidates   selects the most likely tokens of a row without sorting the vocabulary
truncate     top_n_sigma, top_k, typical_p, top_p, min_p, XTC
temperature  fixed and dynamic temperature
repeats      lengths of repeats of the end of a growing history
penalties    repeat, presence and frequency penalties, DRY
infill       merges candidates that begin alike, for fill-in-the-middle
feedback     Mirostat and adaptive-p, whose state follows from the output
stages       runs the stages in the order of a request
sampler      picks the tokens of one request
accept       verifies a draft by sampling the target model
logprobs     log probabilities of a row
reasoning    ends reasoning that exceeds its budget
"""

from engine.sampling.accept import sample_and_accept
from engine.sampling.candidates import BadLogits, Candidates, argmax_token, peak_and_mass
from engine.sampling.logprobs import candidate_logprob, logprob
from engine.sampling.noise import derive_seed
from engine.sampling.peaks import Peak, row_peaks
from engine.sampling.reasoning import ReasoningLimiter
from engine.sampling.sampler import Sampler

__all__ = [
    "BadLogits",
    "Candidates",
    "Peak",
    "ReasoningLimiter",
    "Sampler",
    "argmax_token",
    "candidate_logprob",
    "derive_seed",
    "logprob",
    "peak_and_mass",
    "row_peaks",
    "sample_and_accept",
]
