"""What a step costs, learnt from every step, and how many prompt rows fit beside the running streams."""

from __future__ import annotations

from math import exp, log
from typing import NamedTuple

import numpy as np

from engine.pace.curve import Curve, Seconds

WEIGHT = 0.2
"""Share of a new measurement in a running mean."""
WARY, HOPEFUL = 0.4, 0.1
"""The same where an error one way makes steps too long and the other way only reads prompts more slowly: what counsels
caution is believed sooner."""
OUTLIER = 1.5
"""A measurement counts for at most this many times the mean: the machine is shared, and one step that was held up
must not make the next ones long."""
OWN = 0.04
"""Share of an error that is blamed on the step's own number of rows, once that is well known; most of the rest is the
machine's, which is as fast or slow for all of them."""
STRANGE = 0.5
"""The same for a number of rows that was never measured."""
LEAST_CELL = 1e-6
"""Of a step of one row, by how much a resident cell makes it dearer at least: nothing could not be learnt from."""
REFRESH = 16
"""Of so many steps beside streams one holds no prompt rows, so that the streams' own cost is known as it changes."""
SMALL = 4
"""The end of a prompt, less than a chunk's size divided by this, says little about the cost of a row."""
GROWTH = 2
"""A step holds at most this many times the prompt rows of the last one, so that no estimate is trusted far
beyond what was measured."""


def blend(mean: float | None, value: float, weight: float = WEIGHT) -> float:
    """The running mean after one more measurement."""
    if mean is None:
        return value
    return mean + weight * (min(value, OUTLIER * mean) - mean)


class Pace(NamedTuple):
    """Seconds that a step may take: beside running streams (0 is twice theirs), and with prompts only."""

    step: float
    idle_step: float


class StepCost:
    """Seconds of a step: of its rows and the resident cells while only streams run, and of each prompt row more.

    Without prompts it is `machine * (curve[rows] + row_cell * rows * cells)`: the curve is the model's on this
    machine and has jumps, every row looks at every resident cell, and how fast the machine is right now, which others
    use too, is one factor. An error is shared out between the three, and counts for no more than `OUTLIER`.

    A prompt row is dearer beside streams than in a long chunk of its own, so the two are kept apart.
    """

    def __init__(self, curve: Curve | None = None, first_rows: int = 64) -> None:
        self.curve = curve or Curve()
        self.row_cell = 0.0
        """Seconds by which a resident cell makes each row dearer; 0 if not measured."""
        self.machine = 1.0
        """How much longer everything takes right now than when the curve was measured."""
        self.aside = 0.0
        """Seconds of a step outside the decode."""
        self._beside: float | None = None
        self._alone: float | None = None
        self._last_beside = 4
        self._last_alone = first_rows
        self._allowed = 0  # prompt rows that the last step might have held
        self._mixed = 0  # steps with prompts beside streams since one without

    @property
    def cell(self) -> float:
        """Seconds by which a resident cell makes each row dearer right now."""
        return self.machine * self.row_cell

    def beside(self, seconds: float) -> None:
        """So much of a step was spent outside the decode."""
        self.aside = blend(self.aside or None, max(0.0, seconds))

    def start(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows takes so long just now."""
        if self.curve:
            self.machine = seconds / self.curve.seconds(rows)
        else:
            self.curve.put(rows, seconds)
        self.row_cell = max(self.row_cell, LEAST_CELL * self.curve.seconds(1))

    def observe(self, decode_rows: int, prompt_rows: int, seconds: float, cells: int = 0) -> None:
        """Records a step beside `cells` resident cells whose decode was `seconds` long."""
        if not prompt_rows:
            refresh = self._mixed >= REFRESH  # the only one in a while: it counts as several
            self._learn(decode_rows, cells, seconds, WARY if refresh else WEIGHT)
            self._mixed = 0
        elif not decode_rows:
            if SMALL * prompt_rows >= self._allowed:
                self._alone = blend(self._alone, seconds / prompt_rows)
                self._last_alone = prompt_rows
        else:
            self._mixed += 1
            self._observe_mixed(decode_rows, prompt_rows, seconds, cells)

    def _learn(self, rows: int, cells: int, seconds: float, weight: float) -> None:
        if not self.curve:
            self.curve.put(rows, seconds)
            return
        seen, bare, of_cells = self.curve.seen(rows), self.curve.seconds(rows), self.row_cell * rows * cells
        expected = self.machine * (bare + of_cells)
        limit = log(OUTLIER)
        error = max(-limit, min(limit, log(max(seconds, 1e-9) / expected)))
        own = max(OWN, 0.5 / seen) if seen else STRANGE
        share = bare / (bare + of_cells)
        self.curve.scale(rows, exp(own * share * error))
        self.row_cell *= exp(OWN * (1 - share) * error)
        self.machine *= exp(weight * error * (1 - own))

    def _observe_mixed(self, decode_rows: int, prompt_rows: int, seconds: float, cells: int) -> None:
        if (alone := self.decode_seconds(decode_rows, cells)) > seconds:
            self.machine *= (seconds / alone) ** WARY  # without the prompt it would have been shorter still
        if SMALL * prompt_rows >= self._allowed:
            more = max(seconds - self.decode_seconds(decode_rows, cells), 0.05 * seconds)
            dearer = self._beside is None or more / prompt_rows > self._beside
            self._beside = blend(self._beside, more / prompt_rows, WARY if dearer else HOPEFUL)
            self._last_beside = prompt_rows

    @property
    def prompt_row(self) -> float:
        """Seconds of a row of a prompt that is read alone; 0 if none was measured."""
        return self._alone or 0.0

    def decode_seconds(self, rows: int, cells: int = 0) -> float:
        """A step of `rows` rows without prompts, beside so many resident cells; 0 if none was measured."""
        return self.machine * (self.curve.seconds(rows) + self.row_cell * rows * cells)

    def steps(self, first: int, more: int, cells: int) -> Seconds:
        """The same, and what a step takes besides, for `first` rows and up to `more` more; some were measured."""
        line = self.curve.line(first + more)[first : first + more + 1]
        return self.machine * (line + self.row_cell * cells * np.arange(first, first + more + 1)) + self.aside

    def prompt_rows(
        self, decode_rows: int, step_seconds: float, idle_step_seconds: float, cells: int = 0, readers: float = 1.0
    ) -> int:
        """Prompt rows that fit a step beside `decode_rows` others; at least 1, but for a step that measures the others.

        Beside streams the step may take `step_seconds`. If that is 0, prompts get as much time as the streams, which
        so keep half their speed; and where several read for each that streams, `readers`, so many times as much: few
        must not hold up many. But never more than `idle_step_seconds`, which the step may take with no stream running.
        """
        if decode_rows and self._mixed >= REFRESH:
            return 0
        if decode_rows:
            alone = self.decode_seconds(decode_rows, cells)
            equal = min(alone * max(1.0, readers), idle_step_seconds)
            budget = max(step_seconds - alone, 0.0) if step_seconds else equal
            rows = self._shaped(decode_rows, _fit(budget, self._beside or self._alone))
            rows = min(rows, GROWTH * self._last_beside)
        else:
            rows = min(_fit(idle_step_seconds, self._alone or self._beside), GROWTH * self._last_alone)
        self._allowed = max(1, rows)
        return self._allowed

    def _shaped(self, decode_rows: int, rows: int) -> int:
        """About `rows`: so many more or less that a row of the whole step is cheapest, where counts were measured."""
        most = decode_rows + rows + rows // 8
        first = decode_rows + max(1, rows // 2)
        known = [total for total in self.curve.points if first <= total <= most]
        if not known or most > max(self.curve.points):
            return rows
        line = self.curve.line(most)[first : most + 1]
        return first + int(np.argmin(line / np.arange(first, most + 1))) - decode_rows


def _fit(seconds: float, row_seconds: float | None) -> int:
    return int(seconds / row_seconds) if row_seconds else 2**30
