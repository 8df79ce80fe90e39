"""What was decided and what came of it, a line in the log for every hundred steps with streams."""

from __future__ import annotations

import logging

log = logging.getLogger("paceline.pace")

STEPS = 100


class Journal:
    """Sums of the steps since the last line."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._steps = self._streams = self._drafted = self._accepted = 0
        self._gain = self._expected = self._measured = 0.0

    def step(self, streams: int, drafted: int, gain: float, expected: float, measured: float) -> None:
        """A step in which `streams` decoded and `drafted` tokens were verified, of which `gain` were likely to be
        right; it was expected to take so many seconds and took `measured`."""
        self._steps += 1
        self._streams += streams
        self._drafted += drafted
        self._gain += gain
        self._expected += expected
        self._measured += measured
        if self._steps == STEPS:
            log.debug("%s", str(self))  # now: it changes
            self._forget()

    def accepted(self, tokens: int) -> None:
        """So many tokens of the last step's drafts were right."""
        self._accepted += tokens

    def __str__(self) -> str:
        each = [total / self._steps for total in (self._streams, self._drafted, self._gain, self._accepted)]
        return (
            f"{self._steps} steps: {each[0]:.1f} streams, {each[1]:.1f} drafted tokens, "
            f"{each[2]:.2f} expected to be right, {each[3]:.2f} right; "
            f"{1e3 * self._expected / self._steps:.1f} ms expected, {1e3 * self._measured / self._steps:.1f} measured"
        )
