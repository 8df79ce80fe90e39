"""Carries out steps: admit, plan, execute, process, then draft.

The only place where KV cells and tokens change together, and the one order in which they do.
"""

from __future__ import annotations

import time
from collections import abc
from functools import partial

from engine import scheduler
from engine.backend import Aborted, Backend, Logits, NativeFault, NoFreeCells
from engine.contract import EngineError, EngineFault, Failed, FinishReason
from engine.grammar import Masks
from engine.kv import Allocation, Costs, KVCache, Offload
from engine.outbox import Outbox
from engine.pace import Load, Pace
from engine.running import Running
from engine.scheduler import Limits, Plan, Room, Rows
from engine.sequence import Sequence
from engine.slots import Slots
from engine.speculate import LEARN, Drafting
from engine.stats import Counters
from engine.verify import verify
from engine.waiting import Waiting

# Share of a step that may be spent on loading blocks, and again on saving them, while sequences run.
MOVE_SHARE = 0.1
# Seconds that an idle engine saves prefixes between two looks at its inbox.
IDLE_SAVE_SECONDS = 0.02
SHUTTING_DOWN = "The server is shutting down."


class Runner:
    """The sequences of one engine. All of it belongs to the engine thread."""

    def __init__(
        self,
        backend: Backend,
        slots: int,
        pace: Pace,
        outbox: Outbox,
        drafting: Drafting,
        offload: Offload | None = None,
        reuse: int = 0,
    ) -> None:
        context = backend.context
        assert context.sequences >= slots + context.unified, "an id stays free while a slot is, with unified KV"
        assert min(context.outputs, context.batch.capacity) >= slots, "every slot may decode"
        self.backend = backend
        self.context = context
        self.kv = KVCache(context, offload, reuse)
        self._chooser = drafting.chooser
        self.cost = self._chooser.cost
        self.counters = Counters(context.cells, lambda: drafting.drafts, self.cost.even_seconds)
        self.running = Running(self.kv)
        self.waiting = Waiting(self.kv)
        self.slots = Slots(slots)
        self._pace = pace
        self._outbox = outbox
        self.drafting = drafting
        self._masks = Masks(backend.vocab.size, aside=backend.info.offloaded)
        self._seconds = 0.0  # of the last decode

    @property
    def busy(self) -> bool:
        """True if there is anything to step."""
        return bool(self.running or self.waiting)

    def submit(self, sequence: Sequence) -> None:
        """Takes a new request."""
        sequence.drafter = self.drafting.drafter(sequence.request, sequence.sampler, sequence.matcher)
        self.waiting.put(sequence)

    def reject(self, key: int, error: EngineError) -> None:
        """Ends a request that cannot be taken."""
        self.counters.finished["error"] += 1
        self._outbox.end(key, Failed(error))

    def end(self, key: int, reason: FinishReason) -> None:
        """Ends a request that its client left or found complete, running or waiting; no effect on one that ended."""
        if (sequence := self.running.get(key) or self.waiting.get(key)) is not None:
            self._finish(sequence, reason)

    def fail_all(self, message: str, sequences: abc.Iterable[Sequence] | None = None) -> None:
        """Ends `sequences`, by default all, with an EngineFault; nothing of them stays in the KV cache."""
        for sequence in [*self.running.values(), *self.waiting] if sequences is None else sequences:
            self._fail(sequence, EngineFault(message))

    def step(self) -> None:
        """One decode for everything that runs, and what follows from it. With nothing to decode it only reports."""
        begun, steps = time.perf_counter(), self.counters.steps
        self._admit()
        self._maintain()
        plan = self._plan()
        for key in plan.preempt:
            self._preempt(self.running[key])
        if plan.rows:
            self._execute(plan.rows)
        self.counters.gauge(len(self.running), len(self.waiting), self.kv.stats())
        self._outbox.flush()
        if self.counters.steps > steps:  # the decode completed
            self.cost.add_host_time(time.perf_counter() - begun - self._seconds)
        self._draft()
        self.counters.busy_seconds += time.perf_counter() - begun

    def check_idle(self) -> None:
        """Proves that tree and context agree. Called when nothing runs; raises AssertionError if they do not."""
        self.kv.check(tiers=False)

    def maintain_idle(self) -> bool:
        """Saves prefixes for a while. Called when nothing runs; True if there is more to save."""
        self.kv.price(Costs())
        more = self.kv.maintain(IDLE_SAVE_SECONDS)
        self.counters.gauge(len(self.running), len(self.waiting), self.kv.stats())
        return more

    def close(self) -> None:
        """Writes what outlives requests to its files. Nothing is called afterwards."""
        self.drafting.close()
        self._masks.close()
        self.kv.close()

    # ── admit ──

    def _admit(self) -> None:
        while self.waiting and len(self.running) < len(self.slots):
            views = self.waiting.views(self.running)
            admission = scheduler.admit(views, self.running.views(), self._room())
            for hold in admission.holds:
                self.kv.save_at(self.running[hold.on].seq, hold.length)
            self.waiting.hold(admission.holds)
            sequence = self.waiting.get(admission.start) if admission.start is not None else None
            if sequence is None:
                return
            self._start(sequence)

    def _start(self, sequence: Sequence) -> None:
        first = sequence.admitted is None
        match = sequence.match or self.kv.match(sequence.tokens, sequence.request.salt)
        self.waiting.discard(sequence)
        sequence.start(self.kv.allocate(match))
        self.running[sequence.key] = sequence
        self.slots.take(sequence)
        self.waiting.prefilling(sequence)
        for length in scheduler.save_points(len(sequence.tokens), divisible=self.context.divisible):
            self.kv.save_at(sequence.seq, length)
        self.counters.restores += self.kv.loading(sequence.seq)
        if first:
            self.counters.queue.add(time.perf_counter() - sequence.submitted)
            self.counters.prompt_tokens += sequence.prompt_length

    def _maintain(self) -> None:
        """Evicts, saves and loads for a small share of a step, and closes gaps among the slots."""
        rows = sum(1 + len(sequence.draft) for sequence in self.running.values())
        resident, extra_pass = self.cost.resident_cell(rows), self.cost.extra_pass
        self.kv.price(Costs(compute=self.cost.prompt_row, resident=resident, extra_pass=extra_pass))
        self.kv.maintain(MOVE_SHARE * self._seconds)
        if (moved := self.kv.close_gap()) is not None:
            sequence = next(sequence for sequence in self.running.values() if sequence.seq == moved[0])
            sequence.allocation = Allocation(moved[1], sequence.computed)
        self._load()

    def _load(self) -> None:
        """Loads the blocks that come next, for a small share of a step while others run."""
        loading = [sequence for sequence in self.running.values() if self.kv.loading(sequence.seq)]
        alone = len(loading) == len(self.running)
        until = time.perf_counter() + (self._pace.idle_step if alone else MOVE_SHARE * self._seconds)
        for sequence in loading:
            while self.kv.loading(sequence.seq):
                wait = alone and sequence is loading[0]
                try:
                    loaded = self.kv.load(sequence.seq, until - time.perf_counter(), wait=wait)
                except (Aborted, NativeFault) as error:
                    self._fail(sequence, EngineFault(_reason(error)))
                    break
                if not loaded.tokens:
                    break
                sequence.load(*loaded)
                if time.perf_counter() >= until:
                    return

    # ── plan ──

    def _plan(self) -> Plan:
        decoding = self.running.decoding()
        prefilling = (len(self.running) - len(decoding)) / max(1, len(decoding))
        shape = self.cost.layout.shape(decoding, self.kv.resident)
        prompt_rows = self.cost.prompt_rows(shape, *self._pace, prefilling, self.running.waited)
        context = self.context
        limits = Limits(context.batch.capacity, context.outputs, prompt_rows, context.prefill_rows, context.ubatch)
        return scheduler.plan(self.running.views(), self._room(), limits)

    def _room(self) -> Room:
        return Room(len(self.slots) - len(self.running), self.kv.free, self.kv.evictable)

    def _preempt(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Takes a sequence's slot; its cells count as idle if `keep`. It starts again before all others."""
        self._leave(sequence, keep=keep)
        self.waiting.unhold(sequence.key)
        sequence.drafter.pause()
        self.waiting.put_first(sequence)
        self.counters.retractions += 1

    # ── execute ──

    def _execute(self, rows: abc.Sequence[Rows]) -> None:
        """Decodes `rows`, or what of them finds cells, and processes the logits.

        The count of free cells is exact for plain attention; should the model have fewer all the same, idle prefixes
        are evicted and the step is tried with fewer rows, down to one. A sequence fails only if that finds no cell.
        """
        while True:
            self.kv.evict(sum(part.tokens + part.drafts for part in rows))
            placed = self.running.ordered(rows, self.cost, apart=self.context.prefill_rows > 1)
            firsts, cells = self._fill(placed), self.kv.resident
            failed = [self.running[part.key] for part in rows]
            decoding, prompt_rows = self.running.kinds(placed)
            passes = self.cost.layout.passes(self.running.sequence_rows(placed))
            begun = time.perf_counter()
            try:
                logits = self.context.decode(partial(self._commit, placed))
            except NoFreeCells:
                self.kv.evict(self.context.cells)
                if less := scheduler.lessen(rows):
                    rows = less
                    continue
                self.fail_all("the model finds no cells for a single row of it", failed)
            except (Aborted, NativeFault) as error:
                self.fail_all(_reason(error), failed)
            else:
                self._seconds = time.perf_counter() - begun
                self._chooser.saw(decoding, prompt_rows, cells, self._seconds)
                self.counters.decoded(len(passes), self._seconds)
                self._process(placed, firsts, logits)
            return

    def _fill(self, rows: abc.Iterable[Rows]) -> list[int]:
        """Writes the batch and starts the masks; for each sequence the index of its first row of logits."""
        self.context.batch.clear()
        self._masks.begin([want for part in rows if (want := self.running[part.key].want(part)) is not None])
        return [self.running[part.key].fill(self.context.batch, part) for part in rows]

    def _commit(self, rows: abc.Iterable[Rows]) -> None:
        """Counts the known tokens of `rows` as computed, which a GPU may still be doing."""
        for part in rows:
            sequence = self.running[part.key]
            self.kv.commit(sequence.seq, sequence.commit(part.tokens))
            if sequence.num_uncomputed:
                continue
            if cached := sequence.prompt_done():
                self.counters.cached_tokens += cached
                self.counters.hits += 1
            self.waiting.prefilled(sequence)
        self.kv.step()

    # ── process ──

    def _process(self, rows: abc.Iterable[Rows], firsts: abc.Iterable[int], logits: Logits) -> None:
        now = time.perf_counter()
        for part, first in zip(rows, firsts, strict=True):
            sequence = self.running[part.key]
            self._outbox.reading(sequence.key, sequence.reading)
            if not sequence.num_uncomputed:
                self._emit(sequence, logits[first : first + part.drafts + 1], now)

    def _emit(self, sequence: Sequence, rows: Logits, now: float) -> None:
        """Picks the sequence's next tokens, keeps the cells of accepted drafts, rolls back the others, and reports."""
        if (reason := sequence.done_reading) is not None:
            self._finish(sequence, reason)
            return
        drafts, draft = len(rows) - 1, sequence.draft
        verdict = verify(sequence, draft[:drafts], rows, self._masks.of(sequence.key))
        if verdict.ids:
            self.counters.emitted(len(verdict.ids), sequence.tick(now), now - sequence.submitted)
        if verdict.shown:
            self._outbox.tokens(sequence.key, verdict.shown, verdict.logprobs)
        if verdict.error is not None:
            self._fail(sequence, verdict.error)
            return
        assert verdict.ids, "a verified row commits a token"
        intact = self._keep_accepted(sequence, drafts, verdict.accepted)
        made = self._chooser.verified(drafts, verdict.accepted)
        sequence.drafter.observe(sequence.tokens, verdict.ids, made)
        sequence.draft = ()
        if verdict.reason is not None:
            self._finish(sequence, verdict.reason, keep=intact)
        elif sequence.full:
            self._preempt(sequence)
            sequence.drafter.shift(*sequence.shift())
        elif not intact:
            self._preempt(sequence, keep=False)

    def _keep_accepted(self, sequence: Sequence, drafts: int, accepted: int) -> bool:
        """Commits the accepted ones of `drafts` drafted tokens, which are in cells, and rolls the others back. False
        if what is left cannot be continued."""
        if not drafts:
            return True
        self.kv.commit(sequence.seq, sequence.draft[:accepted])
        sequence.computed += accepted
        self.counters.drafted_tokens += drafts
        self.counters.accepted_tokens += accepted
        return accepted == drafts or self.kv.rollback(sequence.seq)

    # ── draft ──

    def _draft(self) -> None:
        """Asks the proposers for the next step's drafts, while the clients already have this step's tokens."""
        if not self.context.partial:
            return
        context, count = self.context, len(self.running)
        most = min(context.outputs - len(self.slots), context.batch.capacity - count, self.kv.free - count)
        prefilling = self.running.learn(LEARN)
        wishes = self.running.wishes(most)
        decoding = self.running.decoding()
        load = Load(tuple(decoding), len(decoding), self.kv.resident, max(0, most))
        drafts = self.drafting.propose([*wishes.values()], prefilling, load, self._seconds)
        for key, draft in zip(wishes, drafts, strict=True):
            self.running[key].draft = draft.tokens

    # ── the end of a sequence ──

    def _finish(self, sequence: Sequence, reason: FinishReason, *, keep: bool = True) -> None:
        self._close(sequence, reason.value, keep=keep)
        self._outbox.end(sequence.key, sequence.finished(reason))

    def _fail(self, sequence: Sequence, error: EngineError) -> None:
        self._close(sequence, "error", keep=False)
        self._outbox.end(sequence.key, Failed(error))

    def _close(self, sequence: Sequence, outcome: str, *, keep: bool) -> None:
        self._leave(sequence, keep=keep)
        sequence.drafter.end()
        if sequence.admitted is not None:
            self.drafting.report(sequence.drafter)
        self.counters.finished[outcome] += 1

    def _leave(self, sequence: Sequence, *, keep: bool) -> None:
        """Takes the sequence out of its slot or the queue; its cells stay resident if `keep`."""
        self.slots.leave(sequence)
        self.running.pop(sequence.key, None)
        self.waiting.discard(sequence)
        if sequence.allocation is not None:
            self.kv.release(sequence.seq, keep=keep)
            sequence.stop()


def _reason(error: Aborted | NativeFault) -> str:
    return SHUTTING_DOWN if isinstance(error, Aborted) else f"the step failed: {error}"
