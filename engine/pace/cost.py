"""The cost of a step, learned from each step, and the number of prompt rows that fit into a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from math import exp, log
from typing import NamedTuple

import numpy as np

from engine.pace.curve import Curve, Seconds
from engine.pace.passes import Columns, Indices, Layout, SequenceRows, StepMatrix, StepShape, segments, strips

# Weight of a new measurement in a running mean.
_WEIGHT = 0.2
# The same weight for the seconds of a prompt row. An estimate that is too low makes steps too long, while one that is
# too high only slows prefill down, so a rise has more weight than a fall.
_RISE_WEIGHT, _FALL_WEIGHT = 0.4, 0.1
# A measurement is capped at this many times the mean: the machine is shared, and one delayed step must not distort the
# estimates.
_OUTLIER_FACTOR = 1.5
# Share of an error that is attributed to the number of rows of the pass, after many measurements of this number. Most
# of the error is attributed to the load factor, which all passes have in common.
_OWN_SHARE = 0.04
# The same share for a number of rows that was never measured.
_NEW_SHARE = 0.5
# Minimum seconds of an attended cell, as a share of a pass of one row: learning multiplies, so it cannot correct a
# zero.
_MIN_CELL_SHARE = 1e-6
# A chunk of a prompt has at least as many rows as make a row cost no more than this, relative to the best pass.
_CHUNK_ROW_FACTOR = 1.15
# Maximum seconds of such a chunk in a pass of its own, relative to those of the decoding sequences, which the chunk
# delays.
_OWN_PASS_FACTOR = 2.0
# Seconds after which a short prompt without a first token gets twice the share of a step that it gets at first. A long
# prompt gets it after the seconds of its own prefill: its length is no reason to slow down the decoding sequences.
_SHARE_SECONDS = 3.0
# Waiting time, relative to the same seconds, beyond which a prompt may lengthen a step beyond the usual limit. Where
# requests arrive faster than their prompts can be computed, the time to the first token would else grow without bound
# while other sequences decode at full pace.
_LIMIT_RATIO = 5.0
# After this many steps with both decoding sequences and prompt rows, one step has no prompt rows, so that the cost of
# decoding alone is measured.
_REFRESH_STEPS = 16
# A chunk of less than this share of the allowed rows, such as the end of a prompt, does not measure the cost of a row.
_MIN_CHUNK_SHARE = 0.25
# A step has at most this many times the prompt rows of the last one, as estimates do not hold far beyond the measured
# range.
_GROWTH_FACTOR = 2


def blend(mean: float | None, value: float, weight: float = _WEIGHT) -> float:
    """Returns the running mean `mean` after one more measurement, `value`. `None` is the mean of no measurements."""
    if mean is None:
        return value
    return mean + weight * (min(value, _OUTLIER_FACTOR * mean) - mean)


class StepTargets(NamedTuple):
    """Target seconds of a step."""

    step: float
    """Seconds of a step with decoding sequences; 0 is twice the seconds of the decoding sequences alone."""
    idle_step: float
    """Seconds of a step with prefill only."""


class PrefillWait(NamedTuple):
    """A prompt without a first token: seconds since its submission, and tokens that its prefill computes."""

    seconds: float
    tokens: int


class StepCost:
    """Cost model: seconds of a step by its passes and attended cells, plus seconds of each prompt row.

    The decode of a step without prompts takes `load_factor * (sum of curve[rows of a pass] + row_cell * attended)`
    seconds. The curve describes the model on this machine and has jumps. The error of a measurement, capped by
    `_OUTLIER_FACTOR`, is divided among curve, `row_cell` and `load_factor`.

    A prompt row costs more in a step with decoding sequences than in a long chunk alone, so each has its own mean.
    """

    def __init__(self, curve: Curve | None = None, layout: Layout | None = None, first_rows: int = 64) -> None:
        """`layout` is the layout of the measured context, by default unified KV. `first_rows` bounds the first prompt
        chunk."""
        self.curve = curve or Curve()
        self.layout = layout or Layout()
        self.row_cell = 0.0
        """Seconds of a pair of a row and an attended cell; 0 before the first measurement."""
        self.load_factor = 1.0
        """Current cost of all passes, relative to their cost when the curve was measured."""
        self.host_seconds = 0.0
        """Mean seconds of a step outside the decode."""
        self._mixed_row: float | None = None
        self._prompt_row: float | None = None
        self._last_mixed_rows = 4
        self._last_prompt_rows = first_rows
        self._allowed_rows = 0  # prompt rows that `prompt_rows` returned last
        self._mixed_steps = 0  # steps with prompt rows and decoding sequences since the last step without prompt rows

    def resident_cell(self, rows: int) -> float:
        """Returns the seconds by which an idle resident cell lengthens a decode of `rows` rows; 0 with per-slot KV."""
        return self.load_factor * self.row_cell * rows if self.layout.unified else 0.0

    @property
    def extra_pass(self) -> float:
        """Seconds by which a step grows if a pass of two rows is split. 0 with unified KV, or before the first
        measurement."""
        if self.layout.unified or not self.curve:
            return 0.0
        return self.load_factor * max(0.0, 2 * self.curve.seconds(1) - self.curve.seconds(2))

    def cuts(self, rows: Sequence[SequenceRows]) -> list[int]:
        """Returns where to cut decoding rows, which are in ascending order of ids, into passes: the index after each
        pass.

        There are no cuts if attention skips the cells that a row does not attend to, or if the costs are unknown.
        """
        if self.layout.unified or self.layout.flash or not self.row_cell or not self.extra_pass:
            return [len(rows)]
        return segments(rows, self.extra_pass / (self.load_factor * self.row_cell))

    # ── learning ──

    def add_host_time(self, seconds: float) -> None:
        """Records the seconds of a step outside the decode."""
        self.host_seconds = blend(self.host_seconds or None, max(0.0, seconds))

    def set_load_factor(self, shape: StepShape, seconds: float) -> None:
        """Sets the load factor so that a step of one pass, `shape`, costs `seconds`. An empty curve gets its first
        point."""
        (rows,) = shape.passes
        if self.curve:
            self.load_factor = seconds / self._unscaled(shape)
        else:
            self.curve.put(rows, seconds)
        self.row_cell = max(self.row_cell, _MIN_CELL_SHARE * self.curve.seconds(1))

    def observe(self, decode: StepShape, prompt_rows: int, seconds: float, *, own_pass: bool = False) -> None:
        """Records a decode that took `seconds`. `decode` is the shape of the step without its `prompt_rows` rows of
        prompts. With `own_pass` the decode had these only, which does not measure their cost in a mixed pass."""
        if not prompt_rows:
            refresh = self._mixed_steps >= _REFRESH_STEPS  # the first such step after many has more weight
            self._learn(decode, seconds, _RISE_WEIGHT if refresh else _WEIGHT)
            self._mixed_steps = 0
        elif not decode.passes:
            if prompt_rows >= _MIN_CHUNK_SHARE * self._allowed_rows:
                self._prompt_row = blend(self._prompt_row, seconds / prompt_rows)
                self._last_prompt_rows = prompt_rows
        else:
            self._mixed_steps += 1
            if not own_pass:
                self._observe_mixed(decode, prompt_rows, seconds)

    def _learn(self, shape: StepShape, seconds: float, weight: float) -> None:
        if not self.curve:
            largest = max(shape.passes)
            self.curve.put(largest, seconds * largest / shape.rows)
            return
        counts = Counter(shape.passes)
        costs = {rows: times * self.curve.seconds(rows) for rows, times in counts.items()}
        of_rows, of_cells = sum(costs.values()), self.row_cell * shape.attended
        expected = self.load_factor * (of_rows + of_cells)
        limit = log(_OUTLIER_FACTOR)
        error = max(-limit, min(limit, log(max(seconds, 1e-9) / expected)))
        share, attributed = of_rows / (of_rows + of_cells), 0.0
        for rows, cost in costs.items():
            count = self.curve.num_measurements(rows)
            own = (max(_OWN_SHARE, 0.5 / count) if count else _NEW_SHARE) * cost / of_rows
            self.curve.scale(rows, exp(own * share * error))
            attributed += own
        self.row_cell *= exp(_OWN_SHARE * (1 - share) * error)
        self.load_factor *= exp(weight * error * (1 - attributed))

    def _observe_mixed(self, decode: StepShape, prompt_rows: int, seconds: float) -> None:
        if (alone := self.decode_seconds(decode)) > seconds:
            self.load_factor *= (seconds / alone) ** _RISE_WEIGHT  # without the prompt the step would be even shorter
        if prompt_rows >= _MIN_CHUNK_SHARE * self._allowed_rows:
            each = max(seconds - self.decode_seconds(decode), 0.05 * seconds) / prompt_rows
            rises = self._mixed_row is None or each > self._mixed_row
            self._mixed_row = blend(self._mixed_row, each, _RISE_WEIGHT if rises else _FALL_WEIGHT)
            self._last_mixed_rows = prompt_rows

    # ── estimates ──

    @property
    def prompt_row(self) -> float:
        """Seconds of a prompt row in a step without decoding sequences; 0 before the first measurement."""
        return self._prompt_row or 0.0

    def decode_seconds(self, shape: StepShape) -> float:
        """Returns the seconds of the decode of a step without prompt rows; 0 before the first measurement."""
        return self.load_factor * self._unscaled(shape)

    def even_seconds(self, sequences: int, cells: int = 0) -> float:
        """Returns the seconds of a decode of one row for each of `sequences` sequences, which have `cells` cells
        together.

        Returns 0 before the first measurement. Any thread may call.
        """
        return self.decode_seconds(self.layout.even(sequences, cells))

    def _unscaled(self, shape: StepShape) -> float:
        return sum(map(self.curve.seconds, shape.passes)) + self.row_cell * shape.attended

    def unified_steps(self, first: int, more: int, cells: int) -> Seconds:
        """Returns the seconds, including host time, of steps of `first` up to `first + more` rows with unified KV.

        `cells` is the number of resident cells. Requires a measurement.
        """
        rows, ubatch = np.arange(first, first + more + 1), self.layout.ubatch
        line = self.curve.line(min(first + more, ubatch))
        if first + more <= ubatch:
            bare = line[first : first + more + 1]
        else:
            full, rest = np.divmod(rows, ubatch)
            bare = full * line[ubatch] + np.where(rest, line[rest], 0.0)
        return self.load_factor * (bare + self.row_cell * cells * rows) + self.host_seconds

    def per_slot_steps(self, columns: Columns, heights: StepMatrix) -> Seconds:
        """Returns the seconds, including host time, of each of the steps whose columns have `heights` rows, with
        per-slot KV or recurrent states.

        Requires a measurement.
        """
        found, steps = strips(columns, heights), heights.shape[1]
        totals = found.sequences * found.rows
        bare = self._of_strips(found.sequences, found.rows)
        own_cells = self.layout.flash or self.layout.recurrent
        if not own_cells:
            bare += self.row_cell * totals * columns.longest_padded(found.first, found.last)
        seconds: Seconds = np.bincount(found.step, bare, steps).astype(np.float64)
        if own_cells:
            seconds += self.row_cell * (columns.cells @ heights)
        return self.load_factor * seconds + self.host_seconds

    def _of_strips(self, sequences: Indices, rows: Indices) -> Seconds:
        """Returns the seconds of strips, without the cost of attended cells and without the load factor."""
        totals, ubatch = sequences * rows, self.layout.ubatch
        largest = int(totals.max(initial=0))
        line = self.curve.line(min(largest, ubatch))
        if largest <= ubatch:
            return line.take(totals)
        each = np.maximum(1, ubatch // sequences)
        full, rest = np.divmod(rows, each)
        seconds: Seconds = full * _pass_seconds(line, each * sequences, ubatch)
        seconds += np.where(rest, _pass_seconds(line, rest * sequences, ubatch), 0.0)
        return seconds

    # ── prompts ──

    def prompt_rows(
        self,
        decode: StepShape,
        step_seconds: float,
        idle_step_seconds: float,
        prefilling: float = 1.0,
        waits: Iterable[PrefillWait] = (),
        *,
        own_pass: bool = False,
    ) -> int:
        """Returns the prompt rows that fit into a step with `decode`: at least 1, but 0 if the step measures `decode`.
        With `own_pass` the rows are decoded in a pass without those of `decode`, whose cost follows the curve.

        A step with decoding sequences may take `step_seconds`. If that is 0, prefill gets as much time as decoding. It
        gets a multiple where there are more than one `prefilling` sequences for each decoding one, as few must not hold
        up many, and once more for each time that a prompt has waited as long as its own prefill takes, at least
        `_SHARE_SECONDS`. The limit is then `idle_step_seconds`, the time of a step without decoding sequences, or up
        to twice that beyond `_LIMIT_RATIO`. Within the limit a chunk is efficient, see `_CHUNK_ROW_FACTOR`.
        """
        if decode.passes and self._mixed_steps >= _REFRESH_STEPS:
            return 0
        if decode.passes:
            alone = self.decode_seconds(decode)
            row = self._mixed_row or self._prompt_row
            ratio = max((wait.seconds / max(_SHARE_SECONDS, wait.tokens * (row or 0.0)) for wait in waits), default=0.0)
            limit = idle_step_seconds * min(2.0, max(1.0, ratio / _LIMIT_RATIO))
            equal = min(alone * max(prefilling, 1.0 + ratio), limit)
            own_pass &= bool(self.curve)
            fit = partial(_fit_pass, self.curve, self.layout.ubatch) if own_pass else partial(_fit, row)
            scale = self.load_factor if own_pass else 1.0
            # With per-slot KV the chunk is a pass of its own.
            in_pass = decode.rows if self.layout.unified and not own_pass else 0
            if step_seconds:
                rows = self._cheapest_rows(in_pass, fit(max(step_seconds - alone, 0.0) / scale))
            else:
                most = min(limit, _OWN_PASS_FACTOR * alone) if own_pass else limit
                efficient = min(self._efficient_rows, fit(most / scale))
                rows = max(self._cheapest_rows(in_pass, fit(equal / scale)), efficient)
            if not own_pass:
                rows = min(rows, _GROWTH_FACTOR * self._last_mixed_rows if self._mixed_row else self._first_mixed_rows)
        else:
            rows = min(
                _fit(self._prompt_row or self._mixed_row, idle_step_seconds), _GROWTH_FACTOR * self._last_prompt_rows
            )
        self._allowed_rows = max(1, rows)
        return self._allowed_rows

    @property
    def _first_mixed_rows(self) -> int:
        """Maximum prompt rows of the first step with decoding sequences: as many as the last measured step without
        them had, as a row costs much more in a smaller chunk."""
        return self._last_prompt_rows if self._prompt_row else _GROWTH_FACTOR * self._last_mixed_rows

    @property
    def _efficient_rows(self) -> int:
        """Minimum rows of a pass in which a row costs at most `_CHUNK_ROW_FACTOR` times as much as in the best measured
        pass; 0 before the first measurement."""
        each = {rows: point.seconds / rows for rows, point in self.curve.points.items()}
        return min((rows for rows, cost in each.items() if cost <= _CHUNK_ROW_FACTOR * min(each.values())), default=0)

    def _cheapest_rows(self, others: int, rows: int) -> int:
        """Returns a number near `rows`: that of prompt rows, in a pass with `others` other rows, for which the pass
        costs least per row. Returns `rows` if the curve is not measured there."""
        largest = others + rows + rows // 8
        first = others + max(1, rows // 2)
        known = [total for total in self.curve.points if first <= total <= largest]
        if not known or largest > max(self.curve.points):
            return rows
        line = self.curve.line(largest)[first : largest + 1]
        return first + int(np.argmin(line / np.arange(first, largest + 1))) - others


def _fit(row_seconds: float | None, seconds: float) -> int:
    """Returns the rows that fit into `seconds`; practically unlimited if the seconds of a row are unknown."""
    return int(seconds / row_seconds) if row_seconds else 2**30


def _pass_seconds(line: Seconds, rows: Indices, ubatch: int) -> Seconds:
    """Returns the seconds of passes of `rows` rows by the curve `line`. More than `ubatch` rows cost in proportion."""
    seconds: Seconds = line[np.minimum(rows, ubatch)] * np.maximum(1.0, rows / ubatch)
    return seconds


def _fit_pass(curve: Curve, ubatch: int, seconds: float) -> int:
    """Returns the rows, at most `ubatch`, of the largest pass that takes at most `seconds` by the curve; at least 1."""
    largest = max(curve.points)
    most = min(ubatch, int(largest * max(1.0, seconds / curve.seconds(largest))))
    fitting = np.flatnonzero(curve.line(most)[: most + 1] <= seconds)
    return max(1, int(fitting.max(initial=1)))
