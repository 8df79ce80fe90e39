"""Choice of the draft that is verified for each sequence and of its length, and of drafts to explore."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from engine.pace.cost import StepCost
from engine.pace.curve import Seconds
from engine.pace.lengths import Chances, DraftLengths, best_lengths, best_lengths_per_slot, equal_lengths, pick_draft
from engine.pace.passes import Columns, SequenceRows, StepMatrix, StepShape
from engine.pace.step_log import StepLog

# A step with drafts must be better than one without by this share: the best of many estimates is often an overestimate.
DRAFT_MARGIN = 0.03
# Share of all rows, and of all seconds, that explores drafts with negative expected gain, so that acceptance estimates
# do not go stale.
_TRIAL_SHARE = 0.01
# Rows, and seconds, that may be saved up for exploration.
_MAX_TRIAL_ROWS, _MAX_TRIAL_SECONDS = 16.0, 5.0
# Steps between two attempts to explore.
_TRIAL_INTERVAL_STEPS = 16
# A trial is not made if its step is slower than this share of the speed without drafts.
_MIN_TRIAL_SPEED = 0.75
# The best chance of a token of a batched proposer: if drafting does not pay even then, it is not explored.
_OPTIMISTIC_CHANCE = 0.95
# Tokens that a batched proposer drafts for each sequence in a trial.
TRIAL_TOKENS = 4
# Pairs of an interval of columns and a step that one choice computes; more take too long with many slots.
_MAX_PAIRS = 60_000


class UpcomingStep(NamedTuple):
    """The next step without the drafts that are still to be chosen."""

    sequences: tuple[SequenceRows, ...]
    """Decoding sequences in ascending order of ids, each with its row and those of drafts that are chosen already."""
    base_tokens: float
    """Expected tokens of the step."""
    cells: int
    """Resident cells of all sequences, idle ones too."""
    most: int
    """Rows that may be added."""

    @property
    def rows(self) -> int:
        """Rows of all decoding sequences."""
        return sum(part.rows for part in self.sequences)

    def with_drafts(self, drafts: Mapping[int, int], gain: float = 0.0) -> UpcomingStep:
        """Returns the step in which `drafts`, tokens by sequence id, are chosen too; `gain` of them are expected to be
        accepted."""
        sequences = tuple(part._replace(rows=part.rows + drafts.get(part.seq, 0)) for part in self.sequences)
        most = max(0, self.most - sum(drafts.values()))
        return UpcomingStep(sequences, self.base_tokens + gain, self.cells, most)


class ChosenDrafts(NamedTuple):
    """For each sequence with drafts the index of the chosen one and its length, and the expectation of the step."""

    picked: list[int]
    lengths: list[int]
    rate: float
    """Tokens per second, as in `DraftLengths`."""
    gain: float
    """Expected accepted tokens."""
    trial: bool = False
    """True if the expected gain is negative."""


class VerifiedDraft(NamedTuple):
    """Result of the verification of one draft."""

    drafted: int
    """Tokens that were verified."""
    accepted: int
    saved: float = 0.0
    """Seconds that the accepted tokens would have taken without drafts."""
    spent: float = 0.0
    """Seconds by which all tokens lengthened the step."""


class DraftChooser:
    """Chooses drafts and their lengths by the learned cost of a step. Belongs to the engine thread."""

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self._log = StepLog()
        self._decided = ChosenDrafts([], [], 0.0, 0.0)  # the last decision
        # Seconds of a token without drafts, and of a drafted one, in the last step.
        self._base_token_seconds = self._drafted_token_seconds = 0.0
        self._trial_rows = 0.0  # saved up for trials
        self._trial_seconds = 0.0
        self._steps = 0  # since the last attempt to explore
        self._row_price = 0.5  # tokens that a drafted row cost in the last decision

    # ── after a step ──

    def observe_step(self, sequences: Sequence[SequenceRows], prompt_rows: int, cells: int, seconds: float) -> None:
        """Records the decode of a step.

        `sequences` are its decoding sequences in ascending order of ids, each with one row and those of its draft.
        `prompt_rows` are the rows of all others, and `cells` were resident before the step.
        """
        layout = self.cost.layout
        shape = layout.shape(sequences, cells)
        drafted = shape.rows - len(sequences)
        if sequences:
            bare = layout.shape([part._replace(rows=1) for part in sequences], cells) if drafted else shape
            self._split_seconds(shape, bare, drafted, seconds, mixed=prompt_rows > 0)
        self.cost.observe(shape, prompt_rows, seconds)
        self._trial_rows = min(_MAX_TRIAL_ROWS, self._trial_rows + _TRIAL_SHARE * shape.rows)
        self._trial_seconds = min(_MAX_TRIAL_SECONDS, self._trial_seconds + _TRIAL_SHARE * seconds)
        self._steps += 1

    def _split_seconds(self, shape: StepShape, bare: StepShape, drafted: int, seconds: float, *, mixed: bool) -> None:
        """Splits the time of a step between drafted tokens and others. `bare` is its shape without drafts."""
        count, expected = bare.rows, self.cost.decode_seconds(shape)
        spent = min(seconds, expected) if mixed else seconds
        # Of the measured time, the share that the cost model gives to the rows without drafts.
        own = spent * self.cost.decode_seconds(bare) / expected if expected else spent
        self._base_token_seconds, self._drafted_token_seconds = own / count, max(0.0, spent - own) / max(1, drafted)
        self._log.step(count, drafted, self._decided.gain, expected, spent)

    def assess(self, drafted: int, accepted: int) -> VerifiedDraft:
        """Returns the gain and the cost of a draft of the last step, of which `accepted` tokens were accepted."""
        self._log.accepted(accepted)
        saved, spent = accepted * self._base_token_seconds, drafted * self._drafted_token_seconds
        return VerifiedDraft(drafted, accepted, saved, spent)

    # ── drafts of which each sequence has some ──

    def rate(self, step: UpcomingStep) -> float:
        """Returns the tokens per second of `step` without more drafts. Something was measured."""
        shape = self.cost.layout.shape(step.sequences, step.cells)
        return step.base_tokens / (self.cost.decode_seconds(shape) + self.cost.host_seconds)

    def decide(self, drafts: Sequence[Sequence[Chances]], seqs: Sequence[int], step: UpcomingStep) -> ChosenDrafts:
        """Returns the drafts that `step` verifies: the result of `choose`, or now and then a trial."""
        self._decided = self.choose(drafts, seqs, step, trial=True)
        return self._decided

    @property
    def trying(self) -> bool:
        """True if the last decision was a trial."""
        return self._decided.trial

    def choose(
        self, drafts: Sequence[Sequence[Chances]], seqs: Sequence[int], step: UpcomingStep, *, trial: bool = False
    ) -> ChosenDrafts:
        """Returns the drafts and lengths that maximise the product of all sequences' speeds.

        `drafts` are for each of the sequences `seqs` its drafts, at least one, as the chances of their tokens. With
        `trial` the result is now and then a trial, with negative expected gain.
        """
        longest = sum(max(map(len, curves)) for curves in drafts)
        if not longest or not self.cost.curve:
            return ChosenDrafts([0] * len(drafts), [0] * len(drafts), 0.0, 0.0)
        lengths = self._lengths(seqs, step, min(step.most, longest))
        best = self._best(drafts, lengths, 0)
        if trial and not best.gain and self._steps >= _TRIAL_INTERVAL_STEPS and self._trial_rows >= 1.0:
            self._steps = 0
            tried = self._best(drafts, lengths, 1)
            if tried.rate > _MIN_TRIAL_SPEED * best.rate and (rows := sum(tried.lengths)) <= self._trial_rows:
                self._trial_rows -= rows
                return tried._replace(trial=True)
        return best

    def _lengths(
        self, seqs: Sequence[int], step: UpcomingStep, most: int
    ) -> Callable[[Sequence[Chances], int], DraftLengths]:
        """Returns a function from one draft for each of `seqs`, and the least tokens in all, to the best lengths."""
        if self.cost.layout.unified:
            seconds = self.cost.unified_steps(step.rows, max(0, most), step.cells)
            seconds[1:] *= 1.0 + DRAFT_MARGIN
            return lambda curves, least: best_lengths(curves, seconds, step.base_tokens, least=least)
        columns = Columns.of(step.sequences, seqs)
        cost, steps = partial(self._per_slot_seconds, columns), max(16, _MAX_PAIRS // columns.intervals)
        return lambda curves, least: best_lengths_per_slot(curves, cost, step.base_tokens, most, least, steps)

    def _per_slot_seconds(self, columns: Columns, lengths: StepMatrix) -> Seconds:
        seconds = self.cost.per_slot_steps(columns, columns.heights(lengths))
        seconds[1:] *= 1.0 + DRAFT_MARGIN
        return seconds

    def _best(
        self,
        drafts: Sequence[Sequence[Chances]],
        lengths: Callable[[Sequence[Chances], int], DraftLengths],
        least: int,
    ) -> ChosenDrafts:
        """Returns the better of two choices.

        The best of several drafts of a sequence depends on the price of a row in tokens, and that price on the number
        of rows. The first choice takes the price of the last decision, the second that of the first.
        """
        price, picked = self._row_price, list[int]()
        best: ChosenDrafts | None = None
        for _ in range(2):
            before, picked = picked, [pick_draft(curves, price) if len(curves) > 1 else 0 for curves in drafts]
            if best is not None and picked == before:
                break
            found = lengths([curves[i] for curves, i in zip(drafts, picked, strict=True)], least)
            if best is None or found.rate > best.rate:
                best = ChosenDrafts(picked, found.lengths, found.rate, found.gain)
            price = found.row_price
        assert best is not None, "the loop ran"
        self._row_price = price
        return best

    # ── drafts of a batched proposer ──

    def equal_lengths(
        self,
        curves: Sequence[Chances],
        seqs: Sequence[int],
        bounds: tuple[int, int],
        step: UpcomingStep,
        position_seconds: float,
        rate: float,
        prefill_seconds: float,
    ) -> tuple[int, float]:
        """Returns the number of tokens that a batched proposer drafts for each of `seqs`, 0 if drafting does not pay,
        and the tokens per second with it.

        `curves` are the expected chances of its tokens, `bounds` the least and the largest number, `position_seconds`
        the time of one token for all of them, and `rate` the tokens per second without it. Now and then the result is a
        trial although drafting is not expected to pay, if it could pay; `prefill_seconds` are then spent on histories
        as well.
        """
        least, most = bounds
        seconds = self._equal_steps(seqs, step, min(most, step.most // max(1, len(seqs))))
        best = equal_lengths(curves, seconds, step.base_tokens, position_seconds, least)
        if best[0] and best[1] > rate:
            return best
        optimistic = [[_OPTIMISTIC_CHANCE**position for position in range(1, 1 + most)]] * len(curves)
        longest, possible = equal_lengths(optimistic, seconds, step.base_tokens, position_seconds, least)
        tried = min(longest, max(least, TRIAL_TOKENS))
        if not tried or possible <= rate:
            return 0, rate
        if (spent := tried * position_seconds + prefill_seconds) > self._trial_seconds:
            return 0, rate
        self._trial_seconds -= spent
        return tried, rate

    def _equal_steps(self, seqs: Sequence[int], step: UpcomingStep, most: int) -> Seconds:
        """Returns the seconds, with the margin, of steps with 0 to `most` tokens for each of `seqs`."""
        if self.cost.layout.unified:
            seconds = self.cost.unified_steps(step.rows, len(seqs) * most, step.cells)[:: max(1, len(seqs))]
            seconds[1:] *= 1.0 + DRAFT_MARGIN
            return seconds
        lengths = np.repeat(np.arange(1 + most, dtype=np.int16)[None], len(seqs), axis=0)
        return self._per_slot_seconds(Columns.of(step.sequences, seqs), lengths)
