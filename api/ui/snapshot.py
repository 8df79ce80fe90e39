"""The state of the server at a moment, for its live view: slots, queue, KV cache, speeds and speculation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from engine import DraftStats, MemoryInfo, RequestState, SlotState, Stats


class Sample(Struct, frozen=True):
    """The engine's statistics and slots at a moment."""

    seconds: float
    """Seconds of a monotonic clock."""
    stats: Stats
    slots: Sequence[SlotState]


class KVView(Struct, frozen=True):
    """Use of the KV cache by tier. Cells are tokens."""

    cells: int
    cells_running: int
    """Cells of running sequences."""
    cells_idle: int
    """Cells with prefixes of earlier requests."""
    ram_bytes: int
    ram_capacity: int
    disk_bytes: int
    disk_capacity: int


class ProposerView(Struct, frozen=True):
    """Drafts of one proposer type since the start of the engine."""

    type: str
    drafted: int
    accepted: int
    chance: float
    """Current estimate of the chance that the first token of a draft is accepted."""
    saved_seconds: float
    """Estimated seconds of steps that accepted tokens would have taken, minus the seconds of proposing and
    verifying."""

    @classmethod
    def of(cls, stats: DraftStats) -> ProposerView:
        """Returns the engine's statistics of a type in the shape of the view."""
        return cls(stats.type, stats.drafted, stats.accepted, stats.chance, stats.saved - stats.spent)


class SlotView(Struct, frozen=True):
    """A slot and its running or last request, without texts. Counts are tokens."""

    id: int
    state: Literal["idle", "prefill", "decode"]
    prompt: int = 0
    cached: int = 0
    processed: int = 0
    """Prompt tokens in cells, cached ones included."""
    emitted: int = 0
    max_tokens: int | None = None
    tokens_per_second: float | None = None
    """None if the request was not running at the last snapshot."""
    draft: int = 0
    """Length of the draft that the next step verifies."""
    drafted: int = 0
    accepted: int = 0


class LiveSnapshot(Struct, frozen=True, kw_only=True):
    """The data of an event. Rates are those since the last snapshot, None in the first one; counts are totals."""

    time: float
    """Seconds since the epoch."""
    model: str
    context: int
    """Maximum tokens of a request."""
    running: int
    waiting: int
    finished: dict[str, int]
    """Requests that ended, by reason."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    tokens_per_second: float | None
    prompt_tokens_per_second: float | None
    """Prompt tokens computed, counted when a request has its first token."""
    step_ms: float | None
    """Mean duration of the steps. None without a step."""
    busy_seconds: float
    """Duration of all steps together."""
    kv: KVView
    proposers: Sequence[ProposerView]
    slots: Sequence[SlotView]


def live_snapshot(
    time: float, model: str, context: int, memory: MemoryInfo, before: Sample | None, now: Sample
) -> LiveSnapshot:
    """Returns the state `now`, with rates since the sample `before`."""
    stats, earlier = now.stats, None if before is None else before.stats
    seconds = 0.0 if before is None else now.seconds - before.seconds
    steps = 0 if earlier is None else stats.steps - earlier.steps
    return LiveSnapshot(
        time=time,
        model=model,
        context=context,
        running=stats.running,
        waiting=stats.waiting,
        finished=stats.requests_finished,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        completion_tokens=stats.completion_tokens,
        tokens_per_second=_rate(
            stats.completion_tokens, None if earlier is None else earlier.completion_tokens, seconds
        ),
        prompt_tokens_per_second=_rate(
            stats.prefilled_tokens, None if earlier is None else earlier.prefilled_tokens, seconds
        ),
        step_ms=1e3 * (stats.busy_seconds - earlier.busy_seconds) / steps if earlier is not None and steps else None,
        busy_seconds=stats.busy_seconds,
        kv=KVView(
            stats.cells,
            stats.cells_used - stats.cells_idle,
            stats.cells_idle,
            stats.ram_bytes,
            memory.ram_bytes,
            stats.disk_bytes,
            memory.disk_bytes,
        ),
        proposers=[ProposerView.of(each) for each in stats.drafts],
        slots=_slots(before, now, seconds),
    )


def _slots(before: Sample | None, now: Sample, seconds: float) -> list[SlotView]:
    earlier = {} if before is None else {slot.request.key: slot.request for slot in before.slots if slot.request}
    return [
        SlotView(slot.number, "idle")
        if slot.request is None
        else _slot(slot, slot.request, earlier.get(slot.request.key), seconds)
        for slot in now.slots
    ]


def _slot(slot: SlotState, request: RequestState, before: RequestState | None, seconds: float) -> SlotView:
    processed = request.cached + request.processed
    return SlotView(
        slot.number,
        "idle" if not slot.busy else "prefill" if not request.emitted else "decode",
        request.prompt,
        request.cached,
        processed,
        request.emitted,
        request.max_tokens,
        _rate(request.emitted, None if before is None else before.emitted, seconds) if slot.busy else None,
        request.draft,
        sum(each.drafted for each in request.drafts),
        sum(each.accepted for each in request.drafts),
    )


def _rate(count: int, before: int | None, seconds: float) -> float | None:
    """Returns the growth of a count per second. None if the count `before` is not known."""
    return None if before is None or seconds <= 0 else (count - before) / seconds
