"""Which requests start, and which rows the next step has. Pure policy: values in, values out; no tokens, no clock.

There are no phases. A sequence only has more or fewer *uncomputed* tokens: known tokens that are not in cells. With one
it decodes, and may have drafts verified with it; with more it is prefilled, or recomputes what it had before it was
preempted. When cells run out, drafts go first, then idle prefixes, then the newest sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec import Struct, structs

# A prefix in flight of fewer tokens than this is not worth holding a request for.
HOLD_TOKENS = 32
# Cells kept free for each running sequence when another is admitted, so that it is not preempted at once.
HEADROOM_CELLS = 16
# Tokens at the end of a prompt that are computed again when the prompt comes back, where only whole states are saved:
# the last token always is, and templates often end with some that the next turn spells otherwise.
TAIL_TOKENS = 4


class SequenceView(Struct, frozen=True):
    """What the policy sees of a running sequence: counts in tokens. Sequences are listed oldest first."""

    key: int
    known: int
    computed: int
    drafts: int = 0
    exclusive: int = 0
    """Cells that no other sequence holds."""
    blocked: int = 0
    """Known tokens that cannot be computed yet, as blocks before them are to be loaded first."""
    waited: float = 0.0
    """Seconds since the request was submitted."""

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute or load before the next can be picked."""
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
    """False if the prefix cannot be shared because only whole states can, and this one will not be saved."""


class WaitingView(Struct, frozen=True):
    """What the policy sees of a waiting request, in tokens. Requests are listed in the order of their arrival."""

    key: int
    known: int
    resident: int
    """Longest prefix that could be shared now."""
    idle: int
    """The part of that which no running sequence holds."""
    reach: int = 0
    """Longest prefix that needs no computing now: resident, or to be loaded."""
    in_flight: InFlight | None = None
    """The longest prefix that a sequence being prefilled will have, if there is one."""


class Room(Struct, frozen=True):
    """What is left: slots, free cells, and cells that evicting idle prefixes would free."""

    slots: int
    free: int
    idle: int


class Limits(Struct, frozen=True):
    """The most that one step may have."""

    rows: int
    outputs: int
    prompt_rows: int
    least: int = 1
    """Rows of a prompt that a pass has at least, see `Context.prefill_rows`."""
    ubatch: int = 2**30
    """Rows of a pass at most."""


class Rows(Struct, frozen=True):
    """A sequence's part of a step: `tokens` known ones, then `drafts` drafted ones."""

    key: int
    tokens: int
    drafts: int = 0


class Hold(NamedTuple):
    """A request that is held until the sequence `on` has `length` tokens in cells, to share them."""

    key: int
    on: int
    length: int


class Admission(Struct, frozen=True):
    """The request that starts now, if any, and the requests that are held from now on."""

    start: int | None
    holds: tuple[Hold, ...] = ()


class Plan(Struct, frozen=True):
    """One step: the sequences preempted before it, newest first, and the rows of the others."""

    rows: tuple[Rows, ...]
    preempt: tuple[int, ...] = ()


def admit(waiting: Iterable[WaitingView], running: Sequence[SequenceView], room: Room) -> Admission:
    """The first request that can start now: only one, as each start changes what the next would match.

    First come, first served, with one exception: a request whose prefix is in flight is held until those rows are
    computed, and lets others pass. A request starts when its prompt fits beside what the running sequences still have
    to compute; if nothing runs, any request starts.
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
    """The lengths at which a prompt of `tokens` is saved while it is prefilled, where only whole states are: shortly
    before its end, from where the next turn can continue."""
    return () if divisible or tokens <= HOLD_TOKENS else (tokens - TAIL_TOKENS,)


def plan(running: Sequence[SequenceView], room: Room, limits: Limits) -> Plan:
    """The next step's rows: each decoding sequence's next token, then drafts, then prompts.

    At least one sequence always gets a row: while cells do not suffice, the newest is preempted and its cells count as
    idle; the last one left always fits, as no request is longer than the cells.
    """
    sequences, preempt = list(running), []
    cells = room.free + room.idle
    while len(sequences) > 1 and not _fits(sequences, cells):
        newest = sequences.pop()
        preempt.append(newest.key)
        cells += newest.exclusive
    rows = _rows(sequences, cells, room.free if not preempt else 0, limits)
    return Plan(tuple(rows), tuple(preempt))


def lessen(rows: Sequence[Rows]) -> tuple[Rows, ...]:
    """Fewer rows than `rows`: without drafts; if there are none, half of each prompt; if there are none, the older
    half of the sequences. A single row becomes nothing."""
    if any(part.drafts for part in rows):
        return tuple(Rows(part.key, part.tokens) for part in rows)
    if any(part.tokens > 1 for part in rows):
        return tuple(Rows(part.key, (part.tokens + 1) // 2) for part in rows)
    return tuple(rows[: len(rows) // 2])


def _fits(sequences: Sequence[SequenceView], cells: int) -> bool:
    """True if every decoding sequence gets its row, and a row is left if one is being prefilled."""
    decoding = sum(view.num_uncomputed == 1 for view in sequences)
    return decoding + (decoding < len(sequences)) <= cells


def _rows(sequences: Sequence[SequenceView], cells: int, free: int, limits: Limits) -> list[Rows]:
    decoding = [view for view in sequences if view.num_uncomputed == 1]
    prefilling = [view for view in sequences if view.num_uncomputed > 1 and view.ready]
    count, outputs = len(decoding), limits.outputs - len(sequences)
    # An odd rest cannot be split into two parts of `least`, so a prompt gets at least one row more.
    least_chunk = 2 * limits.least - 1
    reserved = max(len(sequences), count + least_chunk if prefilling else 0)
    drafts = _share([view.drafts for view in decoding], max(0, min(limits.rows - reserved, outputs, free - reserved)))
    count += sum(drafts)
    wanted = max(limits.prompt_rows, least_chunk) if limits.prompt_rows else 0
    chunk = max(0, min(wanted, limits.rows - count, cells - count))
    rows = [Rows(view.key, 1, more) for view, more in zip(decoding, drafts, strict=True)]
    # Where nothing else fits, a single row is better than none.
    return rows + (_prefill(prefilling, chunk, limits) or _prefill(prefilling, chunk, structs.replace(limits, least=1)))


def _prefill(sequences: Sequence[SequenceView], total: int, limits: Limits) -> list[Rows]:
    """Splits the rows for prompts: highest response ratio next (Hansen 1971), that is by the time waited per token to
    compute. Short prompts pass long ones, prompts of equal length finish in the order of their arrival, and a long one
    gains weight as it waits."""
    rows: list[Rows] = []
    for view in sorted(sequences, key=lambda view: -view.waited / view.num_uncomputed):
        if size := _chunk(view.ready, total, limits):
            rows.append(Rows(view.key, size))
            total -= size
    return rows


def _chunk(ready: int, total: int, limits: Limits) -> int:
    """How many of `ready` tokens a step with `total` rows computes: neither their passes nor the rest have fewer than
    `limits.least` rows, unless so few are ready. 0 if that cannot be."""
    size, least = min(ready, total), limits.least
    if size < ready < size + least:
        size = ready - least
    if size > limits.ubatch and 0 < size % limits.ubatch < least:
        size -= least
    return size if size >= min(least, ready) else 0


def _share(wants: Sequence[int], total: int) -> list[int]:
    """Splits `total` evenly: no part exceeds its want, what one leaves goes to the others, and a rest that cannot be
    split goes to the first ones."""
    given = [0] * len(wants)
    open_ = [i for i, want in enumerate(wants) if want]
    while total and open_:
        each, more = divmod(total, len(open_))
        for place, i in enumerate(open_):
            size = min(wants[i] - given[i], each + (place < more))
            given[i] += size
            total -= size
        open_ = [i for i in open_ if given[i] < wants[i]]
    return given
