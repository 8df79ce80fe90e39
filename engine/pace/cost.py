"""What a step costs, learnt from every step, and how many prompt rows fit beside the running streams."""

from __future__ import annotations

from typing import NamedTuple

WEIGHT = 0.2
"""Share of a new measurement in a running mean."""
WARY, HOPEFUL = 0.4, 0.1
"""The same where an error one way makes steps too long and the other way only reads prompts more slowly: what counsels
caution is believed sooner."""
OUTLIER = 1.5
"""A measurement counts for at most this many times the mean: the machine is shared, and one step that was held up
must not make the next ones long."""
REFRESH = 16
"""Of so many steps beside streams one holds no prompt rows, so that the streams' own cost is known as it changes:
cells that a prompt fills make every later step dearer."""
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
    """Seconds of a step: by the number of rows while only streams run, and for each prompt row more.

    A prompt row is dearer beside streams than in a long chunk of its own, so the two are kept apart. All are
    running means of what was measured; nothing is assumed about the shape between them.
    """

    def __init__(self, first_rows: int = 64) -> None:
        self.cell = 0.0
        """Seconds by which a resident cell makes a row dearer; 0 if not measured."""
        self._decode: dict[int, float] = {}
        self._beside: float | None = None
        self._alone: float | None = None
        self._last_beside = 4
        self._last_alone = first_rows
        self._allowed = 0  # prompt rows that the last step might have held
        self._mixed = 0  # steps with prompts beside streams since one without

    def observe(self, decode_rows: int, prompt_rows: int, seconds: float) -> None:
        """Records a step that was `seconds` long."""
        if not prompt_rows:
            refresh = self._mixed >= REFRESH  # the only one in a while: it counts as several
            weight = WARY if refresh else WEIGHT
            self._decode[decode_rows] = blend(self._decode.get(decode_rows), seconds, weight)
            self._mixed = 0
        elif not decode_rows:
            if SMALL * prompt_rows >= self._allowed:
                self._alone = blend(self._alone, seconds / prompt_rows)
                self._last_alone = prompt_rows
        else:
            self._mixed += 1
            self._observe_mixed(decode_rows, prompt_rows, seconds)

    def _observe_mixed(self, decode_rows: int, prompt_rows: int, seconds: float) -> None:
        if self.decode_seconds(decode_rows) > seconds:  # without the prompt it would have been shorter still
            self._decode[decode_rows] = seconds
        if SMALL * prompt_rows >= self._allowed:
            more = max(seconds - self.decode_seconds(decode_rows), 0.05 * seconds)
            dearer = self._beside is None or more / prompt_rows > self._beside
            self._beside = blend(self._beside, more / prompt_rows, WARY if dearer else HOPEFUL)
            self._last_beside = prompt_rows

    @property
    def prompt_row(self) -> float:
        """Seconds of a row of a prompt that is read alone; 0 if none was measured."""
        return self._alone or 0.0

    def decode_seconds(self, rows: int) -> float:
        """A step of `rows` rows without prompts; between measured counts in proportion, 0 if none was measured."""
        if (known := self._decode.get(rows)) is not None:
            return known
        if not self._decode:
            return 0.0
        below = max((n for n in self._decode if n < rows), default=None)
        above = min((n for n in self._decode if n > rows), default=None)
        if below is None or above is None:
            nearest = below if above is None else above
            assert nearest is not None, "at least one count was measured"
            return self._decode[nearest] * max(1.0, rows / nearest)
        share = (rows - below) / (above - below)
        return self._decode[below] + share * (self._decode[above] - self._decode[below])

    def prompt_rows(self, decode_rows: int, step_seconds: float, idle_step_seconds: float) -> int:
        """Prompt rows that fit a step beside `decode_rows` others; at least 1, but for a step that measures the others.

        Beside streams the step may take `step_seconds`, or twice what it takes without prompts if that is 0, so
        that streams keep half their speed; with no stream running it may take `idle_step_seconds`.
        """
        if decode_rows and self._mixed >= REFRESH:
            return 0
        if decode_rows:
            alone = self.decode_seconds(decode_rows)
            budget = max(step_seconds - alone, 0.0) if step_seconds else alone
            rows = min(_fit(budget, self._beside or self._alone), GROWTH * self._last_beside)
        else:
            rows = min(_fit(idle_step_seconds, self._alone or self._beside), GROWTH * self._last_alone)
        self._allowed = max(1, rows)
        return self._allowed


def _fit(seconds: float, row_seconds: float | None) -> int:
    return int(seconds / row_seconds) if row_seconds else 2**30
