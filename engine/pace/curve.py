"""Seconds of a pass by its rows.

The curve has jumps: the seconds of neighbouring numbers of rows may differ by half.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Seconds = NDArray[np.float64]


class CurvePoint(Struct):
    """The mean of the measurements of one number of rows."""

    seconds: float
    seen: int
    """Number of measurements."""


class Curve:
    """A mean for each number of rows that was measured.

    Numbers of rows between two measured ones are interpolated linearly. Those beyond the last cost in proportion to
    their rows, those before the first as much as the first.
    """

    def __init__(self, points: Mapping[int, float] | None = None, seen: int = 1) -> None:
        """`points` are seconds by rows, each the mean of `seen` measurements."""
        self._points: dict[int, CurvePoint] = {}
        self._counts: list[int] = []  # in order
        self._line: Seconds = np.empty(0)
        for rows, seconds in (points or {}).items():
            self.put(rows, seconds, seen)

    def __bool__(self) -> bool:
        return bool(self._points)

    @property
    def points(self) -> Mapping[int, CurvePoint]:
        """The measurements by rows."""
        return self._points

    def put(self, rows: int, seconds: float, seen: int = 1) -> None:
        """Sets the cost of `rows` rows."""
        known = rows in self._points
        self._points[rows] = CurvePoint(seconds, seen)
        if not known:  # after the point is stored, as another thread may call `seconds`
            insort(self._counts, rows)
        self._line = np.empty(0)

    def scale(self, rows: int, factor: float) -> None:
        """Records a measurement of `rows` rows that was `factor` times the expected cost."""
        point = self._points.get(rows)
        if point is None:
            self.put(rows, factor * self.seconds(rows))
            return
        point.seconds *= factor
        point.seen += 1
        self._line = np.empty(0)

    def seen(self, rows: int) -> int:
        """Returns the number of measurements of `rows` rows."""
        point = self._points.get(rows)
        return point.seen if point is not None else 0

    def seconds(self, rows: int) -> float:
        """Returns the seconds of a pass of `rows` rows; 0 if nothing was measured."""
        if (point := self._points.get(rows)) is not None:
            return point.seconds
        return float(self.line(rows)[rows]) if self._counts else 0.0

    def line(self, most: int) -> Seconds:
        """Returns the seconds by rows, from 0 to at least `most`, as a read-only array. Something was measured."""
        line = self._line
        if len(line) <= most:
            size = max(64, 1 << most.bit_length())
            counts = [*self._counts]
            line = np.interp(np.arange(size), counts, [self._points[rows].seconds for rows in counts])
            last = counts[-1]
            line[last:] *= np.arange(last, max(size, last)) / max(1, last)
            self._line = line
        return line
