"""Type `draft`: a smaller model with the same vocabulary guesses, for all requests in one batch per draft place.

It has cells of its own, in which prefixes are shared as in the model's. A request's rows there are kept: of a draft
the rows whose tokens came true are committed, the others cut, so that no accepted token is computed twice.
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
from engine.memory import Cells, Lease
from engine.pace import StepCost, blend
from engine.sampling import BadLogits, likeliest, spread
from engine.speculate.base import Bounds, Draft

log = logging.getLogger("paceline.speculation")

Pick = Callable[[Logits, Sequence[int], int], int]
"""Picks a token from a row, a history, and how many tokens that has forgotten."""

BEHIND = 8
"""A request so many tokens behind or fewer is caught up with in the pass of its first draft token."""


class Seat:
    """One request's place in the draft model: its history, its lease while it has one, and its draft."""

    def __init__(self, model: DraftModel, salt: str, bounds: Bounds, pick: Pick | None = None) -> None:
        """`pick` chooses its tokens; without it they are the likeliest."""
        self.salt = salt
        self.bounds = bounds
        self._pick = pick
        self._forgotten = 0
        self.history = array("i")
        self.lease: Lease | None = None
        self.tokens: list[int] = []
        """The draft; its first `computed` tokens have rows after the lease's."""
        self.chances: list[float] = []
        self.computed = 0
        self.together = 1.0
        """The chance of all of the draft, as the draft model sees it."""
        self._model = model

    def begin(self, tokens: Sequence[int]) -> None:
        """The history is `tokens`. Nothing is computed before a draft is wanted."""
        self.history.extend(tokens)

    def propose(self, limit: int) -> Draft:
        """What `DraftModel.draft` made for it since the last `observe`."""
        return self.bounds.trim(Draft(tuple(self.tokens[:limit]), tuple(self.chances[:limit])))

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """`emitted` follow the history: keeps the rows of those that were drafted and cuts the other drafted ones."""
        self.history.extend(emitted)
        self.settle(emitted)

    def settle(self, emitted: Sequence[int] = ()) -> None:
        """Ends the draft: none of its rows is left but those of the first tokens of `emitted`, the history's end."""
        if self.lease is not None and self.computed:
            right = matching(self.tokens[: self.computed], emitted)
            right = max(0, min(right, self.behind - 1))  # one row must be left: it gives the next draft
            self.lease.commit(self.tokens[:right])
            if right < self.computed:
                self.lease.roll_back()
        self.tokens, self.chances, self.computed, self.together = [], [], 0, 1.0

    def truncate(self, length: int) -> None:
        """The history is cut; its rows are shared again as far as they hold."""
        del self.history[length:]
        self.leave()

    def shift(self, keep: int, discard: int) -> None:
        """The same for a history of which a part in the middle is gone."""
        del self.history[keep : keep + discard]
        self._forgotten += discard
        self.leave()

    def picked(self, row: Logits) -> int:
        """The token that `row` of the draft model continues history and draft with. Raises BadLogits."""
        if self._pick is None:
            return likeliest(row)
        drafted = len(self.tokens)
        self.history.extend(self.tokens)
        try:
            return self._pick(row, self.history, self._forgotten)
        finally:
            del self.history[len(self.history) - drafted :]

    def leave(self, *, keep: bool = True) -> None:
        """Gives the lease back; the rows stay as a prefix that others, or this request later, may share if `keep`."""
        self.settle()
        if self.lease is not None:
            self.lease.leave(keep=keep)
            self.lease = None
            self._model.seated.remove(self)

    def end(self) -> None:
        """The request has ended."""
        self.leave()

    @property
    def behind(self) -> int:
        """Tokens of the history that are not computed."""
        return len(self.history) - (self.lease.length if self.lease else 0)


class Want(NamedTuple):
    """A seat that is to draft at most `limit` tokens, 0 if it only reads its history.

    It ends its draft once that is less likely to be right as a whole than `floor`, by what the draft model says.
    """

    seat: Seat
    limit: int
    floor: float = 0.0


class Part(NamedTuple):
    """A seat's rows of one pass: tokens of the history, and whether the last gives the first draft token."""

    want: Want
    rows: int
    drafts: bool


class DraftModel:
    """The draft model of an engine. Belongs to the engine thread. `vocabulary` is the size of the model's own, `cost`
    what its passes cost, as far as that is known."""

    def __init__(self, backend: Backend, vocabulary: int, cost: StepCost | None = None) -> None:
        self.context = backend.context
        self.cells = Cells(backend.context)
        self.seated: list[Seat] = []  # with a lease, the longest seated first
        self.fault = ""
        """Why it drafts no more, if it failed."""
        self._ends = backend.vocab.ends
        self._vocabulary = vocabulary
        self._narrow = backend.info.vocabulary if backend.info.vocabulary < vocabulary else 0
        self._cost = cost or StepCost()
        self._guessing: float | None = None  # seconds to pick a token

    def draft(self, wants: Sequence[Want], seconds: float) -> None:
        """Makes a draft for each of `wants`; none for those whose history is not computed yet.

        Histories are read for about `seconds` first. A seat that finds no cells drafts nothing.
        """
        if self.fault:
            return
        try:
            active = self._read(wants, seconds)
            while active:
                begun = time.perf_counter()
                going = [want for want, row in active if self._guess(want, row)]
                self._guessing = blend(self._guessing, (time.perf_counter() - begun) / len(active))
                active = self._extend(going)
        except NoFreeCells:
            self._unseat()
        except Aborted:
            pass  # the engine is closing
        except NativeFault as error:
            self._fail(str(error))

    def pass_seconds(self, seats: int) -> float:
        """One place of the drafts of so many seats; 0 if none was measured."""
        return self._cost.decode_seconds(seats) + seats * (self._guessing or 0.0)

    def unread(self, seat: Seat) -> int:
        """Tokens of its history to be read before it can draft, but for those that take no pass of their own."""
        behind = seat.behind
        if seat.lease is None:
            behind -= self.cells.find(seat.history, seat.salt).length
        return max(0, behind - BEHIND)

    def reading_seconds(self, tokens: int) -> float:
        """Until so many are read; 0 if none was measured."""
        return self._cost.prompt_row * tokens

    # ── histories ──

    def _read(self, wants: Sequence[Want], seconds: float) -> list[tuple[Want, Logits]]:
        """One pass over what the seats have not computed; the rows of those that can draft now."""
        parts = self._parts([want for want in wants if self._admit(want)], seconds)
        if not parts:
            return []
        batch = self.context.batch
        batch.clear()
        firsts = []
        for want, rows, drafts in parts:
            lease, history = want.seat.lease, want.seat.history
            assert lease is not None, "admitted"
            firsts.append(batch.add(lease.seq, lease.length, history[lease.length : lease.length + rows], int(drafts)))
        begun = time.perf_counter()
        logits = self._decode()
        long = any(rows > BEHIND for _, rows, _ in parts)
        self._cost.observe(0 if long else batch.rows, batch.rows if long else 0, time.perf_counter() - begun)
        for want, rows, _ in parts:
            lease = want.seat.lease
            assert lease is not None, "admitted"
            lease.commit(want.seat.history[lease.length : lease.length + rows])
        return [(part.want, logits[first]) for part, first in zip(parts, firsts, strict=True) if part.drafts]

    def _parts(self, wants: Sequence[Want], seconds: float) -> list[Part]:
        """First those that can draft at once, then as many rows of the longer ones as fit."""
        room, parts = self.context.batch.capacity, []
        for want in wants:
            if want.seat.behind <= min(BEHIND, room):
                parts.append(Part(want, want.seat.behind, want.limit > 0))
                room -= want.seat.behind
        rest = min(room, self._cost.prompt_rows(0, 0.0, seconds))
        for want in wants:
            behind = want.seat.behind
            if behind > BEHIND and rest > 0:
                rows = min(behind, rest)
                rest -= rows
                parts.append(Part(want, rows, rows == behind and want.limit > 0))
        return parts

    def _admit(self, want: Want) -> bool:
        """Whether the seat has a lease, or gets one as its history and a draft fit the free cells."""
        seat = want.seat
        seat.settle()
        if not seat.behind:  # its last draft was not verified, and the row that gave it is gone
            seat.leave()
        if not seat.history or (self._narrow and max(seat.history[-seat.behind :]) >= self._narrow):
            return False
        if seat.lease is None:
            found = self.cells.find(seat.history, seat.salt)
            need = len(seat.history) - found.length + want.limit
            if need > self.cells.free + self.cells.idle - found.idle:
                return False
            seat.lease = self.cells.claim(seat.history, seat.salt)
            self.seated.append(seat)
        return True

    # ── drafts ──

    def _guess(self, want: Want, row: Logits) -> bool:
        """Adds the token that the seat picks from `row` to the draft; whether the draft is to go on."""
        seat = want.seat
        row = self._aligned(row)
        try:
            token, (peak, mass) = seat.picked(row), spread(row)
        except BadLogits:
            return False
        chance = math.exp(float(row[token]) - peak) / mass
        if chance < seat.bounds.p_min:
            return False
        seat.tokens.append(token)
        seat.chances.append(chance)
        seat.together *= chance
        return len(seat.tokens) < want.limit and seat.together >= want.floor and token not in self._ends

    def _aligned(self, row: Logits) -> Logits:
        """The row with as many tokens as the model's have; those the draft model does not know are impossible."""
        missing = self._vocabulary - len(row)
        return np.pad(row, (0, missing), constant_values=-np.inf) if missing > 0 else row[: self._vocabulary]

    def _extend(self, wants: Sequence[Want]) -> list[tuple[Want, Logits]]:
        """One row more for each draft."""
        if not wants:
            return []
        batch = self.context.batch
        batch.clear()
        for want in wants:
            lease = want.seat.lease
            assert lease is not None, "it drafts"
            batch.add(lease.seq, lease.length + want.seat.computed, want.seat.tokens[-1:], 1)
        begun = time.perf_counter()
        logits = self._decode()
        self._cost.observe(len(wants), 0, time.perf_counter() - begun)
        for want in wants:
            want.seat.computed += 1
        return list(zip(wants, logits, strict=True))

    def _decode(self) -> Logits:
        self.cells.reclaim(self.context.batch.rows)
        logits = self.context.decode()
        self.cells.age()
        return logits

    # ── trouble ──

    def _unseat(self) -> None:
        """The cells are full: the newest seat leaves, its rows only as long as nobody needs the cells."""
        if self.seated:
            self.seated[-1].leave()

    def _fail(self, reason: str) -> None:
        """After a failed pass nothing is known of the cells, so nothing is drafted any more."""
        self.fault = f"the draft model failed and drafts no more: {reason}"
        log.error("%s", self.fault)
        for seat in [*self.seated]:
            seat.lease, seat.tokens, seat.chances, seat.computed = None, [], [], 0
        self.seated.clear()


def matching(draft: Sequence[int], emitted: Sequence[int]) -> int:
    """How many tokens of `draft`, from its first on, are those of `emitted`."""
    count = 0
    for guess, token in zip(draft, emitted, strict=False):
        if guess != token:
            break
        count += 1
    return count
