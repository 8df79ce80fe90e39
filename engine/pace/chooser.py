"""Choice of the draft that each sequence gets verified and of its length, and of drafts to explore."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from engine.pace.cost import StepCost
from engine.pace.curve import Seconds
from engine.pace.journal import Journal
from engine.pace.lengths import Chances, Shares, pick, places, share, share_per_slot
from engine.pace.passes import Columns, Heights, SequenceRows, Shape

# A step with drafts must be better than one without by this share: the best estimate of many is often an overestimate.
CAUTION = 0.03
# Share of all rows, and of all seconds, that explores drafts with negative expected gain, so that acceptance estimates
# do not go stale.
TRIAL = 0.01
# Rows, and seconds, that may be saved up for exploration.
SAVED_ROWS, SAVED_SECONDS = 16.0, 5.0
# Steps between two attempts to explore.
PAUSE_STEPS = 16
# A trial whose step is slower than this share of the speed without drafts is not made.
PLAUSIBLE = 0.75
# The chance of a draft model's token, at best: if drafting does not pay even then, it is not explored.
OPTIMISM = 0.95
# Tokens that the draft model drafts for each sequence in a trial.
FIRST = 4
# Pairs of an interval of columns and a step that one choice may look at; more take too long with many slots.
MOST_PAIRS = 60_000


class Load(NamedTuple):
    """The coming step without the drafts that are still to be chosen."""

    sequences: tuple[SequenceRows, ...]
    """Decoding sequences in ascending order of ids, each with its row and the drafts that are settled."""
    sure: float
    """Expected tokens of the step."""
    cells: int
    """Resident cells of all sequences, idle ones too."""
    most: int
    """Rows that may be added."""

    @property
    def rows(self) -> int:
        """Rows of all decoding sequences."""
        return sum(part.rows for part in self.sequences)

    def drafted(self, drafts: Mapping[int, int], gain: float = 0.0) -> Load:
        """Returns the step in which `drafts`, tokens by sequence id, are settled too; `gain` of them are expected to
        be accepted."""
        sequences = tuple(part._replace(rows=part.rows + drafts.get(part.seq, 0)) for part in self.sequences)
        most = max(0, self.most - sum(drafts.values()))
        return Load(sequences, self.sure + gain, self.cells, most)


class Choice(NamedTuple):
    """For each sequence with drafts the index of the chosen one and its length, and the expectation of the step."""

    picked: list[int]
    lengths: list[int]
    rate: float
    """Tokens per second, as in `Shares`."""
    gain: float
    """Expected accepted tokens."""
    trial: bool = False
    """True if the expected gain is negative."""


class Verified(NamedTuple):
    """Result of the verification of one draft: tokens, accepted tokens, seconds that the accepted tokens would have
    taken without drafts, and seconds by which all tokens lengthened the step."""

    drafted: int
    accepted: int
    saved: float = 0.0
    spent: float = 0.0


class Chooser:
    """Chooses by the learned cost of a step. Belongs to the engine thread."""

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self._journal = Journal()
        self._decided = Choice([], [], 0.0, 0.0)  # last
        self._worth = self._price = 0.0  # seconds of a token without drafts, and of a drafted one, in the last step
        self._rows = 0.0  # saved up for trials
        self._seconds = 0.0
        self._steps = 0  # since the last attempt to explore
        self._row = 0.5  # tokens that a drafted row cost in the last decision

    def saw(self, sequences: Sequence[SequenceRows], prompt_rows: int, cells: int, seconds: float) -> None:
        """Records the decode of a step: its decoding sequences in ascending order of ids, each with one row and those
        of its draft, the prompt rows of all others, and the resident cells before the step."""
        layout = self.cost.layout
        shape = layout.shape(sequences, cells)
        drafts = shape.rows - len(sequences)
        if sequences:
            bare = layout.shape([part._replace(rows=1) for part in sequences], cells) if drafts else shape
            self._judge(shape, bare, drafts, seconds, mixed=prompt_rows > 0)
        self.cost.observe(shape, prompt_rows, seconds)
        self._rows = min(SAVED_ROWS, self._rows + TRIAL * shape.rows)
        self._seconds = min(SAVED_SECONDS, self._seconds + TRIAL * seconds)
        self._steps += 1

    def _judge(self, shape: Shape, bare: Shape, drafts: int, seconds: float, *, mixed: bool) -> None:
        """Sets the worth of an accepted token and the price of a drafted one. `bare` is the shape without drafts."""
        count, expected = bare.rows, self.cost.decode_seconds(shape)
        spent = min(seconds, expected) if mixed else seconds
        # Of the measured time, the share that the cost model gives to the rows without drafts.
        own = spent * self.cost.decode_seconds(bare) / expected if expected else spent
        self._worth, self._price = own / count, max(0.0, spent - own) / max(1, drafts)
        self._journal.step(count, drafts, self._decided.gain, expected, spent)

    def verified(self, drafted: int, accepted: int) -> Verified:
        """Returns what a draft of the last step was worth."""
        self._journal.accepted(accepted)
        return Verified(drafted, accepted, accepted * self._worth, drafted * self._price)

    def rate(self, load: Load) -> float:
        """Returns the tokens per second of `load` as it is; something was measured."""
        return load.sure / (self.cost.decode_seconds(self._shape(load)) + self.cost.host_seconds)

    def _shape(self, load: Load) -> Shape:
        return self.cost.layout.shape(load.sequences, load.cells)

    # ── which drafts ──

    def decide(self, slots: Sequence[Sequence[Chances]], seqs: Sequence[int], load: Load) -> Choice:
        """Returns what the coming step verifies: the result of `choose`, or now and then a trial."""
        self._decided = self.choose(slots, seqs, load, trial=True)
        return self._decided

    @property
    def trying(self) -> bool:
        """True if the last decision was a trial."""
        return self._decided.trial

    def choose(
        self, slots: Sequence[Sequence[Chances]], seqs: Sequence[int], load: Load, *, trial: bool = False
    ) -> Choice:
        """Returns the drafts that maximise the product of all sequences' speeds; now and then, with `trial`, drafts
        that are not expected to.

        `slots` are the drafts, at least one each, of the sequences `seqs`, as the chances of their tokens.
        """
        longest = sum(max(map(len, drafts)) for drafts in slots)
        if not longest or not self.cost.curve:
            return Choice([0] * len(slots), [0] * len(slots), 0.0, 0.0)
        shares = self._sharing(seqs, load, min(load.most, longest))
        best = self._best(slots, shares, 0)
        if trial and not best.gain and self._steps >= PAUSE_STEPS and self._rows >= 1.0:
            self._steps = 0
            tried = self._best(slots, shares, 1)
            if tried.rate > PLAUSIBLE * best.rate and (rows := sum(tried.lengths)) <= self._rows:
                self._rows -= rows
                return tried._replace(trial=True)
        return best

    def _sharing(self, seqs: Sequence[int], load: Load, most: int) -> Callable[[Sequence[Chances], int], Shares]:
        """Returns a function of one draft for each of `seqs`, and of the least number of tokens."""
        if self.cost.layout.unified:
            seconds = self.cost.unified_steps(load.rows, max(0, most), load.cells)
            seconds[1:] *= 1.0 + CAUTION
            return lambda curves, least: share(curves, seconds, load.sure, least=least)
        columns = Columns.of(load.sequences, seqs)
        cost, steps = partial(self._per_slot, columns), max(16, MOST_PAIRS // columns.intervals)
        return lambda curves, least: share_per_slot(curves, cost, load.sure, most, least, steps)

    def _per_slot(self, columns: Columns, lengths: Heights) -> Seconds:
        seconds = self.cost.per_slot_steps(columns, columns.heights(lengths))
        seconds[1:] *= 1.0 + CAUTION
        return seconds

    def _best(
        self, slots: Sequence[Sequence[Chances]], shares: Callable[[Sequence[Chances], int], Shares], least: int
    ) -> Choice:
        """Returns the better of two choices: the best of several drafts of a sequence depends on the price of a row in
        tokens, which depends on the number of rows. The first choice takes the price of the last decision."""
        price, picked = self._row, list[int]()
        best: Choice | None = None
        for _ in range(2):
            before, picked = picked, [pick(drafts, price) if len(drafts) > 1 else 0 for drafts in slots]
            if best is not None and picked == before:
                break
            found = shares([drafts[i] for drafts, i in zip(slots, picked, strict=True)], least)
            if best is None or found.rate > best.rate:
                best = Choice(picked, found.lengths, found.rate, found.gain)
            price = found.price
        assert best is not None, "the loop ran"
        self._row = price
        return best

    # ── the draft model ──

    def places(
        self,
        curves: Sequence[Chances],
        seqs: Sequence[int],
        bounds: tuple[int, int],
        load: Load,
        each: float,
        rate: float,
        prefill: float,
    ) -> tuple[int, float]:
        """Returns the number of tokens that the draft model drafts for each of `seqs`, 0 if that does not pay, and the
        tokens per second with it.

        `curves` are the expected chances of its tokens, `bounds` the least and the largest number, `each` the seconds
        of one token for all of them, and `rate` the tokens per second without it. Now and then it is tried although
        the expectation is negative, if it could pay; `prefill` seconds are then spent on histories as well.
        """
        least, most = bounds
        seconds = self._equal_steps(seqs, load, min(most, load.most // max(1, len(seqs))))
        best = places(curves, seconds, load.sure, each, least)
        if best[0] and best[1] > rate:
            return best
        hopeful = [[OPTIMISM**place for place in range(1, 1 + most)]] * len(curves)
        hoped, promised = places(hopeful, seconds, load.sure, each, least)
        tried = min(hoped, max(least, FIRST))
        if not tried or promised <= rate or (spent := tried * each + prefill) > self._seconds:
            return 0, rate
        self._seconds -= spent
        return tried, rate

    def _equal_steps(self, seqs: Sequence[int], load: Load, most: int) -> Seconds:
        """Returns the cautious seconds of steps with 0 to `most` tokens for each of `seqs`."""
        if self.cost.layout.unified:
            seconds = self.cost.unified_steps(load.rows, len(seqs) * most, load.cells)[:: max(1, len(seqs))]
            seconds[1:] *= 1.0 + CAUTION
            return seconds
        lengths = np.repeat(np.arange(1 + most, dtype=np.int16)[None], len(seqs), axis=0)
        return self._per_slot(Columns.of(load.sequences, seqs), lengths)
