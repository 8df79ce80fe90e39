"""Histograms of durations."""

from __future__ import annotations

from bisect import bisect_left

from msgspec import Struct

# Upper bounds of the buckets of the histograms.
BUCKET_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram(Struct, frozen=True):
    """Counts of observations by bucket, not cumulative. The last count is for observations above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class Buckets:
    """A histogram of seconds that grows by `add`."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKET_SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Counts a value that was observed `count` times."""
        self._counts[bisect_left(BUCKET_SECONDS, seconds)] += count
        self._sum += count * seconds

    def snapshot(self) -> Histogram:
        """Returns the current state."""
        return Histogram(BUCKET_SECONDS, tuple(self._counts), self._sum)


NO_OBSERVATIONS = Buckets().snapshot()
