"""Carries out steps: admit, plan, fill, decode, verify, commit, roll back, emit, draft.

The only place where cells and tokens change together, and the one order in which they do.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial

from engine import scheduler
from engine.backend import Aborted, Backend, Logits, NativeFault, NoFreeCells
from engine.contract import EngineError, EngineFault, Failed, FinishReason
from engine.grammar import Masks
from engine.memory import Cells, Store
from engine.outbox import Outbox
from engine.pace import Load, Pace
from engine.scheduler import Limits, Plan, Room, Rows, StreamView
from engine.slots import Slots
from engine.speculate import LEARN, Drafter, Drafting, Wish
from engine.stats import Counters
from engine.streams import Stream
from engine.verify import verify
from engine.waiting import Waiting

MOVING = 0.1
"""Share of a step for which states are loaded, and again saved, while streams run."""
TIDYING = 0.02
"""Seconds for which idle prefixes are saved before the inbox is looked at again."""
SHUTTING_DOWN = "The server is shutting down."


class Runner:
    """The streams of one engine. All of it belongs to the engine thread."""

    def __init__(
        self,
        backend: Backend,
        slots: int,
        pace: Pace,
        outbox: Outbox,
        drafting: Drafting,
        store: Store | None = None,
        reuse: int = 0,
    ) -> None:
        assert backend.context.sequences > slots, "an id stays free while a slot is"
        assert min(backend.context.outputs, backend.context.batch.capacity) >= slots, "every slot may decode"
        self.context = backend.context
        self.cells = Cells(backend.context, store, reuse)
        self._chooser = drafting.chooser
        self.cost = self._chooser.cost
        self.counters = Counters(backend.context.cells, lambda: drafting.drafts, self.cost.decode_seconds)
        self.running: dict[int, Stream] = {}  # oldest first
        self.waiting = Waiting(self.cells)
        self.slots = Slots(slots)
        self._pace = pace
        self._outbox = outbox
        self._drafting = drafting
        self._masks = Masks(backend.vocab.size, aside=backend.info.offloaded)
        self._seconds = 0.0  # of the last decode

    @property
    def busy(self) -> bool:
        """Whether there is anything to step."""
        return bool(self.running or self.waiting)

    @property
    def draft_fault(self) -> str:
        """Why the draft model guesses no more, if it failed. Any thread may ask."""
        return self._drafting.model.fault if self._drafting.model is not None else ""

    def submit(self, stream: Stream) -> None:
        """Takes a new request."""
        stream.drafter = self._drafting.drafter(stream.request, stream.sampler, stream.matcher)
        self.waiting.put(stream)

    def end(self, key: int, reason: FinishReason) -> None:
        """Ends a request that its reader left or found complete, wherever it is; one that has ended is nobody's."""
        if (stream := self.running.get(key) or self.waiting.get(key)) is not None:
            self._finish(stream, reason)

    def fail_all(self, message: str) -> None:
        """Ends every request with an EngineFault; the cells keep nothing of them."""
        for stream in [*self.running.values(), *self.waiting]:
            self._fail(stream, EngineFault(message))

    def step(self) -> None:
        """One decode for everyone who runs, and what follows from it. With nobody, only tells the readers."""
        begun, steps = time.perf_counter(), self.counters.steps
        self._admit()
        self.cells.expect(sum(1 + len(stream.draft) for stream in self.running.values()) * self.cost.cell)
        self.cells.compute = self.cost.prompt_row
        self.cells.tend(MOVING * self._seconds)
        if self._worn():
            self._start_over()
        self._restore()
        plan = self._plan()
        for key in plan.retract:
            self._retract(self.running[key])
        if plan.rows:
            self._decode(plan.rows)
        self._gauge()
        self._outbox.flush()
        if self.counters.steps > steps:  # the decode came to its end
            self.cost.beside(time.perf_counter() - begun - self._seconds)
        self._draft()
        self.counters.busy_seconds += time.perf_counter() - begun

    def rest(self) -> None:
        """Called when nothing runs: proves that tree and context still agree. Raises AssertionError if not."""
        self.cells.check()

    def tidy(self) -> bool:
        """Called when nothing runs: does a little of what had to wait until then. Whether there is more."""
        self.cells.expect(0.0)
        more = self.cells.tend(TIDYING)
        self._gauge()
        return more

    def close(self) -> None:
        """Ends what outlives requests: files are written. Nothing is called afterwards."""
        self._drafting.close()
        self._masks.close()
        self.cells.close()

    # ── before the decode ──

    def _admit(self) -> None:
        while self.waiting and len(self.running) < len(self.slots):
            key = scheduler.admit(self.waiting.views(), self._views(), self._room())
            if key is None:
                return
            self._start(self.waiting.take(key))

    def _start(self, stream: Stream) -> None:
        first = stream.admitted is None
        stream.start(self.cells.claim(stream.tokens, stream.request.salt))
        self.running[stream.key] = stream
        self.slots.take(stream)
        self.waiting.promise(stream)
        self.counters.restores += bool(stream.held.coming)
        if first:
            self.counters.queue.add(time.perf_counter() - stream.submitted)
            self.counters.prompt_tokens += stream.prompt_length

    def _views(self) -> list[StreamView]:
        tight = self.cells.free + self.cells.idle <= len(self.running)  # somebody may have to be retracted
        return [stream.view(self.cells.tree.alone(stream.held.seq) if tight else 0) for stream in self.running.values()]

    def _room(self) -> Room:
        return Room(len(self.slots) - len(self.running), self.cells.free, self.cells.idle)

    def _worn(self) -> bool:
        """Whether it pays to free all cells: where they must stay in order, if those are needed that cannot be freed
        one by one, for the next rows or for who waits; elsewhere, if free ones lie among the used."""
        if not self.context.ordered:
            return self.cells.scattered
        stuck = self.context.wasted + self.cells.kept
        blocked = bool(self.waiting) and len(self.running) < len(self.slots)
        return self.cells.free < len(self.running) or (blocked and 2 * stuck > self.context.cells)

    def _start_over(self) -> None:
        """Frees all cells: who runs starts again, the oldest first."""
        for stream in reversed([*self.running.values()]):
            self._retract(stream)
        self.cells.clear()
        self._admit()

    def _restore(self) -> None:
        """Loads what is to be loaded next, for a small share of a step while others run."""
        waiting = [stream for stream in self.running.values() if stream.loading]
        alone = len(waiting) == len(self.running)
        until = time.perf_counter() + (self._pace.idle_step if alone else MOVING * self._seconds)
        for stream in waiting:
            while stream.loading and stream.held.fetch(wait=alone and stream is waiting[0]) and stream.held.restore():
                if time.perf_counter() >= until:
                    return

    def _plan(self) -> Plan:
        streams = sum(stream.behind == 1 for stream in self.running.values())
        decoding = streams + sum(len(stream.draft) for stream in self.running.values())
        readers = (len(self.running) - streams) / max(1, streams)
        prompt_rows = self.cost.prompt_rows(decoding, *self._pace, self.cells.tree.cells, readers)
        limits = Limits(self.context.batch.capacity, self.context.outputs, prompt_rows)
        return scheduler.plan(self._views(), self._room(), limits)

    def _retract(self, stream: Stream, *, keep: bool = True) -> None:
        """Takes a stream's slot and lets its cells count as idle if `keep`; it starts again before all others."""
        self._leave(stream, keep=keep)
        stream.drafter.pause()
        self.waiting.put_first(stream)
        self.counters.retractions += 1

    # ── the decode ──

    def _decode(self, rows: Sequence[Rows]) -> None:
        """Decodes `rows`, or what of them finds cells, and settles it.

        The count of free cells is exact for plain attention; should the model have fewer all the same, idle prefixes
        leave and the step is tried with less, down to one row. A stream fails only if not even that row fits.
        """
        while True:
            self.cells.reclaim(sum(part.tokens + part.drafts for part in rows))
            firsts, cells = self._fill(rows), self.cells.tree.cells
            counts = scheduler.count(rows, lambda key: self.running[key].behind == 1)
            begun = time.perf_counter()
            try:
                logits = self.context.decode(partial(self._commit, rows))
            except NoFreeCells:
                self.cells.reclaim(self.context.cells)
                if less := scheduler.lessen(rows):
                    rows = less
                    continue
                self._fail_rows(rows, "the model finds no cells for a single row of it")
            except Aborted:
                self._fail_rows(rows, SHUTTING_DOWN)
            except NativeFault as error:
                self._fail_rows(rows, f"the step failed: {error}")
            else:
                self._seconds = time.perf_counter() - begun
                self._chooser.saw(*counts, cells, self._seconds)
                self.counters.decoded(sum(counts), self.context.ubatch, self._seconds)
                self._settle(rows, firsts, logits)
            return

    def _fill(self, plan: Iterable[Rows]) -> list[int]:
        """Writes the batch and makes the masks; for each stream the index of its first row of logits."""
        self.context.batch.clear()
        self._masks.begin([want for rows in plan if (want := self.running[rows.key].want(rows)) is not None])
        return [self.running[rows.key].fill(self.context.batch, rows) for rows in plan]

    def _fail_rows(self, plan: Iterable[Rows], reason: str) -> None:
        for rows in plan:
            self._fail(self.running[rows.key], EngineFault(reason))

    def _commit(self, plan: Iterable[Rows]) -> None:
        """Takes the known tokens of `plan` as computed, which a GPU may still be doing."""
        for rows in plan:
            stream = self.running[rows.key]
            stream.commit(rows.tokens)
            if stream.behind:
                continue
            if cached := stream.has_read():
                self.counters.cached_tokens += cached
                self.counters.hits += 1
            self.waiting.unpromise(stream)
        self.cells.age()

    def _settle(self, plan: Iterable[Rows], firsts: Iterable[int], logits: Logits) -> None:
        now = time.perf_counter()
        for rows, first in zip(plan, firsts, strict=True):
            stream = self.running[rows.key]
            self._outbox.reading(stream.key, stream.reading)
            if stream.behind:
                continue
            self._emit(stream, logits[first : first + rows.drafts + 1], now)

    def _emit(self, stream: Stream, rows: Logits, now: float) -> None:
        """Picks the stream's next tokens, keeps the cells of those that the draft had right, and tells its reader."""
        if (reason := stream.done_reading) is not None:
            self._finish(stream, reason)
            return
        lease = stream.held
        drafts = len(rows) - 1
        verdict = verify(stream, stream.draft[:drafts], rows, self._masks.of(stream.key))
        if verdict.ids:
            self.counters.emitted(len(verdict.ids), stream.tick(now), now - stream.submitted)
        if verdict.shown:
            self._outbox.tokens(stream.key, verdict.shown, verdict.logprobs)
        if verdict.error is not None:
            self._fail(stream, verdict.error)
            return
        assert verdict.ids, "a verified row commits a token"
        intact = True
        if drafts:
            lease.commit(stream.draft[: verdict.accepted])
            if verdict.accepted < drafts:
                intact = lease.roll_back()
            self.counters.drafted_tokens += drafts
            self.counters.accepted_tokens += verdict.accepted
        made = self._chooser.verified(drafts, verdict.accepted)
        stream.drafter.observe(stream.tokens, verdict.ids, made)
        stream.draft = ()
        if verdict.reason is not None:
            self._finish(stream, verdict.reason)
        elif stream.full:
            self._retract(stream)
            stream.drafter.shift(*stream.forget())
        elif not intact:
            self._retract(stream, keep=False)

    def _draft(self) -> None:
        """Asks the speculators for the next step, while the readers already have this one's tokens."""
        if not self.context.partial:
            return
        context, count, left = self.context, len(self.running), LEARN
        most = min(context.outputs - len(self.slots), context.batch.capacity - count, self.cells.free - count)
        wishes: dict[int, Wish] = {}
        reading: list[Drafter] = []
        for stream in self.running.values():
            left -= stream.drafter.learn(stream.tokens, left)
            if stream.behind > 1:
                reading.append(stream.drafter)
            elif stream.drafter.knows(stream.tokens) and (limit := min(stream.room(), most)) > 0:
                wishes[stream.key] = Wish(stream.drafter, limit, stream.room())
        streams = count - len(reading)
        load = Load(streams, streams, self.cells.tree.cells, max(0, most))
        drafts = self._drafting.propose([*wishes.values()], reading, load, self._seconds)
        for key, draft in zip(wishes, drafts, strict=True):
            self.running[key].draft = draft.tokens

    # ── the end of a stream ──

    def _finish(self, stream: Stream, reason: FinishReason) -> None:
        self._leave(stream, keep=True)
        self._end_drafts(stream)
        self.counters.finished[reason.value] += 1
        self._outbox.end(stream.key, stream.finished(reason))

    def _fail(self, stream: Stream, error: EngineError) -> None:
        self._leave(stream, keep=False)
        self._end_drafts(stream)
        self.counters.finished["error"] += 1
        self._outbox.end(stream.key, Failed(error))

    def _end_drafts(self, stream: Stream) -> None:
        stream.drafter.end()
        if stream.admitted is not None:
            self._drafting.report(stream.drafter)

    def _leave(self, stream: Stream, *, keep: bool) -> None:
        """Takes the stream out of wherever it is; its sequence stays resident if `keep`."""
        self.slots.leave(stream)
        stream.leave(keep=keep)
        self.waiting.unpromise(stream)
        if self.running.pop(stream.key, None) is None:
            self.waiting.discard(stream)

    def _gauge(self) -> None:
        counters, cells = self.counters, self.cells
        counters.running, counters.waiting = len(self.running), len(self.waiting)
        counters.cells_used, counters.cells_idle = cells.tree.cells, cells.kept
        counters.saved_tokens, counters.restored_tokens = cells.saved, cells.restored
        if cells.store is not None:
            counters.ram_bytes, counters.disk_bytes = cells.store.ram.bytes, cells.store.disk.bytes
