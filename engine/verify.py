"""Samples a sequence's next tokens from its rows of logits and verifies its draft."""

from __future__ import annotations

from collections import abc

from msgspec import Struct

from engine.backend import Logits
from engine.contract import EngineError, EngineFault, FinishReason, Logprob, RequestRefused
from engine.grammar import GrammarError, RowMasks
from engine.sampling import BadLogits, logprob, sample_and_accept
from engine.sequence import Sequence


class VerificationResult(Struct, frozen=True):
    """The tokens that one step appended to a sequence."""

    ids: abc.Sequence[int]
    shown: abc.Sequence[int]
    """`ids` without an end token: the tokens to stream."""
    logprobs: abc.Sequence[Logprob]
    accepted: int
    """Number of draft tokens among `ids`."""
    reason: FinishReason | None
    error: EngineError | None
    """Set if the sequence cannot continue."""


def verify(
    sequence: Sequence, draft: abc.Sequence[int], rows: Logits, permits: RowMasks | None = None
) -> VerificationResult:
    """Appends to `sequence` the tokens that `rows` emit: one per accepted draft token and one more, up to its end.

    Row j attended to the first j draft tokens; `permits` returns the grammar mask of a row. If no token can be picked,
    or the grammar permits no continuation, the result has an error. The tokens before the error are appended, as they
    would have been in steps of their own.
    """

    def sample(row: int) -> int:
        permitted = None if permits is None else permits(row)
        if (token := sequence.forced) is not None and (permitted is None or permitted[token]):
            return token
        return sequence.sampler.pick(rows[row], sequence.tokens, sequence.prompt_length, sequence.discarded, permitted)

    ids: list[int] = []
    logprobs: list[Logprob] = []
    reason: FinishReason | None = None
    error: EngineError | None = None
    accepted = 0
    try:
        for token in sample_and_accept(draft, sample):
            row = len(ids)
            reason = sequence.append(token)
            if sequence.request.logprobs is not None and sequence.stop_token is None:
                logprobs.append(logprob(rows[row], token, sequence.request.logprobs))
            ids.append(token)
            accepted += row < len(draft) and draft[row] == token
            if reason is not None:
                break
    except BadLogits as fault:
        error = EngineFault(str(fault))
    except GrammarError as refusal:
        error = RequestRefused(f"The grammar does not permit any continuation of the output: {refusal}.")
    shown = ids if sequence.stop_token is None else ids[:-1]
    return VerificationResult(ids, shown, logprobs, accepted, reason, error)
