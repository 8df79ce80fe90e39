"""Picks a stream's next tokens from its rows of logits, verifying its draft on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engine.backend import Logits
from engine.contract import FinishReason, Logprob
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


class Verifier:
    """Picks from the rows of one step at a time. Greedy rows of a whole step are picked in one go."""

    def __init__(self) -> None:
        self._logits: Logits = np.empty((0, 0), np.float32)
        self._likeliest: NDArray[np.intp] | None = None

    def begin(self, logits: Logits) -> None:
        """The rows of a new step."""
        self._logits, self._likeliest = logits, None

    def verify(self, stream: Stream, draft: Sequence[int], first: int) -> Verdict:
        """Appends to `stream` the tokens that its rows from `first` on emit: one, and one more for each draft token
        that was right, up to the stream's end. Raises BadLogits if a row holds no finite number."""
        ids: list[int] = []
        logprobs: list[Logprob] = []
        reason: FinishReason | None = None
        accepted = 0
        for token in accept(draft, lambda row: self._pick(stream, first + row)):
            reason = stream.append(token)
            if len(ids) < len(draft) and draft[len(ids)] == token:
                accepted += 1
            ids.append(token)
            if stream.request.logprobs is not None and reason is not FinishReason.STOP:
                row = self._logits[first + len(ids) - 1]
                logprobs.append(logprob(row, token, stream.request.logprobs))
            if reason is not None:
                break
        shown = ids[:-1] if reason is FinishReason.STOP else ids
        return Verdict(ids, shown, logprobs, accepted, reason)

    def _pick(self, stream: Stream, row: int) -> int:
        if stream.sampler.greedy(stream.emitted):
            return self._greedy(row)
        return stream.sampler.pick(self._logits[row], stream.tokens, stream.prompt_length)

    def _greedy(self, row: int) -> int:
        if self._likeliest is None:
            self._likeliest = self._logits.argmax(axis=1)
        token = int(self._likeliest[row])
        if not np.isfinite(self._logits[row, token]):
            raise BadLogits("the model computed a row of logits without a finite number")
        return token
