"""Type `draft`: a smaller model with the same vocabulary drafts for all requests, one batch per draft position.

It has a KV cache of its own, in which prefixes are shared as in the target model's. Of a draft the rows of accepted
tokens are committed and the others rolled back, so that no accepted token is computed twice.
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
from engine.pace import SequenceRows, Shape, StepCost, blend
from engine.sampling import BadLogits, likeliest, spread
from engine.speculate.base import Bounds, Draft

log = logging.getLogger("paceline.speculation")

Pick = Callable[[Logits, Sequence[int], int], int]
"""Picks a token from a row, a history, and the number of tokens that context shifts discarded from it."""

# Up to so many uncomputed tokens of a history are computed in the pass of the first draft token.
CATCH_UP_TOKENS = 8


class DraftSequence:
    """A request in the draft model: its history, its allocation while it has one, and its draft."""

    def __init__(self, model: DraftModel, salt: str, bounds: Bounds, pick: Pick | None = None) -> None:
        """`pick` chooses the draft's tokens; without it they are the likeliest ones."""
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
        self.drafted = 0
        self.together = 1.0
        """The probability of the whole draft by the draft model."""
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
        """The draft that `DraftModel.draft` made for it since the last `observe`."""
        return self.bounds.trim(Draft(tuple(self.tokens[:limit]), tuple(self.chances[:limit])))

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history: keeps the rows of drafted tokens among them and rolls the others back."""
        self.history.extend(emitted)
        self.settle(emitted)

    def settle(self, emitted: Sequence[int] = ()) -> None:
        """Ends the draft. Of its rows only those of the first tokens of `emitted`, the history's end, stay."""
        if self.allocation is not None and self.drafted:
            right = matching(self.tokens[: self.drafted], emitted)
            right = max(0, min(right, self.num_uncomputed - 1))  # one row must be left: it gives the next draft
            self._model.kv.commit(self.seq, self.tokens[:right])
            self.computed += right
            if right < self.drafted:
                self._model.kv.rollback(self.seq)
        self.tokens, self.chances, self.drafted, self.together = [], [], 0, 1.0

    def truncate(self, length: int) -> None:
        """The history is cut; what remains of its prefix is matched again."""
        del self.history[length:]
        self.leave()

    def shift(self, keep: int, discard: int) -> None:
        """Context shift of the history: what remains of its prefix is matched again."""
        del self.history[keep : keep + discard]
        self._discarded += discard
        self.leave()

    def picked(self, row: Logits) -> int:
        """The token with which `row` of the draft model continues history and draft. Raises BadLogits."""
        if self._pick is None:
            return likeliest(row)
        drafted = len(self.tokens)
        self.history.extend(self.tokens)
        try:
            return self._pick(row, self.history, self._discarded)
        finally:
            del self.history[len(self.history) - drafted :]

    def leave(self) -> None:
        """Releases the allocation; the rows stay resident as a prefix for others, or for this request later."""
        self.settle()
        if self.allocation is not None:
            self._model.kv.release(self.seq, keep=True)
            self.allocation, self.computed = None, 0
            self._model.active.remove(self)

    def end(self) -> None:
        """The request has ended."""
        self.leave()


class DraftRequest(NamedTuple):
    """A draft of at most `limit` tokens for a sequence; with 0 only its history is prefilled.

    The draft ends once its probability as a whole, by the draft model, is below `floor`.
    """

    sequence: DraftSequence
    limit: int
    floor: float = 0.0


class HistoryRows(NamedTuple):
    """A sequence's rows of one pass: tokens of the history, and whether the last gives the first draft token."""

    request: DraftRequest
    rows: int
    drafts: bool


class DraftModel:
    """The draft model of an engine. Belongs to the engine thread. `vocabulary` is the size of the target model's,
    `cost` is what passes cost, as far as that is known."""

    def __init__(self, backend: Backend, vocabulary: int, cost: StepCost | None = None) -> None:
        self.context = backend.context
        self.kv = KVCache(backend.context)
        self.active: list[DraftSequence] = []  # with an allocation, the oldest first
        self.fault = ""
        """The reason if it failed: it drafts no more."""
        self._ends = backend.vocab.ends
        self._vocabulary = vocabulary
        self._narrow = backend.info.vocabulary if backend.info.vocabulary < vocabulary else 0
        self._cost = cost or StepCost()
        self._pick_seconds: float | None = None

    def draft(self, requests: Sequence[DraftRequest], seconds: float) -> None:
        """Makes a draft for each of `requests`; none for those whose history is not computed yet.

        Histories are prefilled for about `seconds` first. A sequence that finds no cells gets no draft.
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
            pass  # the engine is closing
        except NativeFault as error:
            self._fail(str(error))

    def _close_gap(self) -> None:
        """Per-slot KV: keeps the ids of the sequences dense, as each draft token of all of them is a step."""
        self.kv.price(Costs(compute=self._cost.prompt_row, extra_pass=self._cost.extra_pass))
        if any(sequence.drafted for sequence in self.active):
            return  # rows that are not committed cannot be moved
        if (moved := self.kv.close_gap()) is not None:
            sequence = next(sequence for sequence in self.active if sequence.seq == moved[0])
            sequence.allocation = Allocation(moved[1], sequence.computed)

    def pass_seconds(self, sequences: int) -> float:
        """One position of the drafts of so many sequences; 0 if none was measured."""
        return self._cost.even_seconds(sequences) + sequences * (self._pick_seconds or 0.0)

    def unread(self, sequence: DraftSequence) -> int:
        """Tokens of its history to prefill before it can draft, except those that take no pass of their own."""
        uncomputed = sequence.num_uncomputed
        if sequence.allocation is None:
            uncomputed -= self.kv.match(sequence.history, sequence.salt).length
        return max(0, uncomputed - CATCH_UP_TOKENS)

    def reading_seconds(self, tokens: int) -> float:
        """The time to prefill so many tokens; 0 if none was measured."""
        return self._cost.prompt_row * tokens

    # ── histories ──

    def _prefill(self, requests: Sequence[DraftRequest], seconds: float) -> list[tuple[DraftRequest, Logits]]:
        """One pass over uncomputed tokens of the histories; the rows of the sequences that can draft now."""
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
        self._cost.observe(Shape() if long else shape, batch.rows if long else 0, time.perf_counter() - begun)
        for (sequence, _, _), rows, _ in parts:
            self.kv.commit(sequence.seq, sequence.history[sequence.computed : sequence.computed + rows])
            sequence.computed += rows
        return [(part.request, logits[first]) for part, first in zip(parts, firsts, strict=True) if part.drafts]

    def _parts(self, requests: Sequence[DraftRequest], seconds: float) -> list[HistoryRows]:
        """First the sequences that can draft at once, then as many rows of the longer histories as fit."""
        room, parts = self.context.batch.capacity, []
        for request in requests:
            uncomputed = request.sequence.num_uncomputed
            if uncomputed <= min(CATCH_UP_TOKENS, room):
                parts.append(HistoryRows(request, uncomputed, request.limit > 0))
                room -= uncomputed
        rest = min(room, self._cost.prompt_rows(Shape(), 0.0, seconds))
        for request in requests:
            uncomputed = request.sequence.num_uncomputed
            if uncomputed > CATCH_UP_TOKENS and rest > 0:
                rows = min(uncomputed, rest)
                rest -= rows
                parts.append(HistoryRows(request, rows, rows == uncomputed and request.limit > 0))
        return parts

    def _admit(self, request: DraftRequest) -> bool:
        """True if the sequence has an allocation, or gets one as its history and a draft fit the free cells."""
        sequence = request.sequence
        sequence.settle()
        if not sequence.num_uncomputed:  # its last draft was not verified, and the row that gave it is gone
            sequence.leave()
        history = sequence.history
        if not history or len(history) + request.limit > self.context.sequence_cells:
            sequence.leave()
            return False
        if self._narrow and max(history[sequence.computed :]) >= self._narrow:
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

    def _add_token(self, request: DraftRequest, row: Logits) -> bool:
        """Adds the token picked from `row` to the draft. True if the draft continues."""
        sequence = request.sequence
        row = self._aligned(row)
        try:
            token, (peak, mass) = sequence.picked(row), spread(row)
        except BadLogits:
            return False
        chance = math.exp(float(row[token]) - peak) / mass
        if chance < sequence.bounds.p_min:
            return False
        sequence.tokens.append(token)
        sequence.chances.append(chance)
        sequence.together *= chance
        return len(sequence.tokens) < request.limit and sequence.together >= request.floor and token not in self._ends

    def _aligned(self, row: Logits) -> Logits:
        """The row with as many tokens as the target model's; those the draft model lacks are impossible."""
        missing = self._vocabulary - len(row)
        return np.pad(row, (0, missing), constant_values=-np.inf) if missing > 0 else row[: self._vocabulary]

    def _extend(self, requests: Sequence[DraftRequest]) -> list[tuple[DraftRequest, Logits]]:
        """One row more for each draft."""
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

    def _shape(self, rows: Sequence[tuple[DraftSequence, int]]) -> Shape:
        parts = [SequenceRows(sequence.seq, count, sequence.computed) for sequence, count in rows]
        return self._cost.layout.shape(parts, self.kv.resident)

    def _decode(self) -> Logits:
        self.kv.evict(self.context.batch.rows)
        logits = self.context.decode()
        self.kv.step()
        return logits

    # ── trouble ──

    def _preempt(self) -> None:
        """The cells are full: releases the newest sequence, whose cells can then be evicted."""
        if self.active:
            self.active[-1].leave()

    def _fail(self, reason: str) -> None:
        """After a failed pass the content of the cells is unknown, so nothing is drafted any more."""
        self.fault = f"the draft model failed and drafts no more: {reason}"
        log.error("%s", self.fault)
        for sequence in [*self.active]:
            sequence.allocation, sequence.computed, sequence.drafted = None, 0, 0
            sequence.tokens, sequence.chances = [], []
        self.active.clear()


def matching(draft: Sequence[int], emitted: Sequence[int]) -> int:
    """The number of leading tokens of `draft` that equal those of `emitted`."""
    count = 0
    for drafted, token in zip(draft, emitted, strict=False):
        if drafted != token:
            break
        count += 1
    return count
