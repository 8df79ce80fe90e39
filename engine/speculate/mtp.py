"""`draft-mtp`: the model's own MTP layers draft for all sequences, with one batch for each draft position.

The layers' cells follow those of the model's sequences, so nothing is prefilled, and prefixes are shared as in the
model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Sequence

from engine.backend import Aborted, NativeFault, NoFreeCells
from engine.draft_head import DraftHead
from engine.pace import StepCost
from engine.speculate.proposer import BatchedDraftRequest, DraftBounds
from engine.speculate.sampled_draft import PickToken, SampledDraft

log = logging.getLogger("paceline.speculation")


class MtpSequence(SampledDraft):
    """One sequence for which the MTP layers draft."""

    type = "draft-mtp"

    def __init__(self, bounds: DraftBounds, pick: PickToken | None, media_tokens: int) -> None:
        """`media_tokens` is the number of pseudo-tokens of images and sounds in the prompt, which `history` lacks."""
        super().__init__(bounds, pick)
        self.media_tokens = media_tokens

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history, and drops the draft."""
        self.history.extend(emitted)
        self.clear_draft()

    def truncate(self, length: int) -> None:
        """Cuts the history to `length` tokens."""
        del self.history[length:]
        self.clear_draft()

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep`."""
        del self.history[keep : keep + discard]
        self._discarded += discard
        self.clear_draft()

    def release(self) -> None:
        """Drops the draft. The cells are those of the model's sequence."""
        self.clear_draft()

    def end(self) -> None:
        """Drops the draft."""
        self.clear_draft()


_DraftRequest = BatchedDraftRequest[MtpSequence]


class MtpProposer:
    """The MTP layers of an engine's model, a `BatchedProposer`. Belongs to the engine thread."""

    def __init__(self, head: DraftHead, ends: Container[int]) -> None:
        self.fault = ""
        self.max_draft = head.max_draft
        """Maximum tokens of a draft; None is no limit."""
        self._head = head
        self._ends = ends
        self._cost = StepCost()

    def draft(self, requests: Sequence[_DraftRequest], seconds: float, min_rows: int = 1) -> None:
        """Makes the drafts of `requests`. `seconds` and `min_rows` are ignored, as nothing is prefilled."""
        if self.fault:
            return
        active = sorted(filter(self._begin, requests), key=lambda request: request.seq)
        try:
            while active:
                active = self._extend(active)
        except (NoFreeCells, Aborted):
            pass  # the tokens drafted so far remain
        except Exception as error:  # the requests go on without drafts
            self._fail(str(error) if isinstance(error, NativeFault) else repr(error))
        finally:
            self._head.rewind()

    def _begin(self, request: _DraftRequest) -> bool:
        """Drops the last draft. Returns True if a draft is requested, and all tokens of the history but the last are in
        the model's cells."""
        sequence = request.sequence
        sequence.clear_draft()
        length = len(sequence.history) + sequence.media_tokens
        return request.limit > 0 and self._head.length(request.seq) == length - 1

    def _extend(self, requests: Sequence[_DraftRequest]) -> list[_DraftRequest]:
        """Computes the next token of each draft. Returns the requests whose drafts continue."""
        rows = [(request.seq, (request.sequence.tokens or request.sequence.history)[-1]) for request in requests]
        begun = time.perf_counter()
        logits = self._head.draft(rows)
        continued = [
            request
            for request, row in zip(requests, logits, strict=True)
            if request.sequence.extend(row, request.limit, request.floor, self._ends)
        ]
        self._cost.observe(self._cost.layout.even(len(rows), 0), 0, time.perf_counter() - begun)
        return continued

    def position_seconds(self, sequences: int) -> float:
        """Returns the seconds of one draft token for each of `sequences`; 0 before the first measurement."""
        return self._cost.even_seconds(sequences)

    def prefill_tokens(self, sequence: MtpSequence) -> int:
        """Returns 0, as the layers compute rows soon after the model."""
        return 0

    def prefill_seconds(self, tokens: int) -> float:
        """Returns 0."""
        return 0.0

    def _fail(self, reason: str) -> None:
        self.fault = f"the MTP layers failed and draft no more: {reason}"
        log.error("%s", self.fault, exc_info=True)
