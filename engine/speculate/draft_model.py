"""Type `draft`: a smaller model with the same vocabulary drafts for all sequences, one batch per draft position.

The draft model has a KV cache of its own, in which prefixes are shared as in the target model's. The rows of
accepted tokens are committed and those of rejected tokens rolled back, so that no accepted token is computed twice.
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from engine.backend import Aborted, Backend, Logits, NativeFault, NoFreeCells
from engine.kv import Allocation, Costs, KVCache
from engine.pace import SequenceRows, StepCost, StepShape, blend
from engine.sampling import BadLogits, argmax_token, peak_and_mass
from engine.speculate.proposer import BatchedDraftRequest, Draft, DraftBounds, num_matching

log = logging.getLogger("paceline.speculation")

Pick = Callable[[Logits, Sequence[int], int], int]
"""Picks a token from a row, a history, and the number of tokens that context shifts discarded from it."""

# Up to so many uncomputed tokens of a history are computed in the pass of the first draft token.
CATCH_UP_TOKENS = 8


class DraftSequence:
    """One sequence in the draft model: its history, its allocation while it has one, and its draft."""

    type = "draft"

    def __init__(self, model: DraftModel, salt: str, bounds: DraftBounds, pick: Pick | None = None) -> None:
        """`pick` picks the tokens of drafts; without it they are the likeliest ones."""
        self.salt = salt
        self.bounds = bounds
        self._pick = pick
        self._discarded = 0
        self.history = array("i")
        self.allocation: Allocation | None = None
        self.computed = 0
        """Tokens of the history in cells."""
        self.tokens: list[int] = []
        """The draft; its first `drafted` tokens have rows after those of the history."""
        self.chances: list[float] = []
        """For each token of the draft its probability by the draft model."""
        self.drafted = 0
        self.joint_chance = 1.0
        """The product of `chances`."""
        self._model = model

    @property
    def num_uncomputed(self) -> int:
        """Tokens of the history that are not in cells."""
        return len(self.history) - self.computed

    @property
    def seq(self) -> int:
        """Its sequence id in the draft model's KV cache. Only with an allocation."""
        assert self.allocation is not None, "an active draft sequence has an allocation"
        return self.allocation.seq

    def begin(self, tokens: Sequence[int]) -> None:
        """Sets the history. Nothing is computed before a draft is requested."""
        self.history.extend(tokens)

    def propose(self, limit: int) -> Draft:
        """Returns the draft that `DraftModel.draft` has made for the sequence since the last `observe`."""
        return self.bounds.trim(Draft(tuple(self.tokens[:limit]), tuple(self.chances[:limit])))

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history. Commits the rows of drafted tokens in it, and rolls the others back."""
        self.history.extend(emitted)
        self.end_draft(emitted)

    def end_draft(self, emitted: Sequence[int] = ()) -> None:
        """Drops the draft. Commits its rows that equal the first of `emitted`, the end of the history, and rolls the
        others back."""
        if self.allocation is not None and self.drafted:
            accepted = num_matching(self.tokens[: self.drafted], emitted)
            accepted = max(0, min(accepted, self.num_uncomputed - 1))  # one row is left to compute for the next draft
            self._model.kv.commit(self.seq, self.tokens[:accepted])
            self.computed += accepted
            if accepted < self.drafted:
                self._model.kv.rollback(self.seq)
        self.tokens, self.chances, self.drafted, self.joint_chance = [], [], 0, 1.0

    def truncate(self, length: int) -> None:
        """Cuts the history. The remaining prefix is matched again before the next draft."""
        del self.history[length:]
        self.release()

    def shift(self, keep: int, discard: int) -> None:
        """Shifts the history. The remaining prefix is matched again before the next draft."""
        del self.history[keep : keep + discard]
        self._discarded += discard
        self.release()

    def pick(self, row: Logits) -> int:
        """Returns the next token after history and draft by `row`, of the draft model. Raises BadLogits."""
        if self._pick is None:
            return argmax_token(row)
        drafted = len(self.tokens)
        self.history.extend(self.tokens)
        try:
            return self._pick(row, self.history, self._discarded)
        finally:
            del self.history[len(self.history) - drafted :]

    def release(self) -> None:
        """Releases the allocation. Its rows stay resident as a prefix for any sequence."""
        self.end_draft()
        if self.allocation is not None:
            self._model.kv.release(self.seq, keep=True)
            self.allocation, self.computed = None, 0
            self._model.active.remove(self)

    def end(self) -> None:
        """Ends the sequence."""
        self.release()


_DraftRequest = BatchedDraftRequest[DraftSequence]


class _HistoryRows(NamedTuple):
    """Rows of one pass for the history of one sequence."""

    request: _DraftRequest
    rows: int
    drafts: bool
    """True if the last row gives the first token of a draft."""


class DraftModel:
    """The draft model of an engine, a `BatchedProposer`. Belongs to the engine thread."""

    def __init__(self, backend: Backend, vocabulary: int, cost: StepCost | None = None) -> None:
        """`vocabulary` is the number of tokens of the target model, and `cost` the cost of the draft model's steps."""
        self.context = backend.context
        self.kv = KVCache(backend.context)
        self.active: list[DraftSequence] = []
        """The sequences with an allocation, the oldest first."""
        self.fault = ""
        self._ends = backend.vocab.ends
        self._vocabulary = vocabulary
        self._smaller_vocabulary = backend.info.vocabulary if backend.info.vocabulary < vocabulary else 0
        self._cost = cost or StepCost()
        self._pick_seconds: float | None = None

    def draft(self, requests: Sequence[_DraftRequest], seconds: float) -> None:
        """Makes the drafts of `requests`, after it has prefilled histories for about `seconds`.

        A sequence whose history is not prefilled by then, or for which there are no cells, gets no draft.
        """
        if self.fault:
            return
        self._close_gap()
        try:
            active = self._prefill(requests, seconds)
            while active:
                begun = time.perf_counter()
                going = [request for request, row in active if self._add_token(request, row)]
                self._pick_seconds = blend(self._pick_seconds, (time.perf_counter() - begun) / len(active))
                active = self._extend(going)
        except NoFreeCells:
            self._preempt()
        except Aborted:
            pass  # the engine closes
        except NativeFault as error:
            self._fail(str(error))

    def _close_gap(self) -> None:
        """Moves a sequence so that ids stay dense, as with per-slot KV consecutive ids share a pass."""
        self.kv.price(Costs(compute=self._cost.prompt_row, extra_pass=self._cost.extra_pass))
        if any(sequence.drafted for sequence in self.active):
            return  # rows that are not committed cannot be moved
        if (moved := self.kv.close_gap()) is not None:
            sequence = next(sequence for sequence in self.active if sequence.seq == moved[0])
            sequence.allocation = Allocation(moved[1], sequence.computed)

    def position_seconds(self, sequences: int) -> float:
        """Returns the seconds of one token for each of `sequences`; 0 if nothing was measured."""
        return self._cost.even_seconds(sequences) + sequences * (self._pick_seconds or 0.0)

    def prefill_tokens(self, sequence: DraftSequence) -> int:
        """Returns the tokens of its history to prefill before its next draft, except those that need no pass of their
        own."""
        uncomputed = sequence.num_uncomputed
        if sequence.allocation is None:
            uncomputed -= self.kv.match(sequence.history, sequence.salt).length
        return max(0, uncomputed - CATCH_UP_TOKENS)

    def prefill_seconds(self, tokens: int) -> float:
        """Returns the seconds of the prefill of `tokens` tokens; 0 if nothing was measured."""
        return self._cost.prompt_row * tokens

    # ── histories ──

    def _prefill(self, requests: Sequence[_DraftRequest], seconds: float) -> list[tuple[_DraftRequest, Logits]]:
        """Computes uncomputed tokens of the histories in one pass. Returns the requests of the sequences that can draft
        now, each with its row of logits."""
        parts = self._parts([request for request in requests if self._admit(request)], seconds)
        if not parts:
            return []
        parts.sort(key=lambda part: part.request.sequence.seq)
        batch = self.context.batch
        batch.clear()
        firsts = []
        for (sequence, _, _), rows, drafts in parts:
            start = sequence.computed
            firsts.append(batch.add(sequence.seq, start, sequence.history[start : start + rows], int(drafts)))
        begun, shape = time.perf_counter(), self._shape([(part.request.sequence, part.rows) for part in parts])
        logits = self._decode()
        long = any(rows > CATCH_UP_TOKENS for _, rows, _ in parts)
        self._cost.observe(StepShape() if long else shape, batch.rows if long else 0, time.perf_counter() - begun)
        for (sequence, _, _), rows, _ in parts:
            self.kv.commit(sequence.seq, sequence.history[sequence.computed : sequence.computed + rows])
            sequence.computed += rows
        return [(part.request, logits[first]) for part, first in zip(parts, firsts, strict=True) if part.drafts]

    def _parts(self, requests: Sequence[_DraftRequest], seconds: float) -> list[_HistoryRows]:
        """Returns the rows of a pass: of sequences that can draft now, then as many of longer histories as fit."""
        room, parts = self.context.batch.capacity, []
        for request in requests:
            uncomputed = request.sequence.num_uncomputed
            if uncomputed <= min(CATCH_UP_TOKENS, room):
                parts.append(_HistoryRows(request, uncomputed, request.limit > 0))
                room -= uncomputed
        rest = min(room, self._cost.prompt_rows(StepShape(), 0.0, seconds))
        for request in requests:
            uncomputed = request.sequence.num_uncomputed
            if uncomputed > CATCH_UP_TOKENS and rest > 0:
                rows = min(uncomputed, rest)
                rest -= rows
                parts.append(_HistoryRows(request, rows, rows == uncomputed and request.limit > 0))
        return parts

    def _admit(self, request: _DraftRequest) -> bool:
        """Allocates cells if its history and a draft fit. Returns True if the sequence has an allocation."""
        sequence = request.sequence
        sequence.end_draft()
        if not sequence.num_uncomputed:  # its last draft was not verified, and its last row is gone
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
            if need > self.kv.free + self.kv.evictable - match.idle:
                return False
            sequence.allocation = self.kv.allocate(match)
            sequence.computed = sequence.allocation.cached
            self.active.append(sequence)
        return True

    # ── drafts ──

    def _add_token(self, request: _DraftRequest, row: Logits) -> bool:
        """Adds the token picked from `row` to the draft. Returns True if the draft continues."""
        sequence = request.sequence
        row = self._aligned(row)
        try:
            token, (peak, mass) = sequence.pick(row), peak_and_mass(row)
        except BadLogits:
            return False
        chance = math.exp(float(row[token]) - peak) / mass
        if chance < sequence.bounds.p_min:
            return False
        sequence.tokens.append(token)
        sequence.chances.append(chance)
        sequence.joint_chance *= chance
        return (
            len(sequence.tokens) < request.limit and sequence.joint_chance >= request.floor and token not in self._ends
        )

    def _aligned(self, row: Logits) -> Logits:
        """Returns `row` with as many tokens as the target model has; tokens unknown to the draft model get `-inf`."""
        missing = self._vocabulary - len(row)
        return np.pad(row, (0, missing), constant_values=-np.inf) if missing > 0 else row[: self._vocabulary]

    def _extend(self, requests: Sequence[_DraftRequest]) -> list[tuple[_DraftRequest, Logits]]:
        """Computes the last token of each draft. Returns the requests, each with its row of logits."""
        if not requests:
            return []
        batch = self.context.batch
        batch.clear()
        requests = sorted(requests, key=lambda request: request.sequence.seq)
        for sequence, _, _ in requests:
            batch.add(sequence.seq, sequence.computed + sequence.drafted, sequence.tokens[-1:], 1)
        begun, shape = time.perf_counter(), self._shape([(sequence, 1) for sequence, _, _ in requests])
        logits = self._decode()
        self._cost.observe(shape, 0, time.perf_counter() - begun)
        for request in requests:
            request.sequence.drafted += 1
        return list(zip(requests, logits, strict=True))

    def _shape(self, rows: Sequence[tuple[DraftSequence, int]]) -> StepShape:
        parts = [SequenceRows(sequence.seq, count, sequence.computed) for sequence, count in rows]
        return self._cost.layout.shape(parts, self.kv.resident)

    def _decode(self) -> Logits:
        self.kv.evict(self.context.batch.rows)
        logits = self.context.decode()
        self.kv.step()
        return logits

    # ── full cells and failures ──

    def _preempt(self) -> None:
        """Releases the newest sequence, so that its cells can be evicted. Called when no cells are free."""
        if self.active:
            self.active[-1].release()

    def _fail(self, reason: str) -> None:
        """Ends all drafting: the content of the cells is unknown after a failed pass."""
        self.fault = f"the draft model failed and drafts no more: {reason}"
        log.error("%s", self.fault)
        for sequence in [*self.active]:
            sequence.allocation, sequence.computed, sequence.drafted = None, 0, 0
            sequence.tokens, sequence.chances = [], []
        self.active.clear()
