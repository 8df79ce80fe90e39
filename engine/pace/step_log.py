"""A debug line in the log for every hundred steps with decoding sequences."""

from __future__ import annotations

import logging

log = logging.getLogger("paceline.pace")

_LINE_STEPS = 100


class StepLog:
    """Sums over the steps since the last log line."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._steps = self._sequences = self._drafted = self._accepted = 0
        self._gain = self._expected = self._measured = 0.0

    @property
    def is_on(self) -> bool:
        """True if the lines are logged."""
        return log.isEnabledFor(logging.DEBUG)

    def record_step(self, sequences: int, drafted: int, gain: float, expected: float, measured: float) -> None:
        """Records a step with `sequences` decoding sequences and `drafted` draft tokens, of which `gain` are expected
        to be accepted. `expected` and `measured` are its seconds."""
        self._steps += 1
        self._sequences += sequences
        self._drafted += drafted
        self._gain += gain
        self._expected += expected
        self._measured += measured
        if self._steps == _LINE_STEPS:
            log.debug("%s", str(self))  # formatted now, because the sums may change before a handler formats the record
            self._reset()

    def record_accepted(self, tokens: int) -> None:
        """Records `tokens` accepted draft tokens of the last step."""
        self._accepted += tokens

    def __str__(self) -> str:
        each = [total / self._steps for total in (self._sequences, self._drafted, self._gain, self._accepted)]
        return (
            f"{self._steps} steps: {each[0]:.1f} sequences, {each[1]:.1f} drafted tokens, "
            f"{each[2]:.2f} expected to be accepted, {each[3]:.2f} accepted; "
            f"{1e3 * self._expected / self._steps:.1f} ms expected, {1e3 * self._measured / self._steps:.1f} measured"
        )
