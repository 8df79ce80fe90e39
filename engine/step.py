"""The step of the engine: admit, plan, execute, process, draft. KV cells and tokens change here, always together."""

from __future__ import annotations

import time
from collections import abc
from functools import partial

from engine import scheduler
from engine.backend import Aborted, Backend, Logits, NativeFault, NoFreeCells
from engine.contract import EngineFault, FinishReason
from engine.grammar import Masks
from engine.kv import Allocation, Costs, KVCache, Offload
from engine.lifecycle import Lifecycle
from engine.outbox import Outbox
from engine.pace import StepTargets, UpcomingStep
from engine.scheduler import Limits, Plan, Room, Rows
from engine.sequence import Sequence
from engine.speculate import FEED_TOKENS, SpeculativeDecoding
from engine.stats import Counters
from engine.verify import verify

# Part of a step that may be spent on loading blocks, and again on saving them, while sequences run.
MOVE_SHARE = 0.1
# An idle engine polls its inbox this often while it saves prefixes.
IDLE_SAVE_SECONDS = 0.02
SHUTTING_DOWN = "The server is shutting down."


class EngineCore:
    """Scheduler, KV cache and model of one engine. Belongs to the engine thread."""

    def __init__(
        self,
        backend: Backend,
        slots: int,
        targets: StepTargets,
        outbox: Outbox,
        speculative_decoding: SpeculativeDecoding,
        offload: Offload | None = None,
        reuse: int = 0,
    ) -> None:
        context = backend.context
        assert context.sequences >= slots + context.unified, "an id stays free while a slot is, with unified KV"
        assert min(context.outputs, context.batch.capacity) >= slots, "every slot may decode"
        self.backend = backend
        self.context = context
        self.kv = KVCache(context, offload, reuse)
        self._chooser = speculative_decoding.chooser
        self.cost = self._chooser.cost
        self.counters = Counters(context.cells, lambda: speculative_decoding.draft_stats, self.cost.even_seconds)
        self.lifecycle = Lifecycle(self.kv, slots, speculative_decoding, outbox, self.counters)
        self.running = self.lifecycle.running
        self.waiting = self.lifecycle.waiting
        self.slots = self.lifecycle.slots
        self._targets = targets
        self._outbox = outbox
        self.speculative_decoding = speculative_decoding
        self._masks = Masks(backend.vocab.size, overlapped=backend.info.offloaded)
        self._decode_seconds = 0.0  # of the last decode

    def step(self) -> None:
        """Computes and processes one decode for all running sequences, then drafts for the next. Flushes the outbox in
        any case."""
        begun, steps = time.perf_counter(), self.counters.steps
        self._admit()
        self._maintain()
        plan = self._plan()
        for key in plan.preempt:
            self.lifecycle.preempt(self.running[key])
        if plan.rows:
            self._execute(plan.rows)
        self.counters.gauge(len(self.running), len(self.waiting), self.kv.stats())
        self._outbox.flush()
        if self.counters.steps > steps:  # a decode completed
            self.cost.add_host_time(time.perf_counter() - begun - self._decode_seconds)
        self._draft()
        self.counters.busy_seconds += time.perf_counter() - begun

    def check_idle(self) -> None:
        """Raises AssertionError unless prefix tree and context agree. Called when nothing runs."""
        self.kv.check(tiers=False)

    def maintain_idle(self) -> bool:
        """Saves prefixes for about `IDLE_SAVE_SECONDS`. Called when nothing runs. True if prefixes are left to save."""
        self.kv.price(Costs())
        more = self.kv.maintain(IDLE_SAVE_SECONDS)
        self.counters.gauge(len(self.running), len(self.waiting), self.kv.stats())
        return more

    def close(self) -> None:
        """Writes the shared data of proposers and queued blocks to their files. No method is called afterwards."""
        self.speculative_decoding.close()
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
            self.lifecycle.start(sequence)

    def _maintain(self) -> None:
        """Evicts, saves and loads for a small part of a step, and closes gaps among the slots."""
        rows = sum(1 + len(sequence.draft) for sequence in self.running.values())
        resident, extra_pass = self.cost.resident_cell(rows), self.cost.extra_pass
        self.kv.price(Costs(compute=self.cost.prompt_row, resident=resident, extra_pass=extra_pass))
        self.kv.maintain(MOVE_SHARE * self._decode_seconds)
        if (moved := self.kv.close_gap()) is not None:
            sequence = next(sequence for sequence in self.running.values() if sequence.seq == moved[0])
            sequence.allocation = Allocation(moved[1], sequence.computed)
        self._load()

    def _load(self) -> None:
        """Loads the next blocks of each loading sequence; for a small part of a step while other sequences run."""
        loading = [sequence for sequence in self.running.values() if self.kv.loading(sequence.seq)]
        alone = len(loading) == len(self.running)
        until = time.perf_counter() + (self._targets.idle_step if alone else MOVE_SHARE * self._decode_seconds)
        for sequence in loading:
            while self.kv.loading(sequence.seq):
                wait = alone and sequence is loading[0]
                try:
                    loaded = self.kv.load(sequence.seq, until - time.perf_counter(), wait=wait)
                except (Aborted, NativeFault) as error:
                    self.lifecycle.fail(sequence, EngineFault(_fault_message(error)))
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
        prompt_rows = self.cost.prompt_rows(shape, *self._targets, prefilling, self.running.waited)
        context = self.context
        limits = Limits(context.batch.capacity, context.outputs, prompt_rows, context.prefill_rows, context.ubatch)
        return scheduler.plan(self.running.views(), self._room(), limits)

    def _room(self) -> Room:
        return Room(len(self.slots) - len(self.running), self.kv.free, self.kv.evictable)

    # ── execute ──

    def _execute(self, rows: abc.Sequence[Rows]) -> None:
        """Decodes `rows`, or as many of them as find cells, and processes the logits.

        The count of free cells is exact for plain attention. If a model has fewer, idle prefixes are evicted and the
        step is repeated with fewer rows, down to one; the sequences of a single row without a cell fail.
        """
        while True:
            self.kv.evict(sum(part.tokens + part.drafts for part in rows))
            placed = self.running.ordered(rows, self.cost, apart=self.context.prefill_rows > 1)
            firsts, cells = self._fill(placed), self.kv.resident
            failed = [self.running[part.key] for part in rows]
            decoding, prompt_rows = self.running.split(placed)
            passes = self.cost.layout.passes(self.running.sequence_rows(placed))
            begun = time.perf_counter()
            try:
                logits = self.context.decode(partial(self._commit, placed))
            except NoFreeCells:
                self.kv.evict(self.context.cells)
                if fewer := scheduler.reduce_rows(rows):
                    rows = fewer
                    continue
                self.lifecycle.fail_all("the model finds no cells for a single row of it", failed)
            except (Aborted, NativeFault) as error:
                self.lifecycle.fail_all(_fault_message(error), failed)
            else:
                self._decode_seconds = time.perf_counter() - begun
                self._chooser.observe_step(decoding, prompt_rows, cells, self._decode_seconds)
                self.counters.decoded(len(passes), self._decode_seconds)
                self._process(placed, firsts, logits)
            return

    def _fill(self, rows: abc.Iterable[Rows]) -> list[int]:
        """Writes the batch and starts the masks. Returns, for each of `rows`, the index of its first row of logits."""
        self.context.batch.clear()
        self._masks.begin([want for part in rows if (want := self.running[part.key].mask_request(part)) is not None])
        return [self.running[part.key].fill(self.context.batch, part) for part in rows]

    def _commit(self, rows: abc.Iterable[Rows]) -> None:
        """Counts the known tokens of `rows` as computed; a GPU may still compute them."""
        for part in rows:
            sequence = self.running[part.key]
            self.kv.commit(sequence.seq, sequence.commit(part.tokens))
            if sequence.num_uncomputed:
                continue
            if cached := sequence.end_prefill():
                self.counters.cached_tokens += cached
                self.counters.hits += 1
            self.waiting.prefilled(sequence)
        self.kv.step()

    # ── process ──

    def _process(self, rows: abc.Iterable[Rows], firsts: abc.Iterable[int], logits: Logits) -> None:
        now = time.perf_counter()
        for part, first in zip(rows, firsts, strict=True):
            sequence = self.running[part.key]
            if (progress := sequence.prefill_progress) is not None:
                self._outbox.prefill_progress(sequence.key, progress)
            if not sequence.num_uncomputed:
                self._emit(sequence, logits[first : first + part.drafts + 1], now)

    def _emit(self, sequence: Sequence, rows: Logits, now: float) -> None:
        """Samples the next tokens of `sequence`, commits the cells of accepted draft tokens and rolls back the
        others."""
        if sequence.ends_after_prefill:
            self.lifecycle.finish(sequence, FinishReason.LENGTH)
            return
        drafts, draft = len(rows) - 1, sequence.draft
        result = verify(sequence, draft[:drafts], rows, self._masks.of(sequence.key))
        if result.ids:
            self.counters.emitted(len(result.ids), sequence.mark_emission(now), now - sequence.submitted)
        if result.shown:
            self._outbox.tokens(sequence.key, result.shown, result.logprobs)
        if result.error is not None:
            self.lifecycle.fail(sequence, result.error)
            return
        assert result.ids, "a verified row commits a token"
        intact = self._keep_accepted(sequence, drafts, result.accepted)
        verified = self._chooser.assess(drafts, result.accepted)
        sequence.proposers.observe(sequence.tokens, result.ids, verified)
        sequence.draft = ()
        if result.reason is not None:
            self.lifecycle.finish(sequence, result.reason, keep=intact)
        elif sequence.needs_shift:
            self.lifecycle.preempt(sequence)
            sequence.proposers.shift(*sequence.shift())
        elif not intact:
            self.lifecycle.preempt(sequence, keep=False)

    def _keep_accepted(self, sequence: Sequence, drafts: int, accepted: int) -> bool:
        """Commits the `accepted` first of `drafts` draft tokens, which are in cells, and rolls back the others. False
        if the rest of the sequence cannot be continued."""
        if not drafts:
            return True
        self.kv.commit(sequence.seq, sequence.draft[:accepted])
        sequence.computed += accepted
        self.counters.drafted_tokens += drafts
        self.counters.accepted_tokens += accepted
        return accepted == drafts or self.kv.rollback(sequence.seq)

    # ── draft ──

    def _draft(self) -> None:
        """Sets the drafts for the next step. Runs after the flush, so clients already have this step's tokens."""
        if not self.context.partial:
            return
        context, count = self.context, len(self.running)
        most = min(context.outputs - len(self.slots), context.batch.capacity - count, self.kv.free - count)
        prefilling = self.running.feed_proposers(FEED_TOKENS)
        candidates = self.running.draft_candidates(most)
        decoding = self.running.decoding()
        upcoming = UpcomingStep(tuple(decoding), len(decoding), self.kv.resident, max(0, most))
        drafts = self.speculative_decoding.planner.plan(
            [*candidates.values()], prefilling, upcoming, self._decode_seconds
        )
        for key, draft in zip(candidates, drafts, strict=True):
            self.running[key].draft = draft.tokens


def _fault_message(error: Aborted | NativeFault) -> str:
    return SHUTTING_DOWN if isinstance(error, Aborted) else f"the step failed: {error}"
