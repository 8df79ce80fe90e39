"""One step's drafts: who is asked to guess, and what of the guesses is verified, for all requests at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from engine.pace import Chooser, Load
from engine.speculate.base import NO_DRAFT, Draft
from engine.speculate.draft import DraftModel, Want
from engine.speculate.drafter import Drafter

READING = 0.5
"""Share of the last step's time that the draft model may spend on reading histories before the next."""
GUESSING = 0.006
"""Share of a step that those may take who guess without a model and had nothing of use to say lately."""


class Wish(NamedTuple):
    """A request that would have a draft of at most `limit` tokens verified."""

    drafter: Drafter
    limit: int


class Asked(NamedTuple):
    """A request for which the draft model is to guess at most `most` tokens, as long as it is so likely right; about
    `room` tokens are still to come."""

    drafter: Drafter
    most: int
    room: int = 1
    floor: float = 0.0


class Proposals:
    """Asks and chooses. Belongs to the engine thread."""

    def __init__(self, chooser: Chooser, model: DraftModel | None = None) -> None:
        self.chooser = chooser
        self.model = model
        self._pays = False  # whether the draft model did the last time

    def make(self, wishes: Sequence[Wish], reading: Sequence[Drafter], load: Load, seconds: float) -> list[Draft]:
        """What is to be verified for each of `wishes`.

        `reading` are those whose prompt is being read: the draft model reads along if nobody else guesses for them.
        The last step took `seconds`.
        """
        budget = GUESSING * seconds / max(1, len(wishes))
        for drafter, limit in wishes:
            drafter.propose(limit, budget)
        if self.model is not None:
            self._ask_model(self.model, wishes, reading, load, seconds)
        return self._choose(wishes, load)

    def _choose(self, wishes: Sequence[Wish], load: Load) -> list[Draft]:
        drafts = [wish.drafter.choose() if wish.drafter.fixed else NO_DRAFT for wish in wishes]
        fixed = sum(len(draft.tokens) for draft in drafts)
        load = load._replace(rows=load.rows + fixed, most=max(0, load.most - fixed))
        slots = [i for i, wish in enumerate(wishes) if not wish.drafter.fixed and wish.drafter.offers]
        offers = [wishes[i].drafter.offers for i in slots]
        choice = self.chooser.decide([[guesser.curve for guesser in part] for part in offers], load)
        for i, part, picked, length in zip(slots, offers, choice.picked, choice.lengths, strict=True):
            drafts[i] = wishes[i].drafter.take(part[picked], length)
        return drafts

    # ── the draft model ──

    def _ask_model(
        self, model: DraftModel, wishes: Sequence[Wish], reading: Sequence[Drafter], load: Load, seconds: float
    ) -> None:
        able = [Asked(drafter, most, limit) for drafter, limit in wishes if (most := drafter.model_limit(limit))]
        asked = [one for one in able if one.drafter.fixed]
        asked += self._worth_asking(model, [one for one in able if not one.drafter.fixed], wishes, load)
        along = [Asked(drafter, 0) for drafter in reading if drafter.only_model and (drafter.fixed or self._pays)]
        wants = [Want(one.drafter.seat, one.most, one.floor) for one in asked + along if one.drafter.seat is not None]
        if not wants:
            return
        begun = time.perf_counter()
        model.draft(wants, READING * seconds)
        each = (time.perf_counter() - begun) / len(wants)
        for one in asked:
            one.drafter.ask_model(one.most, each)

    def _worth_asking(
        self, model: DraftModel, able: Sequence[Asked], wishes: Sequence[Wish], load: Load
    ) -> list[Asked]:
        """Those of `able` for which it should guess, each as far as it pays: instead of what others have guessed for
        them, if more is to be expected of it."""
        if not able or model.fault or not self.chooser.cost.curve:
            return []
        offering = [wish.drafter for wish in wishes if wish.drafter.offers and not wish.drafter.fixed]
        offers = [drafter.offers for drafter in offering]
        choice = self.chooser.choose([[guesser.curve for guesser in part] for part in offers], load)
        lengths = dict(zip(map(id, offering), choice.lengths, strict=True))
        gains = {
            id(drafter): sum(part[picked].curve[:length])
            for drafter, part, picked, length in zip(offering, offers, choice.picked, choice.lengths, strict=True)
        }
        curves = [one.drafter.model_curve(one.most) for one in able]
        joined = [i for i, one in enumerate(able) if sum(curves[i]) > gains.get(id(one.drafter), 0.0)]
        if not joined:
            return []
        for i in joined:  # what others have guessed for them is not verified then
            lengths.pop(id(able[i].drafter), None)
            gains.pop(id(able[i].drafter), None)
        rows = sum(lengths.values())
        rest = Load(load.rows + rows, load.sure + sum(gains.values()), load.cells, max(0, load.most - rows))
        unread = [model.reading_seconds(able[i].drafter.seat) for i in joined]
        amortised = sum(spent / able[i].room for spent, i in zip(unread, joined, strict=True))
        each = model.pass_seconds(len(joined)) + amortised
        rate = choice.rate or load.sure / float(self.chooser.cost.steps(load.rows, 0, load.cells)[0])
        most, rate = self.chooser.places([curves[i] for i in joined], rest, each, rate, sum(unread))
        self._pays = most > 0
        floor = rate * each / len(joined)
        return [able[i]._replace(most=min(most, able[i].most), floor=floor) for i in joined] if most else []
