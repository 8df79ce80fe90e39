"""Who may run and which rows the next step holds. Pure policy: values in, values out; no tokens, no clock.

There are no phases. A stream is only more or less *behind*: its known tokens minus its computed ones. One token
behind, it decodes, and may have drafts verified with it; further behind, it reads its prompt, or reads again what
it had before it was retracted. When cells run out, drafts go first, then idle prefixes, then the newest stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from msgspec import Struct

HOLD_BACK = 32
"""A shared prefix of fewer tokens than this is not worth the wait for another's rows."""
HEADROOM = 16
"""Cells kept free for each running stream when another is admitted, so that it is not retracted at once."""


class StreamView(Struct, frozen=True):
    """What the policy may know of a running stream: counts in tokens. Streams are listed oldest first."""

    key: int
    known: int
    computed: int
    drafts: int = 0
    alone: int = 0
    """Cells that nobody else holds."""
    coming: int = 0
    """Known tokens that cannot be computed yet, as others before them are to be loaded first."""

    @property
    def behind(self) -> int:
        """Tokens to compute or load before the next can be picked."""
        return self.known - self.computed

    @property
    def ready(self) -> int:
        """Tokens that can be computed now."""
        return self.behind - self.coming


class WaitingView(Struct, frozen=True):
    """What the policy may know of a waiting request, in tokens. The first to come is listed first."""

    key: int
    known: int
    resident: int
    """Longest prefix of it that could be shared now."""
    idle: int
    """The part of that which no running stream holds."""
    promised: int
    """Longest prefix of it that a running stream holds or will have computed once its prompt is read."""
    reach: int = 0
    """Longest prefix of it that needs no computing now: resident, or to be loaded."""


class Room(Struct, frozen=True):
    """What is left to give: slots, free cells, and cells that idle prefixes would free."""

    slots: int
    free: int
    idle: int


class Limits(Struct, frozen=True):
    """What one step may hold."""

    rows: int
    outputs: int
    prompt_rows: int


class Rows(Struct, frozen=True):
    """A stream's part of a step: `tokens` known ones, then `drafts` guessed ones."""

    key: int
    tokens: int
    drafts: int = 0


class Counts(NamedTuple):
    """The rows of a step: a token each of so many streams, drafted ones, those of prompts."""

    streams: int
    drafts: int
    prompt_rows: int


class Plan(Struct, frozen=True):
    """One step: who is retracted before it, oldest last, and the rows of the others."""

    rows: tuple[Rows, ...]
    retract: tuple[int, ...] = ()


def admit(waiting: Iterable[WaitingView], running: Sequence[StreamView], room: Room) -> int | None:
    """The first request that may start now, if any: only one, as each changes what the next would find.

    First come, first served, with one exception: a request whose prefix is being computed for another waits for
    those rows, and lets others pass. A request starts when its prompt fits beside what the running streams still
    have to read; if none runs, any request starts.
    """
    if not room.slots:
        return None
    reserved = sum(view.behind + HEADROOM for view in running)
    for view in waiting:
        if running and view.promised >= max(view.resident, view.reach) + HOLD_BACK:
            continue
        need = view.known - view.resident + HEADROOM
        if not running or need + reserved <= room.free + room.idle - view.idle:
            return view.key
        return None
    return None


def plan(running: Sequence[StreamView], room: Room, limits: Limits) -> Plan:
    """The next step's rows: each decoding stream's next token, then drafts, then prompts.

    Somebody always gets a row: while cells do not suffice, the newest stream is retracted and its cells count as
    idle; the last one left always fits, as no request is longer than the cells.
    """
    streams, retract = list(running), []
    cells = room.free + room.idle
    while len(streams) > 1 and not _fits(streams, cells):
        newest = streams.pop()
        retract.append(newest.key)
        cells += newest.alone
    rows = _rows(streams, cells, room.free if not retract else 0, limits)
    return Plan(tuple(rows), tuple(retract))


def lessen(rows: Sequence[Rows]) -> tuple[Rows, ...]:
    """Less than `rows`: without drafts; if there are none, half of each prompt; if nobody reads, the older half.

    A single row becomes nothing.
    """
    if any(part.drafts for part in rows):
        return tuple(Rows(part.key, part.tokens) for part in rows)
    if any(part.tokens > 1 for part in rows):
        return tuple(Rows(part.key, (part.tokens + 1) // 2) for part in rows)
    return tuple(rows[: len(rows) // 2])


def count(rows: Iterable[Rows], decodes: Callable[[int], bool]) -> Counts:
    """The rows of a step; `decodes` says of a stream's key whether it is only one token behind."""
    parts = [*rows]
    streaming = [part for part in parts if decodes(part.key)]
    drafts = sum(part.drafts for part in streaming)
    total = sum(part.tokens + part.drafts for part in parts)
    return Counts(len(streaming), drafts, total - len(streaming) - drafts)


def _fits(streams: Sequence[StreamView], cells: int) -> bool:
    """Whether every decoding stream gets its row, and a row is left if somebody reads a prompt."""
    decoding = sum(view.behind == 1 for view in streams)
    return decoding + (decoding < len(streams)) <= cells


def _rows(streams: Sequence[StreamView], cells: int, free: int, limits: Limits) -> list[Rows]:
    decoding = [view for view in streams if view.behind == 1]
    reading = [view for view in streams if view.behind > 1 and view.ready]
    count, outputs = len(decoding), limits.outputs - len(streams)
    drafts = _share(
        [view.drafts for view in decoding],
        max(0, min(limits.rows - len(streams), outputs, free - len(streams))),
    )
    count += sum(drafts)
    chunk = min(limits.prompt_rows, limits.rows - count, cells - count)
    prompts = _read([view.ready for view in reading], max(0, chunk))
    rows = [Rows(view.key, 1, more) for view, more in zip(decoding, drafts, strict=True)]
    rows += [Rows(view.key, size) for view, size in zip(reading, prompts, strict=True) if size]
    return rows


def _read(wants: Sequence[int], total: int) -> list[int]:
    """Splits the rows for prompts: half of them evenly, so that none stands still; with the others those are finished
    that lack least, so that most begin soon."""
    given = _share(wants, (total + 1) // 2)
    left = total - sum(given)
    for i in sorted(range(len(wants)), key=lambda i: wants[i] - given[i]):
        more = min(wants[i] - given[i], left)
        given[i] += more
        left -= more
    return given


def _share(wants: Sequence[int], total: int) -> list[int]:
    """Splits `total` evenly: nobody gets more than it wants, what one leaves goes to the others, and a rest that
    cannot be split goes to the first ones."""
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
