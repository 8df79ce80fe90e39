"""One step's drafts: who is asked to guess, and what of the guesses is verified, for all requests at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine.pace import FIRST, Chooser, Load
from engine.speculate.base import NO_DRAFT, Draft
from engine.speculate.draft import DraftModel, DraftRequest
from engine.speculate.drafter import Drafter
from engine.speculate.guesser import Guesser

READING = 0.5
"""Share of the last step's time that the draft model may spend on reading histories before the next."""
GUESSING = 0.006
"""Share of a step that those may take who guess without a model and had nothing of use to say lately."""


class Wish(NamedTuple):
    """A request that could have a draft of at most `limit` tokens verified, and may emit `room` tokens more; `seq` is
    its sequence id."""

    drafter: Drafter
    limit: int
    room: int = 1
    seq: int = 0


class Asked(NamedTuple):
    """A request for which the draft model is to guess at most `most` tokens, as long as they are together at least
    `floor` likely to be right; about `room` tokens are still to come."""

    drafter: Drafter
    most: int
    room: int = 1
    floor: float = 0.0
    seq: int = 0


class Verify(NamedTuple):
    """So many tokens of a draft, and how many of them are likely to be right."""

    length: int
    gain: float
    seq: int = 0


NOTHING = Verify(0, 0.0)


class Proposals:
    """Asks and chooses. Belongs to the engine thread."""

    def __init__(self, chooser: Chooser, model: DraftModel | None = None) -> None:
        self.chooser = chooser
        self.model = model
        self._pays = False  # whether the draft model did the last time
        self._begun: set[int] = set()  # drafters that it was asked for with a history that it had not read

    def make(self, wishes: Sequence[Wish], reading: Sequence[Drafter], load: Load, seconds: float) -> list[Draft]:
        """What is to be verified for each of `wishes`.

        `reading` are those whose prompt is being read: the draft model reads along if nobody else guesses for them.
        The last step took `seconds`.
        """
        budget = GUESSING * seconds / max(1, len(wishes))
        for wish in wishes:
            wish.drafter.propose(wish.limit, budget)
        if self.model is not None:
            self._ask_model(self.model, wishes, reading, load, seconds)
        return self._choose(wishes, load)

    def _choose(self, wishes: Sequence[Wish], load: Load) -> list[Draft]:
        drafts = [wish.drafter.choose() if wish.drafter.fixed else NO_DRAFT for wish in wishes]
        load = load.drafted({wish.seq: len(draft.tokens) for wish, draft in zip(wishes, drafts, strict=True)})
        offered = offers_of(wishes)
        choice = self.chooser.decide(chances_of(offered), [wishes[i].seq for i in offered], load)
        for (i, offers), picked, length in zip(offered.items(), choice.picked, choice.lengths, strict=True):
            drafts[i] = wishes[i].drafter.take(offers[picked], length)
        return drafts

    # ── the draft model ──

    def _ask_model(
        self, model: DraftModel, wishes: Sequence[Wish], reading: Sequence[Drafter], load: Load, seconds: float
    ) -> None:
        able = [
            Asked(drafter, most, room, seq=seq)
            for drafter, limit, room, seq in wishes
            if (most := drafter.model_limit(limit)) >= max(1, drafter.model_least)
        ]
        asked = [one for one in able if one.drafter.fixed]
        asked += self._worth_asking(model, [one for one in able if not one.drafter.fixed], wishes, load)
        along = [Asked(drafter, 0) for drafter in reading if drafter.only_model and (drafter.fixed or self._pays)]
        wants = [
            DraftRequest(one.drafter.draft_sequence, one.most, one.floor)
            for one in asked + along
            if one.drafter.draft_sequence is not None
        ]
        if not wants:
            return
        self._begun = {
            id(one.drafter) for one in asked if one.drafter.draft_sequence and model.unread(one.drafter.draft_sequence)
        }
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
        self._pays = False
        if not able or model.fault or not self.chooser.cost.curve:
            return []
        others, rate = self._without(wishes, load)
        curves = [one.drafter.model_curve(one.most) for one in able]
        joined = [i for i, one in enumerate(able) if sum(curves[i]) >= others.get(id(one.drafter), NOTHING).gain]
        asked: list[Asked] = []
        if joined:
            for i in joined:  # what others have guessed for them is not verified then
                others.pop(id(able[i].drafter), None)
            asked = self._as_far_as_it_pays(
                model, [able[i] for i in joined], [curves[i] for i in joined], beside(load, others), rate
            )
        # One whose history is still being read is asked again, or it would have been read for nothing.
        begun = self._begun - {id(one.drafter) for one in asked}
        return asked + [one._replace(most=min(FIRST, one.most)) for one in able if id(one.drafter) in begun]

    def _without(self, wishes: Sequence[Wish], load: Load) -> tuple[dict[int, Verify], float]:
        """What would be verified of others' guesses, by drafter, and the tokens a second with that."""
        offered = offers_of(wishes)
        choice = self.chooser.choose(chances_of(offered), [wishes[i].seq for i in offered], load)
        rate = choice.rate or self.chooser.rate(load)
        chosen = zip(offered.items(), choice.picked, choice.lengths, strict=True)
        return {
            id(wishes[i].drafter): Verify(length, sum(offers[picked].curve[:length]), wishes[i].seq)
            for (i, offers), picked, length in chosen
        }, rate

    def _as_far_as_it_pays(
        self, model: DraftModel, able: Sequence[Asked], curves: Sequence[Sequence[float]], load: Load, rate: float
    ) -> list[Asked]:
        unread = [
            model.reading_seconds(model.unread(one.drafter.draft_sequence))
            for one in able
            if one.drafter.draft_sequence
        ]
        # Reading is paid for by all the tokens that are to come, most of which come in drafts.
        each = model.pass_seconds(len(able))
        each += sum(spent / max(1, one.room) for spent, one in zip(unread, able, strict=True))
        bounds = max(1, *(one.drafter.model_least for one in able)), max(one.most for one in able)
        seqs = [one.seq for one in able]
        most, rate = self.chooser.places(curves, seqs, bounds, load, each, rate, sum(unread))
        self._pays = most > 0
        floor = rate * each / len(able)
        return [
            one._replace(most=min(most, one.most), floor=0.0 if one.drafter.model_least else floor)
            for one in able
            if min(most, one.most) >= max(1, one.drafter.model_least)
        ]


def offers_of(wishes: Sequence[Wish]) -> dict[int, list[Guesser]]:
    """By their index in `wishes`, those whose lengths are measured and who have drafts, and whose drafts those are."""
    return {i: offers for i, wish in enumerate(wishes) if not wish.drafter.fixed and (offers := wish.drafter.offers)}


def chances_of(offered: Mapping[int, Sequence[Guesser]]) -> list[list[list[float]]]:
    """The same as chances, for the chooser."""
    return [[guesser.curve for guesser in offers] for offers in offered.values()]


def beside(load: Load, others: Mapping[int, Verify]) -> Load:
    """The step with what is verified of others' guesses."""
    return load.drafted({each.seq: each.length for each in others.values()}, sum(each.gain for each in others.values()))
