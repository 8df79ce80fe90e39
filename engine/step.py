"""The step of the engine: admit, plan, execute, process, draft. Only here do KV cells and tokens change, together."""

from __future__ import annotations

import time
from collections import abc
from functools import partial

from engine import scheduler
from engine.backend import Aborted, Backend, Logits, NativeFault, NoFreeCells
from engine.contract import EngineFault, FinishReason
from engine.grammar import Masks
from engine.kv import Costs, KVCache, Offload
from engine.lifecycle import Lifecycle
from engine.outbox import Outbox
from engine.pace import StepTargets, UpcomingStep
from engine.scheduler import FreeCapacity, Plan, ScheduledRows, StepLimits
from engine.sequence import Sequence
from engine.speculate import FEED_TOKENS, SpeculativeDecoding
from engine.stats import Counters
from engine.verify import verify

# Share of a step that may be spent on loading blocks while other sequences run, and the same share for saving blocks.
MOVE_SHARE = 0.1
# Seconds between two polls of the inbox while an idle engine saves prefixes.
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
        # With unified KV a prompt gets a new id, while the id of the idle sequence whose cells it shares stays in use.
        assert context.sequences >= slots + context.unified, "unified KV needs one more id than slots"
        assert min(context.outputs, context.batch.capacity) >= slots, "each slot can decode in every step"
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
        """Admits sequences, decodes and processes the rows of one step, flushes the outbox, and sets the drafts of the
        next step."""
        begun, steps = time.perf_counter(), self.counters.steps
        self._admit()
        self._maintain()
        plan = self._plan()
        for key in plan.preempt:
            self.lifecycle.preempt(self.running[key])
        if plan.rows:
            self._execute(plan.rows)
        self.counters.set_gauges(len(self.running), len(self.waiting), self.kv.stats())
        self._outbox.flush()
        if self.counters.steps > steps:  # a decode completed
            # Without the time of `_draft`: proposers account for their own time.
            self.cost.add_host_time(time.perf_counter() - begun - self._decode_seconds)
        self._draft()
        self.counters.busy_seconds += time.perf_counter() - begun

    def check_idle(self) -> None:
        """Raises AssertionError, which ends the engine, unless prefix tree and context agree. Usually under 1 ms."""
        self.kv.check(tiers=False)

    def maintain_idle(self) -> bool:
        """Saves prefixes for about `IDLE_SAVE_SECONDS` while no request runs. Returns True if prefixes are left."""
        self.kv.set_costs(Costs())  # keeping a cell lengthens no step while none runs
        more = self.kv.maintain(IDLE_SAVE_SECONDS)
        self.counters.set_gauges(len(self.running), len(self.waiting), self.kv.stats())
        return more

    def close(self) -> None:
        """Writes shared data of proposers, and blocks queued for the disk. No method may be called afterwards."""
        self.speculative_decoding.close()
        self._masks.close()
        self.kv.close()

    # ── admit ──

    def _admit(self) -> None:
        while self.waiting and len(self.running) < len(self.slots):
            views = self.waiting.views(self.running)
            admission = scheduler.admit(views, self.running.views(), self._free_capacity())
            for hold in admission.holds:  # for models whose states are not divisible
                self.kv.save_at(self.running[hold.source].seq, hold.length)
            self.waiting.hold(admission.holds)
            sequence = self.waiting.get(admission.start) if admission.start is not None else None
            if sequence is None:
                return
            self.lifecycle.start(sequence)

    def _maintain(self) -> None:
        """Evicts, saves and loads for a small share of a step, and closes gaps between sequence ids."""
        rows = sum(1 + len(sequence.draft) for sequence in self.running.values())
        resident, extra_pass = self.cost.resident_cell(rows), self.cost.extra_pass
        self.kv.set_costs(Costs(compute=self.cost.prompt_row, resident=resident, extra_pass=extra_pass))
        self.kv.maintain(MOVE_SHARE * self._decode_seconds)
        if (moved := self.kv.close_gap()) is not None:
            self.running.change_id(*moved)
        self._load()

    def _load(self) -> None:
        """Loads the next blocks of each loading sequence, for a small share of a step while other sequences run."""
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
        shape = self.cost.layout.shape(decoding, self.kv.used_cells)
        prompt_rows = self.cost.prompt_rows(shape, *self._targets, prefilling, self.running.prefill_waits())
        context = self.context
        limits = StepLimits(context.batch.capacity, context.outputs, prompt_rows, context.prefill_rows, context.ubatch)
        return scheduler.plan(self.running.views(), self._free_capacity(), limits)

    def _free_capacity(self) -> FreeCapacity:
        return FreeCapacity(len(self.slots) - len(self.running), self.kv.free_cells, self.kv.evictable_cells)

    # ── execute ──

    def _execute(self, rows: abc.Sequence[ScheduledRows]) -> None:
        """Decodes `rows`, or fewer if there are too few cells, and processes the logits.

        The count of free cells is exact for attention to all tokens; other models may have fewer. Then all idle
        prefixes are evicted and the step is repeated with fewer rows. A sequence whose single row does not fit fails.
        """
        while True:
            self.kv.evict(sum(part.tokens + part.drafts for part in rows))
            placed = self.running.ordered(rows, self.cost, separate_prompts=self.context.prefill_rows > 1)
            firsts, cells = self._fill(placed), self.kv.used_cells
            failed = [self.running[part.key] for part in rows]
            decoding, prompt_rows = self.running.split_decoding(placed)
            passes = self.cost.layout.passes(self.running.sequence_rows(placed))
            begun = time.perf_counter()
            try:
                logits = self.context.decode(partial(self._commit, placed))
            except NoFreeCells:
                self.kv.evict(self.context.cells)
                if fewer := scheduler.reduce_rows(rows):
                    rows = fewer
                    continue
                self.lifecycle.fail_all("the KV cache has no free cell for a single row of the sequence", failed)
            except (Aborted, NativeFault) as error:
                self.lifecycle.fail_all(_fault_message(error), failed)
            else:
                self._decode_seconds = time.perf_counter() - begun
                self._chooser.observe_step(decoding, prompt_rows, cells, self._decode_seconds)
                self.counters.record_decode(len(rows), len(passes), self._decode_seconds)
                self._process(placed, firsts, logits)
            return

    def _fill(self, rows: abc.Iterable[ScheduledRows]) -> list[int]:
        """Writes the batch and starts computing the grammar masks. Returns, for each of `rows`, the index of its first
        row of logits."""
        self.context.batch.clear()
        self._masks.begin([mask for part in rows if (mask := self.running[part.key].mask_request(part)) is not None])
        return [self.running[part.key].fill(self.context.batch, part) for part in rows]

    def _commit(self, rows: abc.Iterable[ScheduledRows]) -> None:
        """Counts the known tokens of `rows` as computed. A GPU may still be computing them."""
        for part in rows:
            sequence = self.running[part.key]
            self.kv.commit(sequence.seq, sequence.commit(part.tokens))
            if sequence.num_uncomputed:
                continue
            if cached := sequence.end_prefill():
                self.counters.cached_tokens += cached
                self.counters.hits += 1
            self.waiting.remove_in_flight(sequence)  # no effect after the step that completes the prefill
        self.kv.count_step()

    # ── process ──

    def _process(self, rows: abc.Iterable[ScheduledRows], firsts: abc.Iterable[int], logits: Logits) -> None:
        now = time.perf_counter()
        for part, first in zip(rows, firsts, strict=True):
            sequence = self.running[part.key]
            if (progress := sequence.prefill_progress) is not None:
                self._outbox.prefill_progress(sequence.key, progress)
            if not sequence.num_uncomputed:
                self._emit(sequence, logits[first : first + part.drafts + 1], now)

    def _emit(self, sequence: Sequence, rows: Logits, now: float) -> None:
        """Samples the next tokens of `sequence`, commits the cells of accepted draft tokens, and rolls back the cells
        of rejected ones."""
        if sequence.ends_after_prefill:
            self.lifecycle.finish(sequence, FinishReason.LENGTH)
            return
        drafts, draft = len(rows) - 1, sequence.draft
        result = verify(sequence, draft[:drafts], rows, self._masks.of(sequence.key))
        if result.ids:
            gap = sequence.mark_emission(now)
            self.counters.record_emission(len(result.ids), gap, now - sequence.submitted)
            if gap is None:
                self.counters.record_prefill(sequence.num_uncached, now - (sequence.admitted or now))
        if result.streamed:
            self._outbox.tokens(sequence.key, result.streamed, result.logprobs)
        if result.error is not None:
            self.lifecycle.fail(sequence, result.error)
            return
        assert result.ids, "each verification without an error emits a token"
        intact = self._keep_accepted(sequence, drafts, result.accepted)  # False only with a sliding window
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
        """Commits the first `accepted` of `drafts` draft tokens in cells, and rolls back the other draft tokens.

        Returns False if the sequence cannot be continued, because a sliding window lacks cells after the rollback.
        """
        if not drafts:
            return True
        self.kv.commit(sequence.seq, sequence.draft[:accepted])
        sequence.computed += accepted
        self.counters.drafted_tokens += drafts
        self.counters.accepted_tokens += accepted
        return accepted == drafts or self.kv.rollback(sequence.seq)

    # ── draft ──

    def _draft(self) -> None:
        """Sets the drafts for the next step. Called after the flush, so that it does not delay this step's tokens."""
        if not self.context.partial:
            return
        context, count = self.context, len(self.running)
        # A request that starts before the next step may need a row of logits, so every slot counts for `outputs`. Its
        # prompt rows and cells yield to drafts.
        max_rows = min(context.outputs - len(self.slots), context.batch.capacity - count, self.kv.free_cells - count)
        prefilling = self.running.feed_proposers(FEED_TOKENS)
        candidates, decoding = self.running.draft_candidates(max_rows), self.running.decoding()
        upcoming = UpcomingStep(tuple(decoding), len(decoding), self.kv.used_cells, max(0, max_rows))
        planner = self.speculative_decoding.planner
        drafts = planner.plan([*candidates.values()], prefilling, upcoming, self._decode_seconds)
        for key, draft in zip(candidates, drafts, strict=True):
            self.running[key].draft = draft.tokens


def _fault_message(error: Aborted | NativeFault) -> str:
    return SHUTTING_DOWN if isinstance(error, Aborted) else f"the step failed: {error}"
