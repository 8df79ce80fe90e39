"""What the engine has done so far. Counted on the engine thread, read from any."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from msgspec import Struct

from engine.contract import Drafts
from engine.kv import KVStats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms' buckets."""

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Decodes of which it is told what they cost."""


class Histogram(Struct, frozen=True):
    """Observations by bucket, not cumulative; the last count is of those above every bound."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class Stats(Struct, frozen=True):
    """A snapshot. Counts and seconds grow from the start; `running` and what follows it are as of the last step.

    `native_passes` is the number of passes over the weights, as the library splits the rows of each step.
    """

    requests_finished: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    steps: int
    native_passes: int
    retractions: int
    restores: int
    """Requests that began, again or for the first time, with tokens loaded from the store."""
    hits: int
    """Requests that began with a known prefix."""
    saved_tokens: int
    restored_tokens: int
    busy_seconds: float
    native_seconds: float
    queue: Histogram
    ttft: Histogram
    gap: Histogram
    running: int
    waiting: int
    cells: int
    cells_used: int
    cells_idle: int
    ram_bytes: int
    disk_bytes: int
    drafts: tuple[Drafts, ...]
    """By type, of all requests."""
    step_seconds: dict[int, float]
    """What a decode of so many rows is thought to take now, beside the cells that are resident."""


class Buckets:
    """A histogram being filled; values are seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def snapshot(self) -> Histogram:
        """The state now."""
        return Histogram(SECONDS, tuple(self._counts), self._sum)


class Counters:
    """The engine thread's own counts: plain fields, added to as things happen."""

    def __init__(
        self,
        cells: int,
        drafts: Callable[[], tuple[Drafts, ...]],
        seconds: Callable[[int, int], float],
    ) -> None:
        """`seconds` tells of a decode by its rows and the resident cells; any thread may call both."""
        self.finished = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.steps = 0
        self.native_passes = 0
        self.retractions = 0
        self.restores = 0
        self.hits = 0
        self.saved_tokens = 0
        self.restored_tokens = 0
        self.busy_seconds = 0.0
        self.native_seconds = 0.0
        self.queue = Buckets()
        self.ttft = Buckets()
        self.gap = Buckets()
        self.running = 0
        self.waiting = 0
        self.cells = cells
        self.cells_used = 0
        self.cells_idle = 0
        self.ram_bytes = 0
        self.disk_bytes = 0
        self._drafts = drafts
        self._seconds_of = seconds

    def emitted(self, tokens: int, gap: float | None, age: float) -> None:
        """A request that came `age` seconds ago has so many tokens more, `gap` seconds after the last; None if they
        are its first."""
        self.completion_tokens += tokens
        if gap is None:
            self.ttft.add(age)
        else:
            self.gap.add(gap)

    def decoded(self, passes: int, seconds: float) -> None:
        """Records a decode that took `passes` passes and `seconds`."""
        self.steps += 1
        self.native_passes += passes
        self.native_seconds += seconds

    def gauge(self, running: int, waiting: int, kv: KVStats) -> None:
        """Sets what is as of now."""
        self.running, self.waiting = running, waiting
        self.cells_used, self.cells_idle = kv.used, kv.idle
        self.saved_tokens, self.restored_tokens = kv.saved_tokens, kv.restored_tokens
        self.ram_bytes, self.disk_bytes = kv.ram_bytes, kv.disk_bytes

    def snapshot(self) -> Stats:
        """The counts now. Read while the engine goes on, two of them may be a step apart."""
        return Stats(
            requests_finished=dict(self.finished),
            queue=self.queue.snapshot(),
            ttft=self.ttft.snapshot(),
            gap=self.gap.snapshot(),
            drafts=self._drafts(),
            step_seconds={rows: self._seconds_of(rows, self.cells_used) for rows in ROWS},
            **{name: getattr(self, name) for name in _PLAIN},
        )


_MADE = ("requests_finished", "queue", "ttft", "gap", "drafts", "step_seconds")
_PLAIN = tuple(name for name in Stats.__struct_fields__ if name not in _MADE)
