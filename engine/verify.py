"""Samples a sequence's next tokens from its rows of logits and verifies its draft."""

from __future__ import annotations

from collections import abc

from msgspec import Struct

from engine.backend import Logits
from engine.contract import EngineError, EngineFault, FinishReason, Logprob, RequestRefused
from engine.grammar import GrammarError, RowMasks
from engine.sampling import BadLogits, Candidates, candidate_logprob, logprob, sample_and_accept
from engine.sequence import Sequence


class VerificationResult(Struct, frozen=True):
    """The tokens that one step appended to a sequence."""

    ids: abc.Sequence[int]
    streamed: abc.Sequence[int]
    """The tokens to stream: `ids` without an end token."""
    logprobs: abc.Sequence[Logprob]
    accepted: int
    """Number of draft tokens among `ids`."""
    reason: FinishReason | None
    """Set if the sequence ends with the last token."""
    error: EngineError | None
    """Set if the sequence cannot continue."""


def verify(
    sequence: Sequence, draft: abc.Sequence[int], rows: Logits, masks: RowMasks | None = None
) -> VerificationResult:
    """Appends to `sequence` the tokens that `rows` emit: one per accepted draft token and one more, up to its end.

    Row j attended to the first j draft tokens, and `masks` returns the grammar mask of a row. The result has an error
    if no token can be sampled from a row, or if the grammar permits no continuation. The tokens before the error are
    appended, as they would be without drafts.
    """

    request, candidates = sequence.request, list[Candidates]()

    def sample(row: int) -> int:
        permitted = None if masks is None else masks(row)
        state = rows[row], sequence.tokens, sequence.prompt_length, sequence.discarded, permitted
        if request.logprobs is not None and request.post_sampling:
            candidates.append(sequence.sampler.candidates(*state))
        if (token := sequence.forced) is not None and (permitted is None or permitted[token]):
            return token
        return sequence.sampler.pick(*state)

    ids: list[int] = []
    logprobs: list[Logprob] = []
    reason: FinishReason | None = None
    error: EngineError | None = None
    accepted = 0
    try:
        for token in sample_and_accept(draft, sample):
            row = len(ids)
            reason = sequence.append(token)
            if request.logprobs is not None and sequence.stop_token is None:
                logprobs.append(
                    candidate_logprob(candidates[row], token, request.logprobs)
                    if request.post_sampling
                    else logprob(rows[row], token, request.logprobs)
                )
            ids.append(token)
            accepted += row < len(draft) and draft[row] == token
            if reason is not None:
                break
    except BadLogits as fault:
        error = EngineFault(str(fault))
    except GrammarError as refusal:
        error = RequestRefused(f"The grammar does not permit any continuation of the output: {refusal}.")
    streamed = ids if sequence.stop_token is None else ids[:-1]
    return VerificationResult(ids, streamed, logprobs, accepted, reason, error)
