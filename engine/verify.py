"""Picks a sequence's next tokens from its rows of logits and verifies its draft."""

from __future__ import annotations

from collections import abc

from msgspec import Struct

from engine.backend import Logits
from engine.contract import EngineError, EngineFault, FinishReason, Logprob, RequestRefused
from engine.grammar import GrammarError, Permits
from engine.sampling import BadLogits, accept, logprob
from engine.sequence import Sequence


class VerificationResult(Struct, frozen=True):
    """The tokens picked from a sequence's rows, those of them to stream, and how many drafted ones were accepted."""

    ids: abc.Sequence[int]
    shown: abc.Sequence[int]
    """`ids` without an end token."""
    logprobs: abc.Sequence[Logprob]
    accepted: int
    reason: FinishReason | None
    error: EngineError | None
    """Set if the sequence cannot continue."""


def verify(
    sequence: Sequence, draft: abc.Sequence[int], rows: Logits, permits: Permits | None = None
) -> VerificationResult:
    """Appends to `sequence` the tokens that `rows` emit: one, and one more for each accepted draft token, up to the
    sequence's end. Row j attended to the first j draft tokens; `permits` gives the mask of each row.

    If no token can be picked, or the sequence's grammar cannot be followed further, the result has an error; the tokens
    before it count, as they would have come in steps of their own.
    """

    def pick(row: int) -> int:
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
        for token in accept(draft, pick):
            place = len(ids)
            reason = sequence.append(token)
            if sequence.request.logprobs is not None and sequence.stop_token is None:
                logprobs.append(logprob(rows[place], token, sequence.request.logprobs))
            ids.append(token)
            accepted += place < len(draft) and draft[place] == token
            if reason is not None:
                break
    except BadLogits as fault:
        error = EngineFault(str(fault))
    except GrammarError as refusal:
        error = RequestRefused(f"The text cannot go on in its grammar: {refusal}.")
    shown = ids if sequence.stop_token is None else ids[:-1]
    return VerificationResult(ids, shown, logprobs, accepted, reason, error)
