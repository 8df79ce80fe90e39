"""Learned cost of a step, and the number of prompt rows that fit into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import exp, log
from typing import NamedTuple

import numpy as np

from engine.pace.curve import Curve, Seconds
from engine.pace.passes import Columns, Indices, Layout, SequenceRows, StepMatrix, StepShape, segments, strips

# Share of a new measurement in a running mean.
_WEIGHT = 0.2
# The same for the cost of prompt rows: an estimate that is too low makes steps too long, one that is too high only
# slows prefill down, so a rise counts more than a fall.
_RISE_WEIGHT, _FALL_WEIGHT = 0.4, 0.1
# A measurement counts for at most this many times the mean: the machine is shared, and one delayed step must not make
# the next ones long.
_OUTLIER_FACTOR = 1.5
# Share of an error that is attributed to the rows of the pass, once these were measured often. Most of the rest is
# attributed to the load factor, which all passes have in common.
_OWN_SHARE = 0.04
# The same for a number of rows that was never measured.
_NEW_SHARE = 0.5
# Seconds of an attended cell, as a share of a pass of one row: a cost of zero could not be corrected by factors.
_MIN_CELL_SHARE = 1e-6
# A chunk of a prompt has at least as many rows as make a row cost no more than this, relative to the best pass.
_CHUNK_ROW_FACTOR = 1.15
# Seconds after which a prompt without a first token gets twice the share of a step that it gets at first.
_SHARE_SECONDS = 3.0
# Seconds after which a prompt without a first token may lengthen a step beyond the usual limit. Where requests arrive
# faster than their prompts can be computed, the time to the first token would else grow without bound while other
# sequences decode at full pace.
_LIMIT_SECONDS = 15.0
# One of so many steps with decoding sequences has no prompt rows, so that the cost of decoding alone is measured.
_REFRESH_STEPS = 16
# A chunk below this fraction of the allowed rows, the end of a prompt, is no good measure of the cost of a row.
_MIN_CHUNK_SHARE = 0.25
# A step has at most this many times the prompt rows of the last one, as estimates do not hold far beyond the measured
# range.
_GROWTH_FACTOR = 2


def blend(mean: float | None, value: float, weight: float = _WEIGHT) -> float:
    """Returns the running mean after one more measurement. A mean of `None` has no measurements."""
    if mean is None:
        return value
    return mean + weight * (min(value, _OUTLIER_FACTOR * mean) - mean)


class StepTargets(NamedTuple):
    """Target seconds of a step."""

    step: float
    """Of a step with decoding sequences; 0 is twice their own time."""
    idle_step: float
    """Of a step with prefill only."""


class StepCost:
    """Seconds of a step by its passes and attended cells without prompts, and of each prompt row more.

    The decode of a step without prompts takes `load_factor * (sum of curve[rows of a pass] + row_cell * attended)`. The
    curve is the model's on this machine and has jumps. The error of a measurement is divided among the three, and
    counts for no more than `_OUTLIER_FACTOR`.

    A prompt row costs more in a step with decoding sequences than in a long chunk alone, so there is a mean for each.
    """

    def __init__(self, curve: Curve | None = None, layout: Layout | None = None, first_rows: int = 64) -> None:
        """`layout` is that of the context whose steps are measured; unified KV by default."""
        self.curve = curve or Curve()
        self.layout = layout or Layout()
        self.row_cell = 0.0
        """Seconds of a pair of a row and an attended cell; 0 if not measured."""
        self.load_factor = 1.0
        """The cost of everything now, relative to the time when the curve was measured."""
        self.host_seconds = 0.0
        """Seconds of a step outside the decode."""
        self._mixed_row: float | None = None
        self._prompt_row: float | None = None
        self._last_mixed_rows = 4
        self._last_prompt_rows = first_rows
        self._allowed = 0  # prompt rows that the last step was allowed
        self._mixed_steps = 0  # steps with prompt rows and decoding sequences since the last step without prompt rows

    def resident_cell(self, rows: int) -> float:
        """Returns the seconds by which an idle resident cell lengthens a decode of `rows` rows; 0 with per-slot KV."""
        return self.load_factor * self.row_cell * rows if self.layout.unified else 0.0

    @property
    def extra_pass(self) -> float:
        """Seconds by which a step grows if a pass of two rows is split; 0 with unified KV or if nothing was
        measured."""
        if self.layout.unified or not self.curve:
            return 0.0
        return self.load_factor * max(0.0, 2 * self.curve.seconds(1) - self.curve.seconds(2))

    def cuts(self, rows: Sequence[SequenceRows]) -> list[int]:
        """Returns where to cut decoding rows, in ascending order of their ids, into passes: the index after each part.

        There is one part where attention skips the cells that a row does not attend to, or its cost is not known.
        """
        if self.layout.unified or self.layout.flash or not self.row_cell or not self.extra_pass:
            return [len(rows)]
        return segments(rows, self.extra_pass / (self.load_factor * self.row_cell))

    # ── learning ──

    def add_host_time(self, seconds: float) -> None:
        """Records the seconds of a step outside the decode."""
        self.host_seconds = blend(self.host_seconds or None, max(0.0, seconds))

    def set_load_factor(self, shape: StepShape, seconds: float) -> None:
        """Sets the load factor by a step of one pass that takes `seconds` now; without a curve, begins one."""
        (rows,) = shape.passes
        if self.curve:
            self.load_factor = seconds / self._unscaled(shape)
        else:
            self.curve.put(rows, seconds)
        self.row_cell = max(self.row_cell, _MIN_CELL_SHARE * self.curve.seconds(1))

    def observe(self, decode: StepShape, prompt_rows: int, seconds: float) -> None:
        """Records a decode of `seconds`: `decode` is the shape of the step without its `prompt_rows`."""
        if not prompt_rows:
            refresh = self._mixed_steps >= _REFRESH_STEPS  # the first such step after many counts as several
            self._learn(decode, seconds, _RISE_WEIGHT if refresh else _WEIGHT)
            self._mixed_steps = 0
        elif not decode.passes:
            if prompt_rows >= _MIN_CHUNK_SHARE * self._allowed:
                self._prompt_row = blend(self._prompt_row, seconds / prompt_rows)
                self._last_prompt_rows = prompt_rows
        else:
            self._mixed_steps += 1
            self._observe_mixed(decode, prompt_rows, seconds)

    def _learn(self, shape: StepShape, seconds: float, weight: float) -> None:
        if not self.curve:
            largest = max(shape.passes)
            self.curve.put(largest, seconds * largest / shape.rows)
            return
        counts = Counter(shape.passes)
        costs = {rows: times * self.curve.seconds(rows) for rows, times in counts.items()}
        bare, of_cells = sum(costs.values()), self.row_cell * shape.attended
        expected = self.load_factor * (bare + of_cells)
        limit = log(_OUTLIER_FACTOR)
        error = max(-limit, min(limit, log(max(seconds, 1e-9) / expected)))
        share, known = bare / (bare + of_cells), 0.0
        for rows, cost in costs.items():
            seen = self.curve.seen(rows)
            own = (max(_OWN_SHARE, 0.5 / seen) if seen else _NEW_SHARE) * cost / bare
            self.curve.scale(rows, exp(own * share * error))
            known += own
        self.row_cell *= exp(_OWN_SHARE * (1 - share) * error)
        self.load_factor *= exp(weight * error * (1 - known))

    def _observe_mixed(self, decode: StepShape, prompt_rows: int, seconds: float) -> None:
        if (alone := self.decode_seconds(decode)) > seconds:
            self.load_factor *= (seconds / alone) ** _RISE_WEIGHT  # shorter still without the prompt
        if prompt_rows >= _MIN_CHUNK_SHARE * self._allowed:
            each = max(seconds - self.decode_seconds(decode), 0.05 * seconds) / prompt_rows
            rises = self._mixed_row is None or each > self._mixed_row
            self._mixed_row = blend(self._mixed_row, each, _RISE_WEIGHT if rises else _FALL_WEIGHT)
            self._last_mixed_rows = prompt_rows

    # ── estimates ──

    @property
    def prompt_row(self) -> float:
        """Seconds of a prompt row in a step without decoding sequences; 0 if none was measured."""
        return self._prompt_row or 0.0

    def decode_seconds(self, shape: StepShape) -> float:
        """Returns the seconds of the decode of a step without prompt rows; 0 if nothing was measured."""
        return self.load_factor * self._unscaled(shape)

    def even_seconds(self, sequences: int, cells: int = 0) -> float:
        """Returns the seconds of a decode of one row for each of `sequences`, which have `cells` cells together; 0 if
        nothing was measured. Any thread may call."""
        return self.decode_seconds(self.layout.even(sequences, cells))

    def _unscaled(self, shape: StepShape) -> float:
        return sum(map(self.curve.seconds, shape.passes)) + self.row_cell * shape.attended

    def unified_steps(self, first: int, more: int, cells: int) -> Seconds:
        """Returns the seconds of steps, host time included, of `first` up to `first + more` rows with unified KV.

        `cells` cells are resident. Something was measured.
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
        """Returns the seconds of each of the steps `heights`, host time included, with per-slot KV.

        Something was measured.
        """
        found, steps = strips(columns, heights), heights.shape[1]
        totals = found.sequences * found.rows
        bare = self._of_strips(found.sequences, found.rows)
        if not self.layout.flash:
            bare += self.row_cell * totals * found.padded
        seconds: Seconds = np.bincount(found.step, bare, steps).astype(np.float64)
        if self.layout.flash:
            seconds += self.row_cell * (columns.cells @ heights)
        return self.load_factor * seconds + self.host_seconds

    def _of_strips(self, sequences: Indices, rows: Indices) -> Seconds:
        """Returns the seconds of strips without the cells that they attend to, before the load factor."""
        totals, ubatch = sequences * rows, self.layout.ubatch
        most = int(totals.max(initial=0))
        line = self.curve.line(min(most, ubatch))
        if most <= ubatch:
            return line.take(totals)
        each = np.maximum(1, ubatch // sequences)
        full, rest = np.divmod(rows, each)
        seconds: Seconds = full * _cut(line, each * sequences, ubatch)
        seconds += np.where(rest, _cut(line, rest * sequences, ubatch), 0.0)
        return seconds

    # ── prompts ──

    def prompt_rows(
        self,
        decode: StepShape,
        step_seconds: float,
        idle_step_seconds: float,
        prefilling: float = 1.0,
        waited: float = 0.0,
    ) -> int:
        """Returns the prompt rows that fit into a step with `decode`: at least 1, but 0 if the step measures `decode`.

        A step with decoding sequences may take `step_seconds`. If that is 0, prefill gets as much time as decoding. It
        gets a multiple where there are more than one `prefilling` sequences for each decoding one, as few must not hold
        up many, and where a prompt has `waited` for its first token: once more for each `_SHARE_SECONDS`. The limit is
        then `idle_step_seconds`, the time of a step without decoding sequences, and twice that after
        2 * `_LIMIT_SECONDS`. Within the limit a chunk is long enough to be efficient, see `_CHUNK_ROW_FACTOR`.
        """
        if decode.passes and self._mixed_steps >= _REFRESH_STEPS:
            return 0
        if decode.passes:
            alone = self.decode_seconds(decode)
            limit = idle_step_seconds * min(2.0, max(1.0, waited / _LIMIT_SECONDS))
            equal = min(alone * max(prefilling, 1.0 + waited / _SHARE_SECONDS), limit)
            row = self._mixed_row or self._prompt_row
            # With per-slot KV the chunk is a pass of its own.
            in_pass = decode.rows if self.layout.unified else 0
            if step_seconds:
                rows = self._cheapest_rows(in_pass, _fit(max(step_seconds - alone, 0.0), row))
            else:
                rows = max(self._cheapest_rows(in_pass, _fit(equal, row)), min(self._efficient_rows, _fit(limit, row)))
            rows = min(rows, _GROWTH_FACTOR * self._last_mixed_rows)
        else:
            rows = min(
                _fit(idle_step_seconds, self._prompt_row or self._mixed_row), _GROWTH_FACTOR * self._last_prompt_rows
            )
        self._allowed = max(1, rows)
        return self._allowed

    @property
    def _efficient_rows(self) -> int:
        """The fewest rows of a pass that cost at most `_CHUNK_ROW_FACTOR` times as much each as the best measured pass;
        0 if none was measured."""
        each = {rows: point.seconds / rows for rows, point in self.curve.points.items()}
        return min((rows for rows, cost in each.items() if cost <= _CHUNK_ROW_FACTOR * min(each.values())), default=0)

    def _cheapest_rows(self, others: int, rows: int) -> int:
        """Returns about `rows`: the number of prompt rows at which a row of a pass with `others` is cheapest, where
        measured."""
        most = others + rows + rows // 8
        first = others + max(1, rows // 2)
        known = [total for total in self.curve.points if first <= total <= most]
        if not known or most > max(self.curve.points):
            return rows
        line = self.curve.line(most)[first : most + 1]
        return first + int(np.argmin(line / np.arange(first, most + 1))) - others


def _fit(seconds: float, row_seconds: float | None) -> int:
    """Returns the rows that fit into `seconds`; without a limit if the cost of a row is not known."""
    return int(seconds / row_seconds) if row_seconds else 2**30


def _cut(line: Seconds, rows: Indices, ubatch: int) -> Seconds:
    """Returns the seconds of passes of `rows` rows; more than `ubatch` cost in proportion."""
    seconds: Seconds = line[np.minimum(rows, ubatch)] * np.maximum(1.0, rows / ubatch)
    return seconds
