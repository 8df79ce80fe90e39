"""Sampling: picks a token from a row of logits, and verifies a draft by its rows.

noise        keyed Gumbel noise: a function of seed, position and token
row_maxima   the maxima of each row's columns, and its two highest logits
row_picks    picks the tokens of all rows of a step at once, for common parameters
row_candidates  the same from the tokens that the backend has selected
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
from engine.sampling.reasoning import ReasoningLimiter
from engine.sampling.row_candidates import UNDECIDED, RowCandidates, pick_candidates
from engine.sampling.row_maxima import RowMaxima
from engine.sampling.row_picks import UNPICKED, PickParams, pick_rows
from engine.sampling.sampler import Sampler

__all__ = [
    "UNDECIDED",
    "UNPICKED",
    "BadLogits",
    "Candidates",
    "PickParams",
    "ReasoningLimiter",
    "RowCandidates",
    "RowMaxima",
    "Sampler",
    "argmax_token",
    "candidate_logprob",
    "derive_seed",
    "logprob",
    "peak_and_mass",
    "pick_candidates",
    "pick_rows",
    "sample_and_accept",
]
