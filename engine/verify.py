"""Picks a stream's next tokens from its rows of logits, verifying its draft on the way."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from engine.backend import Logits
from engine.contract import EngineError, EngineFault, FinishReason, Logprob, RequestRefused
from engine.grammar import GrammarError, Permits
from engine.sampling import BadLogits, accept, logprob
from engine.streams import Stream


class Verdict(Struct, frozen=True):
    """What a stream's rows came to: the tokens picked, those to show, and how many were drafted rightly."""

    ids: Sequence[int]
    shown: Sequence[int]
    """`ids` without a token that ends the stream."""
    logprobs: Sequence[Logprob]
    accepted: int
    reason: FinishReason | None
    error: EngineError | None
    """Why nothing can follow, if the stream cannot go on."""


def verify(stream: Stream, draft: Sequence[int], rows: Logits, permits: Permits | None = None) -> Verdict:
    """Appends to `stream` the tokens that `rows` emit: one, and one more for each draft token that was right, up to
    the stream's end. Row j is the one that saw the first j draft tokens, and `permits` tells what it may emit.

    Where nothing can be picked, or the stream's grammar cannot be followed further, that is the verdict's error; the
    tokens before it count, as they would have come in steps of their own.
    """

    def pick(row: int) -> int:
        permitted = None if permits is None else permits(row)
        if (token := stream.forced) is not None and (permitted is None or permitted[token]):
            return token
        return stream.sampler.pick(rows[row], stream.tokens, stream.prompt_length, stream.forgotten, permitted)

    ids: list[int] = []
    logprobs: list[Logprob] = []
    reason: FinishReason | None = None
    error: EngineError | None = None
    accepted = 0
    try:
        for token in accept(draft, pick):
            place = len(ids)
            reason = stream.append(token)
            if stream.request.logprobs is not None and stream.stop_token is None:
                logprobs.append(logprob(rows[place], token, stream.request.logprobs))
            ids.append(token)
            accepted += place < len(draft) and draft[place] == token
            if reason is not None:
                break
    except BadLogits as fault:
        error = EngineFault(str(fault))
    except GrammarError as refusal:
        error = RequestRefused(f"The text cannot go on in its grammar: {refusal}.")
    shown = ids if stream.stop_token is None else ids[:-1]
    return Verdict(ids, shown, logprobs, accepted, reason, error)
