"""Which draft each slot gets verified and how much of it, and what of that is only tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.pace.cost import StepCost
from engine.pace.curve import Seconds
from engine.pace.journal import Journal
from engine.pace.lengths import Chances, pick, places, share

CAUTION = 0.03
"""A draft has to promise so much more than none: what promises most is often what was judged too well."""
TRIAL = 0.01
"""Share of all rows, and of all seconds, for drafts that promise less than none: what was misjudged is found out."""
SAVED, SAVED_SECONDS = 16.0, 5.0
"""Rows, and seconds, that may be saved up for that."""
PAUSE = 16
"""Steps between two looks for something to try."""
PLAUSIBLE = 0.75
"""Nothing is tried that promises less than this of the speed without it."""
OPTIMISM = 0.95
"""The chance of a draft model's token, at best: if not even that pays, it is not asked at all."""
FIRST = 4
"""Places of a draft model that is tried."""


class Load(NamedTuple):
    """The step that is to come, without drafts that are still to be chosen."""

    rows: int
    sure: float
    """Tokens that it yields."""
    cells: int
    """Resident ones."""
    most: int
    """Rows that may be added."""


class Choice(NamedTuple):
    """For each slot which of its drafts, and how many tokens of that."""

    picked: list[int]
    lengths: list[int]
    rate: float
    """Tokens a second, as `share` counts them."""
    gain: float
    """Tokens that are likely to be accepted."""
    trial: bool = False
    """Whether it promises less than no drafts."""


class Verified(NamedTuple):
    """What became of a draft that was verified: tokens, of these the right ones, seconds that those would have taken
    everybody without drafts, and seconds by which all of them made the step longer."""

    drafted: int
    accepted: int
    saved: float = 0.0
    spent: float = 0.0


class Chooser:
    """Chooses by the measured cost of a step. Belongs to the engine thread."""

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self._journal = Journal()
        self._decided = Choice([], [], 0.0, 0.0)  # last
        self._worth = self._price = 0.0  # seconds of a token without drafts, and of a drafted one, in the last step
        self._rows = 0.0  # saved up for trials
        self._seconds = 0.0
        self._look = 0
        self._row = 0.5  # tokens that a drafted row cost in the last decision

    def saw(self, streams: int, drafts: int, prompt_rows: int, cells: int, seconds: float) -> None:
        """The decode of a step took so long: learns from that, and a little more may be tried."""
        if streams:
            expected = self.cost.decode_seconds(streams + drafts, cells)
            # Of the time that it really took, the share that the curve gives to the streams' own rows.
            spent = min(seconds, expected) if prompt_rows else seconds
            bare = spent * self.cost.decode_seconds(streams, cells) / expected if expected else spent
            self._worth, self._price = bare / streams, max(0.0, spent - bare) / max(1, drafts)
            self._journal.step(streams, drafts, self._decided.gain, expected, spent)
        self.cost.observe(streams + drafts, prompt_rows, seconds, cells)
        self._rows = min(SAVED, self._rows + TRIAL * (streams + drafts))
        self._seconds = min(SAVED_SECONDS, self._seconds + TRIAL * seconds)
        self._look += 1

    def verified(self, drafted: int, accepted: int) -> Verified:
        """What a draft of the last step was worth."""
        self._journal.accepted(accepted)
        return Verified(drafted, accepted, accepted * self._worth, drafted * self._price)

    def decide(self, slots: Sequence[Sequence[Chances]], load: Load) -> Choice:
        """What is verified in the step that comes: as `choose` says, or now and then what is only tried."""
        self._decided = self.choose(slots, load, trial=True)
        return self._decided

    @property
    def trying(self) -> bool:
        """Whether what was decided last is only tried."""
        return self._decided.trial

    def choose(self, slots: Sequence[Sequence[Chances]], load: Load, *, trial: bool = False) -> Choice:
        """What makes the step fastest for all who take part; now and then, with `trial`, what might.

        `slots` are each slot's drafts, at least one, as the chances of their tokens.
        """
        longest = sum(max(map(len, drafts)) for drafts in slots)
        if not longest or not self.cost.curve:
            return Choice([0] * len(slots), [0] * len(slots), 0.0, 0.0)
        seconds = self._cautious(load, min(load.most, longest))
        best = self._best(slots, seconds, load.sure, 0)
        if trial and not best.gain and self._look >= PAUSE and self._rows >= 1.0:
            self._look = 0
            tried = self._best(slots, seconds, load.sure, 1)
            if tried.rate > PLAUSIBLE * best.rate and (rows := sum(tried.lengths)) <= self._rows:
                self._rows -= rows
                return tried._replace(trial=True)
        return best

    def places(
        self,
        curves: Sequence[Chances],
        bounds: tuple[int, int],
        load: Load,
        each: float,
        rate: float,
        reading: float,
    ) -> tuple[int, float]:
        """How many tokens, of `bounds` least and most, the draft model is to guess for each of `curves`, by what
        is expected of its guesses, and the tokens a second with that; 0 if it does not pay.

        A place costs `each` seconds, `rate` is to be had without it. Now and then it is tried although it does not pay
        by what is expected, if it could: `reading` seconds for histories are then to be spent besides.
        """
        least, most = bounds
        seconds = self._cautious(load, min(load.most, most * len(curves)))
        best = places(curves, seconds, load.sure, each, most, least)
        if best[0] and best[1] > rate:
            return best
        hopeful = [[OPTIMISM**place for place in range(1, 1 + most)]] * len(curves)
        hoped, promised = places(hopeful, seconds, load.sure, each, most, least)
        tried = min(hoped, max(least, FIRST))
        if not tried or promised <= rate or (spent := tried * each + reading) > self._seconds:
            return 0, rate
        self._seconds -= spent
        return tried, rate

    def _cautious(self, load: Load, more: int) -> Seconds:
        seconds = self.cost.steps(load.rows, max(0, more), load.cells)
        seconds[1:] *= 1.0 + CAUTION
        return seconds

    def _best(self, slots: Sequence[Sequence[Chances]], seconds: Seconds, sure: float, least: int) -> Choice:
        """The best of two looks: which of several drafts a slot should get depends on what a row costs, in tokens, and
        that on how many there will be; at first it is taken for what it was in the last step."""
        price, picked = self._row, list[int]()
        best: Choice | None = None
        for _ in range(2):
            before, picked = picked, [pick(drafts, price) if len(drafts) > 1 else 0 for drafts in slots]
            if best is not None and picked == before:
                break
            shares = share([drafts[i] for drafts, i in zip(slots, picked, strict=True)], seconds, sure, least=least)
            if best is None or shares.rate > best.rate:
                best = Choice(picked, shares.lengths, shares.rate, shares.gain)
            rows = sum(shares.lengths) or 1
            price = shares.rate * float(seconds[min(rows, len(seconds) - 1)] - seconds[0]) / rows
        assert best is not None, "there was a look"
        self._row = price
        return best
