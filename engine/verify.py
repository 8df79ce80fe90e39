"""Samples a sequence's next tokens from its rows of logits and verifies its draft."""

from __future__ import annotations

import logging
from collections import abc
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engine.backend import Logits
from engine.contract import (
    FORCED_TOKEN,
    MODEL_TOKEN,
    REQUEST_FAILED,
    EngineError,
    EngineFault,
    FinishReason,
    Logprob,
    RequestRefused,
)
from engine.grammar import GrammarError, RowMasks
from engine.sampling import UNPICKED, BadLogits, Candidates, candidate_logprob, logprob, sample_and_accept
from engine.sequence import Sequence
from engine.speculate import num_matching

log = logging.getLogger("paceline.engine")


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
    origins: abc.Sequence[str] = ()
    """The origins of `streamed`, if the request asks."""


class DraftPath(NamedTuple):
    """The draft tokens that are verified, and the token that each of their rows emits."""

    draft: abc.Sequence[int]
    picks: abc.Sequence[int]


def followed_path(draft: abc.Sequence[int], place: int, picks: abc.Sequence[int]) -> DraftPath:
    """Returns the path of a draft whose last token is an alternative to that at `place`: the tokens before it and the
    alternative, if that is the token picked there, else the draft without the alternative. Without a pick from
    its row the alternative is left out, as `verify` would sample the row at the same place of the draft."""
    if picks[place] == draft[-1] != draft[place] and picks[-1] != UNPICKED:
        return DraftPath((*draft[:place], draft[-1]), (*picks[: place + 1], picks[-1]))
    return DraftPath(tuple(draft[:-1]), picks[:-1])


def verify(
    sequence: Sequence,
    draft: abc.Sequence[int],
    first: int,
    logits: Logits,
    picks: abc.Sequence[int],
    masks: RowMasks | None = None,
) -> VerificationResult:
    """Appends to `sequence` the tokens that its rows emit: one per accepted draft token and one more, up to its end.

    The rows begin at row `first` of `logits`, and row j of them attended to the first j draft tokens. `picks` has the
    token of each row, or `UNPICKED` if it must be sampled. `masks` returns the grammar mask of a row. The result has an
    error if no token can be sampled from a row, or if the grammar permits no continuation. The tokens before the error
    are appended, as they would be without drafts.
    """
    if sequence.is_plain and UNPICKED not in picks:
        return _append_picks(sequence, draft, picks)
    rows, request, candidates = logits[first : first + len(picks)], sequence.request, list[Candidates]()
    forced: list[bool] = []

    def sample(row: int) -> int:
        permitted = None if masks is None else masks(row)
        state = rows[row], sequence.history, sequence.text_length, sequence.discarded, permitted
        if request.logprobs is not None and request.post_sampling:
            candidates.append(sequence.sampler.candidates(*state))
        if request.origins:
            forced.append(_is_forced(sequence, permitted))
        if (token := sequence.forced) is not None and (permitted is None or permitted[token]):
            return token
        return picks[row] if picks[row] != UNPICKED else sequence.sampler.sample(*state)

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
    except Exception:  # of a sampler or a grammar: the other sequences go on
        log.exception("request %s failed", request.id)
        error = EngineFault(REQUEST_FAILED)
    streamed = ids if sequence.stop_token is None else ids[:-1]
    origins = _origins(sequence, forced[: len(streamed)], accepted) if request.origins else ()
    return VerificationResult(ids, streamed, logprobs, accepted, reason, error, origins)


def _append_picks(sequence: Sequence, draft: abc.Sequence[int], picks: abc.Sequence[int]) -> VerificationResult:
    """Appends to a plain sequence the accepted tokens of `draft` and one more, given the token of each row."""
    accepted = num_matching(draft, picks) if draft else 0
    ids = [*picks[: accepted + 1]]
    reason = sequence.extend(ids)
    streamed = ids if sequence.stop_token is None else ids[:-1]
    return VerificationResult(ids, streamed, (), min(accepted, len(ids)), reason, None)


def _is_forced(sequence: Sequence, permitted: NDArray[np.bool_] | None) -> bool:
    """Returns True if the next token is the only one that the grammar permits, or belongs to the closing text of the
    reasoning budget."""
    if permitted is not None and np.count_nonzero(permitted) == 1:
        return True
    closing = sequence.forced
    return closing is not None and (permitted is None or bool(permitted[closing]))


def _origins(sequence: Sequence, forced: abc.Sequence[bool], accepted: int) -> list[str]:
    """Returns the origins of the emitted tokens, of which the first `accepted` were drafted."""
    drafted = [sequence.proposers.chosen_type] * accepted
    return [*drafted, *(FORCED_TOKEN if each else MODEL_TOKEN for each in forced[accepted:])][: len(forced)]
