"""Scheduling: the requests that start, and the rows of the next step. Pure policy: values in, values out; no clock.

There are no phases. A sequence only has more or fewer *uncomputed* tokens: known tokens that are not in cells. With one
it decodes, and draft tokens may be verified with it; with more it is prefilled, or recomputed after a preemption. When
cells run out, drafts go first, then idle prefixes, then the newest sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec import Struct, structs

# A request is not held for an in-flight prefix that saves fewer tokens than this.
HOLD_TOKENS = 32
# Cells kept free for each running sequence when another is admitted, so that it is not preempted at once.
HEADROOM_CELLS = 16
# Where only whole states are saved, so many tokens at the end of a prompt are computed again in the next turn: the last
# one always is, and templates often end with tokens that differ in the next turn.
TAIL_TOKENS = 4


class SequenceView(Struct, frozen=True):
    """A running sequence, in tokens. Sequences are listed oldest first."""

    key: int
    known: int
    computed: int
    drafts: int = 0
    exclusive: int = 0
    """Cells that no other sequence holds."""
    blocked: int = 0
    """Known tokens that cannot be computed yet, as blocks before them are to be loaded, or a save is due before
    them."""
    waited: float = 0.0
    """Seconds since the request was submitted."""

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute or load before the next one can be sampled."""
        return self.known - self.computed

    @property
    def ready(self) -> int:
        """Tokens that can be computed now."""
        return self.num_uncomputed - self.blocked


class InFlight(Struct, frozen=True):
    """A prefix that a running sequence has or will have in cells."""

    key: int
    """The sequence."""
    length: int
    can_save: bool = True
    """False if only whole states can be shared, and none is saved at this length."""


class WaitingView(Struct, frozen=True):
    """A waiting request, in tokens. Requests are listed in the order of their arrival."""

    key: int
    known: int
    resident: int
    """Length of the longest resident prefix."""
    idle: int
    """Of these, tokens in cells that no running sequence holds."""
    reach: int = 0
    """Length of the longest prefix that is resident or can be loaded."""
    in_flight: InFlight | None = None
    """The longest prefix in common with a prefilling sequence. None if there is none."""


class Room(Struct, frozen=True):
    """Free resources: slots, cells, and cells that evicting idle prefixes would free."""

    slots: int
    free: int
    idle: int


class Limits(Struct, frozen=True):
    """Upper limits of one step, in rows."""

    rows: int
    outputs: int
    prompt_rows: int
    min_prompt_rows: int = 1
    """Least number of prompt rows in a pass, see `Context.prefill_rows`."""
    ubatch: int = 2**30
    """Maximum rows of a pass."""


class Rows(Struct, frozen=True):
    """A sequence's rows in a step: `tokens` known tokens, then `drafts` draft tokens."""

    key: int
    tokens: int
    drafts: int = 0


class Hold(NamedTuple):
    """A request held until the sequence `on` has `length` tokens in cells, to share them."""

    key: int
    on: int
    length: int


class Admission(Struct, frozen=True):
    """The request that starts now, if any, and new holds."""

    start: int | None
    holds: tuple[Hold, ...] = ()


class Plan(Struct, frozen=True):
    """One step: its rows, and the sequences preempted before it, newest first."""

    rows: tuple[Rows, ...]
    preempt: tuple[int, ...] = ()


def admit(waiting: Iterable[WaitingView], running: Sequence[SequenceView], room: Room) -> Admission:
    """Returns the first request that can start now: only one, as each start changes the matches of the others.

    First come, first served, with one exception: a request whose prefix is in flight is held until those rows are
    computed, and later requests pass it. A request starts when the cells suffice for its prompt and the uncomputed
    tokens of the running sequences; if nothing runs, any request starts.
    """
    if not room.slots:
        return Admission(None)
    reserved = sum(view.num_uncomputed + HEADROOM_CELLS for view in running)
    holds: list[Hold] = []
    for view in waiting:
        if running and view.in_flight is not None and _worth_holding(view, view.in_flight):
            holds.append(Hold(view.key, view.in_flight.key, view.in_flight.length))
            continue
        need = view.known - view.resident + HEADROOM_CELLS
        fits = not running or need + reserved <= room.free + room.idle - view.idle
        return Admission(view.key if fits else None, tuple(holds))
    return Admission(None, tuple(holds))


def _worth_holding(view: WaitingView, in_flight: InFlight) -> bool:
    return in_flight.can_save and in_flight.length >= max(view.resident, view.reach) + HOLD_TOKENS


def save_points(tokens: int, *, divisible: bool) -> tuple[int, ...]:
    """Returns the lengths at which a prompt of `tokens` tokens is saved during its prefill: none if states are
    divisible, else shortly before its end, from where the next turn can continue."""
    return () if divisible or tokens <= HOLD_TOKENS else (tokens - TAIL_TOKENS,)


def plan(running: Sequence[SequenceView], room: Room, limits: Limits) -> Plan:
    """Returns the next step: each decoding sequence's next token, then drafts, then prompt rows.

    At least one sequence gets a row: while cells do not suffice, the newest sequence is preempted and its cells count
    as idle; the last one always fits, as no request is longer than the cells.
    """
    sequences, preempt = list(running), []
    cells = room.free + room.idle
    while len(sequences) > 1 and not _fits(sequences, cells):
        newest = sequences.pop()
        preempt.append(newest.key)
        cells += newest.exclusive
    rows = _rows(sequences, cells, room.free if not preempt else 0, limits)
    return Plan(tuple(rows), tuple(preempt))


def reduce_rows(rows: Sequence[Rows]) -> tuple[Rows, ...]:
    """Returns fewer rows: without drafts; if there are none, half of each prompt's rows; if there are none, the older
    half of the sequences. A single row is reduced to none."""
    if any(part.drafts for part in rows):
        return tuple(Rows(part.key, part.tokens) for part in rows)
    if any(part.tokens > 1 for part in rows):
        return tuple(Rows(part.key, (part.tokens + 1) // 2) for part in rows)
    return tuple(rows[: len(rows) // 2])


def _fits(sequences: Sequence[SequenceView], cells: int) -> bool:
    """True if the cells suffice for a row of every decoding sequence, and for one prompt row if any is due."""
    decoding = sum(view.num_uncomputed == 1 for view in sequences)
    return decoding + (decoding < len(sequences)) <= cells


def _rows(sequences: Sequence[SequenceView], cells: int, free: int, limits: Limits) -> list[Rows]:
    decoding = [view for view in sequences if view.num_uncomputed == 1]
    prefilling = [view for view in sequences if view.num_uncomputed > 1 and view.ready]
    count, outputs = len(decoding), limits.outputs - len(sequences)
    # Up to 2 * `min_prompt_rows` - 1 tokens cannot be split into two chunks, so a prompt gets that many rows.
    min_chunk = 2 * limits.min_prompt_rows - 1
    reserved = max(len(sequences), count + min_chunk if prefilling else 0)
    drafts = _share([view.drafts for view in decoding], max(0, min(limits.rows - reserved, outputs, free - reserved)))
    count += sum(drafts)
    chunk = max(limits.prompt_rows, min_chunk) if limits.prompt_rows else 0
    chunk = max(0, min(chunk, limits.rows - count, cells - count))
    rows = [Rows(view.key, 1, more) for view, more in zip(decoding, drafts, strict=True)]
    # A chunk below the minimum is better than none.
    relaxed = structs.replace(limits, min_prompt_rows=1)
    return rows + (_prefill(prefilling, chunk, limits) or _prefill(prefilling, chunk, relaxed))


def _prefill(sequences: Sequence[SequenceView], total: int, limits: Limits) -> list[Rows]:
    """Splits `total` prompt rows by highest response ratio next (Hansen 1971): by the time waited per token to compute.

    Short prompts pass long ones, prompts of equal length finish in the order of their arrival, and the priority of a
    long prompt grows as it waits.
    """
    rows: list[Rows] = []
    for view in sorted(sequences, key=lambda view: -view.waited / view.num_uncomputed):
        if size := _chunk(view.ready, total, limits):
            rows.append(Rows(view.key, size))
            total -= size
    return rows


def _chunk(ready: int, total: int, limits: Limits) -> int:
    """Returns how many of `ready` tokens a step with `total` rows computes: neither their passes nor the rest have
    fewer than `min_prompt_rows` rows, unless so few are ready. 0 if that is impossible."""
    size, minimum = min(ready, total), limits.min_prompt_rows
    if size < ready < size + minimum:
        size = ready - minimum
    if size > limits.ubatch and 0 < size % limits.ubatch < minimum:
        size -= minimum
    return size if size >= min(minimum, ready) else 0


def _share(demands: Sequence[int], total: int) -> list[int]:
    """Splits `total` evenly among `demands`: no share exceeds its demand, and an indivisible rest goes to the first
    ones."""
    shares = [0] * len(demands)
    open_ = [i for i, demand in enumerate(demands) if demand]
    while total and open_:
        each, more = divmod(total, len(open_))
        for order, i in enumerate(open_):
            size = min(demands[i] - shares[i], each + (order < more))
            shares[i] += size
            total -= size
        open_ = [i for i in open_ if shares[i] < demands[i]]
    return shares
