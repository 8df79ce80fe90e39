"""`draft`: a smaller model with the same vocabulary drafts for all sequences, with one batch for each draft position.

The draft model has its own KV cache, in which sequences share prefixes as in the target model's. The rows of accepted
tokens are committed and the rows of rejected tokens rolled back, so that no accepted token is computed twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.backend import Aborted, Backend, Logits, NativeFault, NoFreeCells
from engine.kv import Allocation, Costs, KVCache
from engine.pace import SequenceRows, StepCost, StepShape, blend
from engine.speculate.proposer import BatchedDraftRequest, DraftBounds, num_matching
from engine.speculate.sampled_draft import PickToken, SampledDraft

log = logging.getLogger("paceline.speculation")

# A history with at most this many uncomputed tokens is computed in the same pass as the first draft tokens.
CATCH_UP_TOKENS = 8


class DraftSequence(SampledDraft):
    """One sequence in the draft model: its history, its draft, and, while it is active, its allocation."""

    type = "draft"

    def __init__(
        self,
        model: DraftModel,
        salt: str,
        bounds: DraftBounds,
        pick: PickToken | None = None,
        *,
        keep: bool = True,
        with_second_choices: bool = False,
    ) -> None:
        """`pick` and `with_second_choices` are those of `SampledDraft`. With `keep` released cells become an idle
        prefix, else they are free."""
        super().__init__(bounds, pick, with_second_choices=with_second_choices)
        self.salt = salt
        self._keep = keep
        self.allocation: Allocation | None = None
        self.computed = 0
        """Number of tokens of the history in cells."""
        self.drafted = 0
        """Number of tokens of the draft in cells, after those of the history."""
        self._model = model

    @property
    def num_uncomputed(self) -> int:
        """Number of tokens of the history that are not in cells."""
        return len(self.history) - self.computed

    @property
    def seq(self) -> int:
        """The sequence id in the draft model's KV cache. Valid only with an allocation."""
        assert self.allocation is not None, "an active draft sequence has an allocation"
        return self.allocation.seq

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history. Commits the rows of drafted tokens that were emitted, and rolls back the
        others."""
        self.history.extend(emitted)
        self.end_draft(emitted)

    def end_draft(self, emitted: Sequence[int] = ()) -> None:
        """Drops the draft. `emitted` are the last tokens of the history. The draft's rows are committed up to the first
        token that differs from them, and the other rows are rolled back."""
        if self.allocation is not None and self.drafted:
            accepted = num_matching(self.tokens[: self.drafted], emitted)
            accepted = max(0, min(accepted, self.num_uncomputed - 1))  # the row of the last token gives the next draft
            self._model.kv.commit(self.seq, self.tokens[:accepted])
            self.computed += accepted
            if accepted < self.drafted:
                self._model.kv.rollback(self.seq)
        self.clear_draft()
        self.drafted = 0

    def truncate(self, length: int) -> None:
        """Cuts the history to `length` tokens. The remaining prefix is matched before the next draft."""
        del self.history[length:]
        self.release()

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep`. The remaining prefix is matched before the next
        draft."""
        del self.history[keep : keep + discard]
        self._discarded += discard
        self.release()

    def release(self) -> None:
        """Releases the allocation. Its cells become an idle prefix for any sequence, or are freed."""
        self.end_draft()
        if self.allocation is not None:
            self._model.kv.release(self.seq, keep=self._keep)
            self.allocation, self.computed = None, 0
            self._model.active.remove(self)

    def end(self) -> None:
        """Ends the sequence, and releases its allocation."""
        self.release()


_DraftRequest = BatchedDraftRequest[DraftSequence]


class _HistoryRows(NamedTuple):
    """The rows of one pass that compute uncomputed tokens of one sequence's history."""

    request: _DraftRequest
    rows: int
    starts_draft: bool
    """True if the logits of the last row give the first token of a draft."""


class DraftModel:
    """The draft model of an engine, a `BatchedProposer`. Belongs to the engine thread."""

    def __init__(self, backend: Backend, vocabulary: int, cost: StepCost | None = None) -> None:
        """`vocabulary` is the size of the target model's vocabulary, and `cost` the cost model of the draft model's
        steps."""
        self.context = backend.context
        self.kv = KVCache(backend.context)
        self.active: list[DraftSequence] = []
        """The sequences with an allocation, oldest first."""
        self.fault = ""
        self._ends = backend.vocab.ends
        self._vocabulary = vocabulary
        self._smaller_vocabulary = backend.info.vocabulary if backend.info.vocabulary < vocabulary else 0
        self._cost = cost or StepCost()
        self._pick_seconds: float | None = None

    def draft(self, requests: Sequence[_DraftRequest], seconds: float, min_rows: int = 1) -> None:
        """Makes the drafts of `requests` after at most about `seconds` of prefill of their histories, or `min_rows`
        rows if these take longer.

        A sequence gets no draft if its history is not prefilled by then, or if there are too few cells.
        """
        if self.fault:
            return
        self._close_gap()
        try:
            active = self._prefill(requests, seconds, min_rows)
            while active:
                begun = time.perf_counter()
                continued = [request for request, row in active if self._add_token(request, row)]
                self._pick_seconds = blend(self._pick_seconds, (time.perf_counter() - begun) / len(active))
                active = self._extend(continued)
        except NoFreeCells:
            self._preempt()
        except Aborted:
            pass  # the engine is being closed
        except Exception as error:  # the requests go on without drafts
            self._fail(str(error) if isinstance(error, NativeFault) else repr(error))

    def _close_gap(self) -> None:
        """Moves a sequence to close a gap between ids: with per-slot KV, only consecutive ids share a pass."""
        self.kv.set_costs(Costs(compute=self._cost.prompt_row, extra_pass=self._cost.extra_pass))
        if any(sequence.drafted for sequence in self.active):
            return  # uncommitted rows cannot be moved
        if (moved := self.kv.close_gap()) is not None:
            sequence = next(sequence for sequence in self.active if sequence.seq == moved[0])
            sequence.allocation = Allocation(moved[1], sequence.computed)

    def position_seconds(self, sequences: int) -> float:
        """Returns the seconds of one draft token for each of `sequences`; 0 before the first measurement."""
        return self._cost.even_seconds(sequences) + sequences * (self._pick_seconds or 0.0)

    def prefill_tokens(self, sequence: DraftSequence) -> int:
        """Returns the number of tokens of the history that must be prefilled in passes of their own before the next
        draft."""
        uncomputed = sequence.num_uncomputed
        if sequence.allocation is None:
            uncomputed -= self.kv.match(sequence.history, sequence.salt).length
        return max(0, uncomputed - CATCH_UP_TOKENS)

    def prefill_seconds(self, tokens: int) -> float:
        """Returns the seconds of the prefill of `tokens` tokens; 0 before the first measurement."""
        return self._cost.prompt_row * tokens

    # ── histories ──

    def _prefill(
        self, requests: Sequence[_DraftRequest], seconds: float, min_rows: int
    ) -> list[tuple[_DraftRequest, Logits]]:
        """Computes uncomputed tokens of the histories in one batch. Returns the requests whose histories are complete,
        each with its last row of logits."""
        parts = self._parts([request for request in requests if self._admit(request)], seconds, min_rows)
        if not parts:
            return []
        parts.sort(key=lambda part: part.request.sequence.seq)
        batch = self.context.batch
        batch.clear()
        firsts = []
        for (sequence, *_), rows, starts_draft in parts:
            start = sequence.computed
            firsts.append(batch.add(sequence.seq, start, sequence.history[start : start + rows], int(starts_draft)))
        begun, shape = time.perf_counter(), self._shape([(part.request.sequence, part.rows) for part in parts])
        logits = self._decode()
        prefills = any(rows > CATCH_UP_TOKENS for _, rows, _ in parts)
        seconds = time.perf_counter() - begun
        self._cost.observe(StepShape() if prefills else shape, batch.rows if prefills else 0, seconds)
        for (sequence, *_), rows, _ in parts:
            self.kv.commit(sequence.seq, sequence.history[sequence.computed : sequence.computed + rows])
            sequence.computed += rows
        return [(part.request, logits[first]) for part, first in zip(parts, firsts, strict=True) if part.starts_draft]

    def _parts(self, requests: Sequence[_DraftRequest], seconds: float, min_rows: int) -> list[_HistoryRows]:
        """Returns the rows of a batch: first short histories, which are completed, then as many tokens of long ones as
        fit."""
        free_rows, parts = self.context.batch.capacity, []
        for request in requests:
            uncomputed = request.sequence.num_uncomputed
            if uncomputed <= min(CATCH_UP_TOKENS, free_rows):
                parts.append(_HistoryRows(request, uncomputed, request.limit > 0))
                free_rows -= uncomputed
        prompt_rows = min(free_rows, max(min_rows, self._cost.prompt_rows(StepShape(), 0.0, seconds)))
        for request in requests:
            uncomputed = request.sequence.num_uncomputed
            if uncomputed > CATCH_UP_TOKENS and prompt_rows > 0:
                rows = min(uncomputed, prompt_rows)
                prompt_rows -= rows
                parts.append(_HistoryRows(request, rows, rows == uncomputed and request.limit > 0))
        return parts

    def _admit(self, request: _DraftRequest) -> bool:
        """Allocates cells to the sequence if its history and a draft fit. Returns True if the sequence can be
        computed."""
        sequence = request.sequence
        sequence.end_draft()
        if (
            not sequence.num_uncomputed
        ):  # its last draft was not verified, and the logits of its last row are overwritten
            sequence.release()
        history = sequence.history
        if not history or len(history) + request.limit > self.context.sequence_cells:
            sequence.release()
            return False
        if self._smaller_vocabulary and max(history[sequence.computed :]) >= self._smaller_vocabulary:
            return False
        if sequence.allocation is None:
            match = self.kv.match(history, sequence.salt)
            need = len(history) - match.length + request.limit
            if need > self.kv.free_cells + self.kv.evictable_cells - match.idle_cells:
                return False
            sequence.allocation = self.kv.allocate(match)
            sequence.computed = sequence.allocation.cached
            self.active.append(sequence)
        return True

    # ── drafts ──

    def _add_token(self, request: _DraftRequest, row: Logits) -> bool:
        """Adds the token picked from `row` to the draft, if it is likely enough. Returns True if the draft
        continues."""
        return request.sequence.extend(self._aligned(row), request.limit, request.floor, self._ends)

    def _aligned(self, row: Logits) -> Logits:
        """Returns `row` at the size of the target model's vocabulary. Tokens that the draft model lacks get `-inf`."""
        missing = self._vocabulary - len(row)
        return np.pad(row, (0, missing), constant_values=-np.inf) if missing > 0 else row[: self._vocabulary]

    def _extend(self, requests: Sequence[_DraftRequest]) -> list[tuple[_DraftRequest, Logits]]:
        """Computes the last token of each draft. Returns the requests in the order of sequence ids, with their
        logits."""
        if not requests:
            return []
        batch = self.context.batch
        batch.clear()
        requests = sorted(requests, key=lambda request: request.sequence.seq)
        for sequence, *_ in requests:
            batch.add(sequence.seq, sequence.computed + sequence.drafted, sequence.tokens[-1:], 1)
        begun, shape = time.perf_counter(), self._shape([(sequence, 1) for sequence, *_ in requests])
        logits = self._decode()
        self._cost.observe(shape, 0, time.perf_counter() - begun)
        for request in requests:
            request.sequence.drafted += 1
        return list(zip(requests, logits, strict=True))

    def _shape(self, rows: Sequence[tuple[DraftSequence, int]]) -> StepShape:
        parts = [SequenceRows(sequence.seq, count, sequence.computed) for sequence, count in rows]
        return self._cost.layout.shape(parts, self.kv.used_cells)

    def _decode(self) -> Logits:
        self.kv.evict(self.context.batch.rows)
        logits = self.context.decode()
        self.kv.count_step()
        return logits

    # ── full cells and failures ──

    def _preempt(self) -> None:
        """Releases the sequence that was allocated last, so that its cells can be evicted. Called when a batch finds no
        cells."""
        if self.active:
            self.active[-1].release()

    def _fail(self, reason: str) -> None:
        """Ends all drafting, because the content of the cells is unknown after a failed decode."""
        self.fault = f"the draft model failed and drafts no more: {reason}"
        log.error("%s", self.fault, exc_info=True)
        for sequence in [*self.active]:
            sequence.allocation, sequence.computed, sequence.drafted = None, 0, 0
            sequence.tokens, sequence.chances = [], []
        self.active.clear()
