"""Counters of the engine, which the engine thread changes and of which any thread takes snapshots; capacities of the KV
cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import Struct, structs

from engine.backend import Context
from engine.config import MemoryConfig
from engine.contract import DraftStats
from engine.histogram import NO_OBSERVATIONS, Buckets, Histogram
from engine.kv import KVStats

# Numbers of rows for which a snapshot reports the expected seconds of a decode.
DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)


class EmbeddingStats(Struct, frozen=True):
    """Totals of the embeddings since the start of the engine."""

    inputs: int = 0
    tokens: int = 0
    decodes: int = 0


class Stats(Struct, frozen=True):
    """A snapshot of the counters.

    Fields before `running` are totals since the start of the engine. `running` and the fields after it are the values
    at the last step.
    """

    requests_finished: dict[str, int]
    """Requests by finish reason, with "error" for those that failed."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    steps: int
    native_passes: int
    """Passes over the weights; the library splits each step into one or more."""
    preemptions: int
    restores: int
    """Starts of requests, including resumptions, that load tokens from RAM or disk."""
    hits: int
    """Requests whose prompt had a cached prefix."""
    saved_tokens: int
    restored_tokens: int
    busy_seconds: float
    native_seconds: float
    prefilled_tokens: int
    """Prompt tokens computed for requests that have a first token."""
    prefill_seconds: float
    """Seconds from the start of each request to its first token."""
    busy_slots: int
    """Sequences in each step, added up."""
    longest_sequence: int
    """Most tokens of prompt and output of a request that has ended."""
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
    drafts: tuple[DraftStats, ...]
    """Statistics of the drafts of all requests, by type of proposer."""
    step_seconds: dict[int, float]
    """Expected seconds of a decode by number of rows, given the current number of resident cells."""
    embeddings: EmbeddingStats = EmbeddingStats()
    displacements: int = 0
    """Total of the running sequences that yielded to a sequence of another owner or of a higher priority."""
    step: Histogram = NO_OBSERVATIONS
    """Seconds of the steps with a decode, host time included."""
    grammar: Histogram = NO_OBSERVATIONS
    """Seconds of the compilation of grammars, without those from the cache."""
    owners: Mapping[str, tuple[int, int]] = {}
    """For each owner with requests, the numbers of those that have started and of those that have not."""


def stats_after_fault(last: Stats, failed: int) -> Stats:
    """Returns the counts after a fatal fault that has ended `failed` requests. `last` is the last snapshot, in which
    they run or wait."""
    finished = {**last.requests_finished, "error": last.requests_finished["error"] + failed}
    return structs.replace(last, requests_finished=finished, running=0, waiting=0)


class Counters:
    """The counters. Only the engine thread changes them; there are no locks."""

    def __init__(
        self,
        cells: int,
        drafts: Callable[[], tuple[DraftStats, ...]],
        seconds: Callable[[int, int], float],
    ) -> None:
        """`drafts()` returns the statistics of all drafts, and `seconds(rows, cells)` the expected seconds of a decode
        of `rows` rows with `cells` resident cells. Any thread may call both."""
        self.finished = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.steps = 0
        self.native_passes = 0
        self.preemptions = 0
        self.displacements = 0
        self.restores = 0
        self.hits = 0
        self.busy_seconds = 0.0
        self.native_seconds = 0.0
        self.prefilled_tokens = 0
        self.prefill_seconds = 0.0
        self.busy_slots = 0
        self.longest_sequence = 0
        self.queue = Buckets()
        self.ttft = Buckets()
        self.gap = Buckets()
        self.step = Buckets()
        self.running = 0
        self.waiting = 0
        self._kv = KVStats(cells, 0, 0, 0, 0, 0, 0)
        self._drafts = drafts
        self._seconds_of = seconds

    def record_gaps(self, gaps: Mapping[float, int]) -> None:
        """Records the seconds between the tokens of a step and the previous tokens of each request. `gaps` has numbers
        of requests by seconds."""
        for seconds, count in gaps.items():
            self.gap.add(seconds, count)

    def record_first_token(self, age: float, tokens: int, prefill_seconds: float) -> None:
        """Records the first token of a request that was submitted `age` seconds ago and for which `tokens` tokens were
        computed, `prefill_seconds` after its start."""
        self.ttft.add(age)
        self.prefilled_tokens += tokens
        self.prefill_seconds += prefill_seconds

    def record_decode(self, sequences: int, passes: int, seconds: float) -> None:
        """Records a decode with rows of `sequences` sequences."""
        self.steps += 1
        self.busy_slots += sequences
        self.native_passes += passes
        self.native_seconds += seconds

    def record_step(self, seconds: float, *, decoded: bool) -> None:
        """Records a step of the engine; `decoded` is False for one that had no rows or has failed."""
        self.busy_seconds += seconds
        if decoded:
            self.step.add(seconds)

    def set_gauges(self, running: int, waiting: int, kv: KVStats) -> None:
        """Sets the values that a snapshot reports for the last step."""
        self.running, self.waiting, self._kv = running, waiting, kv

    def snapshot(self) -> Stats:
        """Returns the current counts. While the engine runs, two counts may be from different steps."""
        kv = self._kv
        return Stats(
            requests_finished=dict(self.finished),
            queue=self.queue.snapshot(),
            ttft=self.ttft.snapshot(),
            gap=self.gap.snapshot(),
            step=self.step.snapshot(),
            drafts=self._drafts(),
            step_seconds={rows: self._seconds_of(rows, kv.used) for rows in DECODE_ROWS},
            cells=kv.cells,
            cells_used=kv.used,
            cells_idle=kv.idle,
            saved_tokens=kv.saved_tokens,
            restored_tokens=kv.restored_tokens,
            ram_bytes=kv.ram_bytes,
            disk_bytes=kv.disk_bytes,
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
        )


_COMPUTED_FIELDS = {
    *("requests_finished", "queue", "ttft", "gap", "step", "grammar", "drafts", "step_seconds", "embeddings", "owners"),
    *("cells", "cells_used", "cells_idle", "saved_tokens", "restored_tokens", "ram_bytes", "disk_bytes"),
}
_PLAIN_FIELDS = tuple(name for name in Stats.__struct_fields__ if name not in _COMPUTED_FIELDS)


class MemoryInfo(Struct, frozen=True):
    """Layout and capacities of the KV cache."""

    kv_unified: bool
    """True if all slots share the KV cells, False if each slot has its own."""
    kv_reason: str
    """Reason of that layout, in one line."""
    partial: bool
    """True if requests can share a prefix that ends at any token, False if they can share only a whole earlier
    sequence."""
    window: int
    """Size in tokens of the sliding window of some layers; 0 if all layers attend to all tokens."""
    ram_bytes: int
    """Capacity of the RAM tier."""
    disk: bool
    """True if there is a disk tier, which outlives the engine."""
    disk_bytes: int
    """Capacity of the disk tier; 0 if there is none."""
    reuse_min_tokens: int
    """Minimum tokens of a recurring part of a prompt that is moved instead of computed; 0 if no part is moved."""


def memory_info(context: Context, config: MemoryConfig, kv_reason: str, reuse_min_tokens: int) -> MemoryInfo:
    """Returns the layout and the capacities of the KV cache in the cells of `context`."""
    return MemoryInfo(
        kv_unified=context.unified,
        kv_reason=kv_reason,
        partial=context.partial,
        window=context.window,
        ram_bytes=config.ram_bytes,
        disk=bool(config.disk),
        disk_bytes=config.disk_bytes if config.disk else 0,
        reuse_min_tokens=reuse_min_tokens,
    )
