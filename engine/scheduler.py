"""Scheduling: selects the requests that start, and the rows of the next step. Pure functions of values; no clock.

There are no phases. A sequence has *uncomputed* tokens: known tokens that are not in cells. A sequence with one
uncomputed token decodes, and draft tokens may be verified in the same step. A sequence with more is prefilled, or
recomputed after a preemption. When cells run out, drafts are dropped first, then idle prefixes are evicted, then a
sequence of the lowest priority is preempted: one without a deadline, else the one with the latest deadline; among
equals, the one that started last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from msgspec import Struct, structs

# Minimum tokens of prefill that holding a request for an in-flight prefix must save.
HOLD_TOKENS = 32
# Unified KV: cells kept free for each running sequence when another is admitted, so that no sequence is preempted at
# once.
HEADROOM_CELLS = 16
# Tokens at the end of a prompt that a saved whole state leaves out. The last token is always computed again, and chat
# templates often end with tokens that differ in the next turn.
TAIL_TOKENS = 4


class SequenceView(Struct, frozen=True):
    """A running sequence; counts are in tokens. Lists of views are in the order in which the sequences started."""

    key: int
    known: int
    computed: int
    drafts: int = 0
    exclusive: int = 0
    """Cells that only this sequence holds."""
    blocked: int = 0
    """Known tokens that the step cannot compute: those after a block to load or a state to save, and those from the
    next image or sound on, which `MediaPrefill` decodes."""
    waited: float = 0.0
    """Seconds since the request was submitted."""
    paused: bool = False
    """True if the sequence has no rows in this step, because its adapters are not those of the step."""
    priority: int = 0
    """The least is first."""
    served: float = 0.0
    """The counter of the sequence's owner, see `engine.fairness`."""
    due: float = inf
    """Time at which the request ends if it is not complete. Infinite without a deadline."""

    @property
    def num_uncomputed(self) -> int:
        """Known tokens to compute or load before the next token can be sampled."""
        return self.known - self.computed

    @property
    def ready(self) -> int:
        """Tokens that can be computed now."""
        return self.num_uncomputed - self.blocked


class InFlightPrefix(Struct, frozen=True):
    """A prefix that a running sequence has or will have in cells."""

    key: int
    """Key of the running sequence."""
    length: int
    """Tokens."""
    can_save: bool = True
    """False if only whole states can be shared, and no state can be saved at this length."""


class WaitingView(Struct, frozen=True):
    """A waiting request; counts are in tokens. Lists of views are in the order of the queue."""

    key: int
    known: int
    resident: int
    """Length of the longest resident prefix."""
    idle: int
    """Tokens of the resident prefix in cells that no running sequence holds."""
    reach: int = 0
    """Length of the longest prefix that is resident or can be loaded."""
    in_flight: InFlightPrefix | None = None
    """The longest prefix shared with a prefilling sequence. None if no such prefix is in flight."""


class FreeCapacity(Struct, frozen=True):
    """Slots and cells that requests can take now."""

    slots: int
    free_cells: int
    evictable_cells: int
    """Cells that evicting all idle prefixes would free."""


class StepLimits(Struct, frozen=True):
    """Upper limits of one step, in rows."""

    rows: int
    outputs: int
    """Rows with logits."""
    prompt_rows: int
    min_prompt_rows: int = 1
    """A lower limit: prompt rows of one sequence in a pass, see `Context.prefill_rows`."""
    ubatch: int = 2**30
    """Maximum rows of a pass."""


class ScheduledRows(Struct, frozen=True):
    """A sequence's rows in a step: `tokens` known tokens, then `drafts` draft tokens."""

    key: int
    tokens: int
    drafts: int = 0


class Hold(NamedTuple):
    """A request is held until a running sequence has `length` tokens in cells, which the request then shares."""

    key: int
    """Key of the held request."""
    source: int
    """Key of the running sequence."""
    length: int


class Admission(Struct, frozen=True):
    """The key of the request that starts now, if any, and new holds."""

    start: int | None
    holds: tuple[Hold, ...] = ()
    blocked: int | None = None
    """The key of the first request that is not held, if it does not fit."""


class Plan(Struct, frozen=True):
    """The rows of one step, and the keys of the sequences preempted before the step; the one that started last is
    first."""

    rows: tuple[ScheduledRows, ...]
    preempt: tuple[int, ...] = ()


def admit(waiting: Iterable[WaitingView], running: Sequence[SequenceView], capacity: FreeCapacity) -> Admission:
    """Returns the first request that is not held, if it can start now: at most one request, because each start changes
    the matches of the others.

    Requests start in the order of `waiting`, with one exception: a request whose prefix is in flight is held until the
    prefix is computed, and later requests pass it. A request that does not fit blocks all later ones, so that long
    prompts do not starve. A request fits when the cells suffice for its prompt and for the uncomputed tokens of the
    running sequences. If no sequence runs, any request fits. With per-slot KV every request fits.
    """
    if not capacity.slots:
        return Admission(None)
    reserved = sum(view.num_uncomputed + HEADROOM_CELLS for view in running)
    holds: list[Hold] = []
    for view in waiting:
        if running and view.in_flight is not None and _worth_holding(view, view.in_flight):
            holds.append(Hold(view.key, view.in_flight.key, view.in_flight.length))
            continue
        need = view.known - view.resident + HEADROOM_CELLS
        fits = not running or need + reserved <= capacity.free_cells + capacity.evictable_cells - view.idle
        return Admission(view.key, tuple(holds)) if fits else Admission(None, tuple(holds), view.key)
    return Admission(None, tuple(holds))


def _worth_holding(view: WaitingView, in_flight: InFlightPrefix) -> bool:
    return in_flight.can_save and in_flight.length >= max(view.resident, view.reach) + HOLD_TOKENS


def save_points(tokens: int, *, divisible: bool) -> tuple[int, ...]:
    """Returns the lengths at which a prompt of `tokens` tokens is saved during its prefill.

    There are none if states are `divisible`. Else a state is saved shortly before the end of the prompt, so that the
    next turn can continue there.
    """
    return () if divisible or tokens <= HOLD_TOKENS else (tokens - TAIL_TOKENS,)


def plan(running: Sequence[SequenceView], capacity: FreeCapacity, limits: StepLimits) -> Plan:
    """Returns the next step: a row for each decoding sequence, then draft rows, then prompt rows.

    Paused sequences get no rows. While cells do not suffice, the last sequence in the order of priorities, deadlines
    and starts is preempted, paused or not, and its cells count as evictable. The first one always fits, because no
    request is longer than the cells, so at least one sequence gets a row, unless the first one is paused.
    """
    sequences, preempt = by_urgency(running), []
    cells = capacity.free_cells + capacity.evictable_cells
    while len(sequences) > 1 and not _fits(sequences, cells):
        last = sequences.pop()
        preempt.append(last.key)
        cells += last.exclusive
    sequences = [view for view in sequences if not view.paused]
    rows = _rows(sequences, cells, capacity.free_cells if not preempt else 0, limits)
    return Plan(tuple(rows), tuple(preempt))


def by_urgency(running: Iterable[SequenceView]) -> list[SequenceView]:
    """Returns the sequences in the order of priorities, deadlines and starts. The last one is preempted first."""
    return sorted(running, key=lambda view: (view.priority, view.due))


def plan_decoding(drafts: Mapping[int, int], capacity: FreeCapacity, limits: StepLimits) -> Plan | None:
    """Returns the result of `plan`, except for the order of the rows, if all sequences decode and none is paused.
    `drafts` has the number of draft tokens by key. Returns None if not all rows fit."""
    count, num_drafts = len(drafts), sum(drafts.values())
    if count > capacity.free_cells + capacity.evictable_cells:
        return None
    if num_drafts and count + num_drafts > min(limits.rows, limits.outputs, capacity.free_cells):
        return None
    return Plan(tuple(ScheduledRows(key, 1, length) for key, length in drafts.items()))


def reduce_rows(rows: Sequence[ScheduledRows]) -> tuple[ScheduledRows, ...]:
    """Returns fewer rows, for a step that found no cells.

    Drafts are dropped first. Without drafts, each prompt gets half of its rows. Without drafts and prompts, the older
    half of the sequences keep their rows: a single row is reduced to none.
    """
    if any(part.drafts for part in rows):
        return tuple(ScheduledRows(part.key, part.tokens) for part in rows)
    if any(part.tokens > 1 for part in rows):
        return tuple(ScheduledRows(part.key, (part.tokens + 1) // 2) for part in rows)
    return tuple(rows[: len(rows) // 2])


def _fits(sequences: Sequence[SequenceView], cells: int) -> bool:
    """Returns True if the cells suffice for a row of each decoding sequence, and one row of a prompt if there is
    one."""
    active = [view for view in sequences if not view.paused]
    decoding = sum(view.num_uncomputed == 1 for view in active)
    return decoding + (decoding < len(active)) <= cells


def _rows(sequences: Sequence[SequenceView], cells: int, free: int, limits: StepLimits) -> list[ScheduledRows]:
    decoding = [view for view in sequences if view.num_uncomputed == 1]
    prefilling = [view for view in sequences if view.num_uncomputed > 1 and view.ready]
    count, outputs = len(decoding), limits.outputs - len(sequences)
    # Up to 2 * `min_prompt_rows` - 1 tokens cannot be split into two chunks, so a prompt gets that many rows.
    min_chunk = 2 * limits.min_prompt_rows - 1
    reserved = max(len(sequences), count + min_chunk if prefilling else 0)
    drafts = _split_evenly(
        [view.drafts for view in decoding], max(0, min(limits.rows - reserved, outputs, free - reserved))
    )
    count += sum(drafts)
    chunk = max(limits.prompt_rows, min_chunk) if limits.prompt_rows else 0
    chunk = max(0, min(chunk, limits.rows - count, cells - count))
    rows = [ScheduledRows(view.key, 1, draft) for view, draft in zip(decoding, drafts, strict=True)]
    # Without a chunk of the minimum size, a smaller chunk is better than no prefill.
    relaxed = structs.replace(limits, min_prompt_rows=1)
    return rows + (_prefill(prefilling, chunk, limits) or _prefill(prefilling, chunk, relaxed))


def by_prefill_order(prefilling: Iterable[SequenceView]) -> list[SequenceView]:
    """Returns the sequences by priority, then by the counters of the owners, and those of an owner by deadline, then by
    highest response ratio next (Hansen 1971): seconds waited per token to compute.

    Short prompts pass long ones, prompts of equal length finish in the order of their arrival, and the priority of a
    long prompt grows with its waiting time.
    """
    return sorted(prefilling, key=_prefill_order)


def _prefill(sequences: Sequence[SequenceView], total: int, limits: StepLimits) -> list[ScheduledRows]:
    """Splits `total` prompt rows by `by_prefill_order`."""
    rows: list[ScheduledRows] = []
    for view in by_prefill_order(sequences):
        if size := _chunk(view.ready, total, limits):
            rows.append(ScheduledRows(view.key, size))
            total -= size
    return rows


def _prefill_order(view: SequenceView) -> tuple[int, float, float, float]:
    return view.priority, view.served, view.due, -view.waited / view.num_uncomputed


def _chunk(ready: int, total: int, limits: StepLimits) -> int:
    """Returns how many of `ready` tokens a step with `total` prompt rows computes; 0 if no number is valid.

    A number is valid if each pass of the chunk, and the remaining tokens, have at least `min_prompt_rows` rows. Fewer
    `ready` tokens than that form one chunk.
    """
    size, minimum = min(ready, total), limits.min_prompt_rows
    if size < ready < size + minimum:
        size = ready - minimum
    if size > limits.ubatch and 0 < size % limits.ubatch < minimum:
        size -= minimum
    return size if size >= min(minimum, ready) else 0


def _split_evenly(demands: Sequence[int], total: int) -> list[int]:
    """Returns shares of `total`, as even as possible, one for each of `demands`. No share exceeds its demand, and the
    first demands get the indivisible remainder."""
    shares = [0] * len(demands)
    unmet = [i for i, demand in enumerate(demands) if demand]
    while total and unmet:
        each, remainder = divmod(total, len(unmet))
        for order, i in enumerate(unmet):
            size = min(demands[i] - shares[i], each + (order < remainder))
            shares[i] += size
            total -= size
        unmet = [i for i in unmet if shares[i] < demands[i]]
    return shares
