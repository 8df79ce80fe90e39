"""The seconds of a pass as a function of its number of rows.

The function has jumps: one more row can take half as long again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Seconds = NDArray[np.float64]


class CurvePoint(Struct):
    """The mean seconds of the passes with one number of rows."""

    seconds: float
    measurements: int
    """Number of measurements in the mean."""


class Curve:
    """The mean seconds of a pass for each measured number of rows.

    Between two measured numbers of rows the seconds are interpolated linearly. Beyond the largest they grow in
    proportion to the rows. Below the smallest they equal those of the smallest.
    """

    def __init__(self, points: Mapping[int, float] | None = None, measurements: int = 1) -> None:
        """`points` are seconds by rows, each the mean of `measurements` measurements."""
        self._points: dict[int, CurvePoint] = {}
        self._counts: list[int] = []  # measured numbers of rows, ascending
        self._line: Seconds = np.empty(0)
        for rows, seconds in (points or {}).items():
            self.put(rows, seconds, measurements)

    def __bool__(self) -> bool:
        return bool(self._points)

    @property
    def points(self) -> Mapping[int, CurvePoint]:
        """The measured points by rows."""
        return self._points

    def put(self, rows: int, seconds: float, measurements: int = 1) -> None:
        """Sets the seconds of a pass of `rows` rows, the mean of `measurements` measurements."""
        known = rows in self._points
        self._points[rows] = CurvePoint(seconds, measurements)
        if not known:  # after the point is stored, as another thread may call `seconds`
            insort(self._counts, rows)
        self._line = np.empty(0)

    def scale(self, rows: int, factor: float) -> None:
        """Multiplies the seconds of a pass of `rows` rows by `factor`, and counts one more measurement."""
        point = self._points.get(rows)
        if point is None:
            self.put(rows, factor * self.seconds(rows))
            return
        point.seconds *= factor
        point.measurements += 1
        self._line = np.empty(0)

    def num_measurements(self, rows: int) -> int:
        """Returns the number of measurements of `rows` rows."""
        point = self._points.get(rows)
        return point.measurements if point is not None else 0

    def seconds(self, rows: int) -> float:
        """Returns the seconds of a pass of `rows` rows; 0 before the first measurement."""
        if (point := self._points.get(rows)) is not None:
            return point.seconds
        return float(self.line(rows)[rows]) if self._counts else 0.0

    def line(self, max_rows: int) -> Seconds:
        """Returns the seconds of passes of 0 to at least `max_rows` rows, as a read-only array indexed by rows.

        Requires a measurement.
        """
        line = self._line
        if len(line) <= max_rows:
            size = max(64, 1 << max_rows.bit_length())
            counts = [*self._counts]
            line = np.interp(np.arange(size), counts, [self._points[rows].seconds for rows in counts])
            last = counts[-1]
            line[last:] *= np.arange(last, max(size, last)) / max(1, last)
            self._line = line
        return line
