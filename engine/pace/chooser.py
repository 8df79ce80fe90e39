"""Chooses the draft and the length that a step verifies for each sequence, and now and then a trial to explore."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from engine.pace.alternatives import AlternativeOption, choose_options
from engine.pace.cost import StepCost
from engine.pace.curve import Seconds
from engine.pace.lengths import Chances, DraftLengths, best_lengths, best_lengths_per_slot, equal_lengths, pick_draft
from engine.pace.passes import Columns, SequenceRows, StepMatrix, StepShape
from engine.pace.step_log import StepLog

# A step with drafts must be better than one without by this share, because the best of many estimates is often too
# high.
DRAFT_MARGIN = 0.03
# Share of all rows, and of all seconds, for trials: steps that verify drafts with negative expected gain, so that
# acceptance estimates do not go stale.
_TRIAL_SHARE = 0.01
# Maximum rows and seconds that accumulate for trials.
_MAX_TRIAL_ROWS, _MAX_TRIAL_SECONDS = 16.0, 5.0
# Minimum number of steps between two attempts at a trial.
_TRIAL_INTERVAL_STEPS = 16
# A trial step must have at least this share of the tokens per second of the best step.
_MIN_TRIAL_SPEED = 0.75
# Assumed chance that a batched proposer's token is accepted. If its drafts would not pay even then, there are no
# trials.
_OPTIMISTIC_CHANCE = 0.95
# Maximum tokens that a batched proposer drafts for each sequence in a trial.
TRIAL_TOKENS = 4
# Maximum pairs of an interval of columns and a step that one choice computes; more take too long with many slots.
_MAX_PAIRS = 60_000


class UpcomingStep(NamedTuple):
    """The next step, with the drafts that are chosen so far."""

    sequences: tuple[SequenceRows, ...]
    """Decoding sequences in ascending order of ids. Each has one row, and one for each token of its chosen draft."""
    base_tokens: float
    """Expected number of tokens that the step emits."""
    cells: int
    """Resident cells of all sequences, including idle ones."""
    max_more_rows: int
    """Maximum number of rows that drafts may add."""
    max_alternatives: int = 0
    """Maximum number of alternatives among these rows."""

    @property
    def rows(self) -> int:
        """Rows of all decoding sequences."""
        return sum(part.rows for part in self.sequences)

    def with_drafts(self, drafts: Mapping[int, int], gain: float = 0.0) -> UpcomingStep:
        """Returns the step with further drafts. `drafts` has their numbers of tokens by sequence id, and `gain` is the
        expected number of accepted tokens."""
        if not any(drafts.values()):
            return self._replace(base_tokens=self.base_tokens + gain)
        sequences = tuple(part._replace(rows=part.rows + drafts.get(part.seq, 0)) for part in self.sequences)
        max_more_rows = max(0, self.max_more_rows - sum(drafts.values()))
        return UpcomingStep(sequences, self.base_tokens + gain, self.cells, max_more_rows, self.max_alternatives)


class ChosenDrafts(NamedTuple):
    """The chosen drafts of the sequences that have drafts, and the expected result of the step."""

    picked: list[int]
    """For each sequence the index of the chosen draft."""
    lengths: list[int]
    """For each sequence the tokens of the chosen draft that are verified."""
    rate: float
    """Tokens per second, as in `DraftLengths`."""
    gain: float
    """Expected number of accepted tokens."""
    trial: bool = False
    """True if the drafts are chosen to explore, although verifying them is not expected to pay."""


class VerifiedDraft(Struct, frozen=True):
    """Result of the verification of one draft."""

    drafted: int
    """Number of verified tokens."""
    accepted: int
    """Number of accepted tokens."""
    saved: float = 0.0
    """Estimated seconds that the accepted tokens would have taken without drafts."""
    spent: float = 0.0
    """Estimated seconds by which the draft lengthened the step."""


class DraftChooser:
    """Chooses drafts and their lengths by `cost`, the learned cost of a step. Belongs to the engine thread."""

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self._log = StepLog()
        self._last_choice = ChosenDrafts([], [], 0.0, 0.0)  # the result of the last call of `decide`
        # Seconds of the last step by sequence without its draft, and by drafted token.
        self._base_token_seconds = self._drafted_token_seconds = 0.0
        self._trial_rows = 0.0  # available for trials
        self._trial_seconds = 0.0
        self._steps = 0  # since the last attempt at a trial
        self._row_price = 0.5  # cost of a drafted row, in tokens, in the last choice

    # ── after a step ──

    def observe_step(
        self, sequences: Sequence[SequenceRows], prompt_rows: int, cells: int, seconds: float, repeats: int = 1
    ) -> None:
        """Records the decode of a step, the last of `repeats` steps with equal rows.

        `sequences` are its decoding sequences in ascending order of ids, each with one row and one for each draft
        token. `prompt_rows` is the number of rows of all other sequences, and `cells` that of resident cells before the
        step.
        """
        layout = self.cost.layout
        shape = layout.shape(sequences, cells)
        drafted = shape.rows - len(sequences)
        if sequences:
            bare = layout.shape([SequenceRows(seq, 1, own) for seq, _, own in sequences], cells) if drafted else shape
            self._split_seconds(shape, bare, drafted, seconds, mixed=prompt_rows > 0)
        self.cost.observe(shape, prompt_rows, seconds)
        self._trial_rows = min(_MAX_TRIAL_ROWS, self._trial_rows + _TRIAL_SHARE * repeats * shape.rows)
        self._trial_seconds = min(_MAX_TRIAL_SECONDS, self._trial_seconds + _TRIAL_SHARE * repeats * seconds)
        self._steps += repeats

    def _split_seconds(self, shape: StepShape, bare: StepShape, drafted: int, seconds: float, *, mixed: bool) -> None:
        """Splits the time of a step between drafted tokens and the other decode rows. `bare` is its shape without
        drafts."""
        expected = self.cost.decode_seconds(shape) if drafted or mixed or self._log.is_on else 0.0
        spent = min(seconds, expected) if mixed else seconds
        own = spent
        if drafted and expected:
            # Of the measured time, the share that the cost model gives to the rows without drafts.
            own = spent * self.cost.decode_seconds(bare) / expected
        self._base_token_seconds = own / bare.rows
        self._drafted_token_seconds = max(0.0, spent - own) / max(1, drafted)
        self._log.record_step(bare.rows, drafted, self._last_choice.gain, expected, spent)

    def assess(self, drafted: int, accepted: int, alternatives: int = 0) -> VerifiedDraft:
        """Returns the result of a draft of the last step, of which `drafted` tokens were verified and `accepted`
        accepted. Its `alternatives` took as much time, but are not counted as drafted."""
        self._log.record_accepted(accepted)
        saved = accepted * self._base_token_seconds
        spent = (drafted + alternatives) * self._drafted_token_seconds
        return VerifiedDraft(drafted, accepted, saved, spent)

    # ── several drafts for each sequence ──

    def rate(self, step: UpcomingStep) -> float:
        """Returns the tokens per second of `step` without further drafts. Requires a measurement."""
        shape = self.cost.layout.shape(step.sequences, step.cells)
        return step.base_tokens / (self.cost.decode_seconds(shape) + self.cost.host_seconds)

    def decide(self, drafts: Sequence[Sequence[Chances]], seqs: Sequence[int], step: UpcomingStep) -> ChosenDrafts:
        """Returns the drafts that `step` verifies: the result of `choose` with trials. Stores it as the last choice."""
        self._last_choice = self.choose(drafts, seqs, step, trial=True)
        return self._last_choice

    @property
    def last_is_trial(self) -> bool:
        """True if the last result of `decide` is a trial."""
        return self._last_choice.trial

    def choose(
        self, drafts: Sequence[Sequence[Chances]], seqs: Sequence[int], step: UpcomingStep, *, trial: bool = False
    ) -> ChosenDrafts:
        """Returns the drafts and lengths that maximise the product of all sequences' speeds.

        `drafts` has, for each of the sequence ids `seqs`, one or more drafts, each as the chances of its tokens. With
        `trial` the result is now and then a trial.
        """
        longest = sum(max(map(len, curves)) for curves in drafts)
        if not longest or not self.cost.curve:
            return ChosenDrafts([0] * len(drafts), [0] * len(drafts), 0.0, 0.0)
        lengths = self._lengths(seqs, step, min(step.max_more_rows, longest))
        best = self._best(drafts, lengths, 0)
        if trial and not best.gain and self._steps >= _TRIAL_INTERVAL_STEPS and self._trial_rows >= 1.0:
            self._steps = 0
            tried = self._best(drafts, lengths, 1)
            if tried.rate > _MIN_TRIAL_SPEED * best.rate and (rows := sum(tried.lengths)) <= self._trial_rows:
                self._trial_rows -= rows
                return tried._replace(trial=True)
        return best

    def _lengths(
        self, seqs: Sequence[int], step: UpcomingStep, max_tokens: int
    ) -> Callable[[Sequence[Chances], int], DraftLengths]:
        """Returns a function that computes the best lengths, given one draft for each of `seqs` and the minimum number
        of tokens in all."""
        if self._any_split:
            seconds = self.cost.unified_steps(step.rows, max(0, max_tokens), step.cells)
            seconds[1:] *= 1.0 + DRAFT_MARGIN
            return lambda curves, min_tokens: best_lengths(curves, seconds, step.base_tokens, min_tokens=min_tokens)
        columns = self._columns(seqs, step)
        cost, steps = partial(self._per_slot_seconds, columns), max(16, _MAX_PAIRS // columns.intervals)
        return lambda curves, min_tokens: best_lengths_per_slot(
            curves, cost, step.base_tokens, max_tokens, min_tokens, steps
        )

    @property
    def _any_split(self) -> bool:
        """True if a pass takes any rows, so that the cost of drafts depends only on the total of their tokens."""
        return self.cost.layout.unified and not self.cost.layout.recurrent

    def _columns(self, seqs: Sequence[int], step: UpcomingStep) -> Columns:
        """Returns the columns of `step` with drafts for `seqs`. With unified KV and recurrent states a pass takes any
        sequences with the same number of rows, which attend to all resident cells."""
        if not self.cost.layout.unified:
            return Columns.of(step.sequences, seqs)
        placed = sorted(step.sequences, key=lambda part: (part.seq in seqs, part.rows))
        index = {part.seq: i for i, part in enumerate(placed)}
        parts = [SequenceRows(i, part.rows, step.cells) for i, part in enumerate(placed)]
        return Columns.of(parts, [index[seq] for seq in seqs])

    def _per_slot_seconds(self, columns: Columns, lengths: StepMatrix) -> Seconds:
        seconds = self.cost.per_slot_steps(columns, columns.heights(lengths))
        seconds[1:] *= 1.0 + DRAFT_MARGIN
        return seconds

    def _best(
        self,
        drafts: Sequence[Sequence[Chances]],
        lengths: Callable[[Sequence[Chances], int], DraftLengths],
        min_tokens: int,
    ) -> ChosenDrafts:
        """Returns the better of two choices.

        The best of several drafts of a sequence depends on the cost of a row in tokens, and this cost on the number of
        rows. The first choice uses the cost from the last call, the second the cost that results from the first.
        """
        price, picked = self._row_price, list[int]()
        best: ChosenDrafts | None = None
        for _ in range(2):
            previous, picked = picked, [pick_draft(curves, price) if len(curves) > 1 else 0 for curves in drafts]
            if best is not None and picked == previous:
                break
            found = lengths([curves[i] for curves, i in zip(drafts, picked, strict=True)], min_tokens)
            if best is None or found.rate > best.rate:
                best = ChosenDrafts(picked, found.lengths, found.rate, found.gain)
            price = found.row_price
        assert best is not None, "the first iteration sets it"
        self._row_price = price
        return best

    def choose_alternatives(
        self, options: Sequence[AlternativeOption | None], drafted: int, step: UpcomingStep
    ) -> list[int]:
        """Returns the indices of the alternatives that `step` verifies with `drafted` further draft tokens. There are
        none in a trial."""
        most = min(step.max_alternatives, step.max_more_rows - drafted)
        if most <= 0 or self.last_is_trial or not self.cost.curve:
            return []
        seconds = self.cost.unified_steps(step.rows + drafted, most, step.cells) + self.cost.host_seconds
        return choose_options(options, seconds, len(step.sequences), most)

    # ── drafts of a batched proposer ──

    def equal_lengths(
        self,
        curves: Sequence[Chances],
        seqs: Sequence[int],
        length_range: tuple[int, int],
        step: UpcomingStep,
        position_seconds: float,
        rate: float,
        prefill_seconds: float,
    ) -> tuple[int, float]:
        """Returns the number of tokens that a batched proposer drafts for each of `seqs`, and the tokens per second
        with these drafts. The number is 0 if drafting does not pay.

        `curves` are the expected chances of the draft tokens, and `length_range` the minimum and the maximum number.
        `position_seconds` is the time of one draft token for all of `seqs`, and `rate` the tokens per second without
        these drafts. If drafting is not expected to pay but could pay, the result is now and then a trial, whose cost
        includes `prefill_seconds` for histories.
        """
        min_tokens, max_tokens = length_range
        seconds = self._equal_steps(seqs, step, min(max_tokens, step.max_more_rows // max(1, len(seqs))))
        best = equal_lengths(curves, seconds, step.base_tokens, position_seconds, min_tokens)
        if best[0] and best[1] > rate:
            return best
        optimistic = [[_OPTIMISTIC_CHANCE**position for position in range(1, 1 + max_tokens)]] * len(curves)
        longest, possible = equal_lengths(optimistic, seconds, step.base_tokens, position_seconds, min_tokens)
        tried = min(longest, max(min_tokens, TRIAL_TOKENS))
        if not tried or possible <= rate:
            return 0, rate
        if (spent := tried * position_seconds + prefill_seconds) > self._trial_seconds:
            return 0, rate
        self._trial_seconds -= spent
        return tried, rate

    def _equal_steps(self, seqs: Sequence[int], step: UpcomingStep, max_tokens: int) -> Seconds:
        """Returns the seconds, with `DRAFT_MARGIN`, of steps with 0 to `max_tokens` draft tokens for each of `seqs`."""
        if self._any_split:
            seconds = self.cost.unified_steps(step.rows, len(seqs) * max_tokens, step.cells)[:: max(1, len(seqs))]
            seconds[1:] *= 1.0 + DRAFT_MARGIN
            return seconds
        lengths = np.repeat(np.arange(1 + max_tokens, dtype=np.int16)[None], len(seqs), axis=0)
        return self._per_slot_seconds(self._columns(seqs, step), lengths)
