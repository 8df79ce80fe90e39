"""The step of the engine: admit, plan, execute, process, draft. Only here do KV cells and tokens change, together."""

from __future__ import annotations

import time
from collections import abc
from functools import partial
from typing import NamedTuple

from msgspec import structs

from engine import scheduler
from engine.backend import Aborted, Backend, NativeFault, NoFreeCells
from engine.contract import EngineFault, ShutDown
from engine.grammar import Masks
from engine.kv import Costs, KVCache, Offload
from engine.lifecycle import Lifecycle
from engine.outbox import Outbox
from engine.output_processor import OutputProcessor
from engine.pace import StepTargets, UpcomingStep
from engine.scheduler import FreeCapacity, Plan, ScheduledRows, StepLimits
from engine.speculate import FEED_TOKENS, LastStep, SpeculativeDecoding
from engine.stats import Counters
from engine.watchdog import WorkClock

# Share of a step that may be spent on loading blocks while other sequences run, and the same share for saving blocks.
MOVE_SHARE = 0.1
# Seconds between two polls of the inbox while an idle engine saves prefixes.
IDLE_SAVE_SECONDS = 0.02


class _RowCharge(NamedTuple):
    """Expected seconds of the row of one of `decoding` sequences."""

    decoding: int
    seconds: float


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
        queue_timeout: float = 0.0,
        work: WorkClock | None = None,
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
        self.lifecycle = Lifecycle(self.kv, slots, speculative_decoding, outbox, self.counters, queue_timeout)
        self.running = self.lifecycle.running
        self.waiting = self.lifecycle.waiting
        self.slots = self.lifecycle.slots
        self._targets = targets
        self._outbox = outbox
        self.speculative_decoding = speculative_decoding
        self._masks = Masks(backend.vocab.size, overlapped=backend.info.offloaded)
        self._outputs = OutputProcessor(self.kv, self.lifecycle, outbox, self.counters, self._masks, self._chooser)
        self._last_step = LastStep(0.0)
        self._charged = _RowCharge(0, 0.0)
        self._work = work or WorkClock()

    def step(self) -> None:
        """Admits sequences, decodes and processes the rows of one step, flushes the outbox, and sets the drafts of the
        next step."""
        self._work.begin()
        begun, steps = time.perf_counter(), self.counters.steps
        self.lifecycle.expire(begun)
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
            self.cost.add_host_time(time.perf_counter() - begun - self._last_step.seconds)
        self._draft()
        self.counters.record_step(time.perf_counter() - begun, decoded=self.counters.steps > steps)
        self._work.end()

    def check_idle(self) -> None:
        """Raises AssertionError, which ends the engine, unless prefix tree and context agree. Usually under 1 ms."""
        self.kv.check(tiers=False)

    def maintain_idle(self) -> bool:
        """Saves prefixes for about `IDLE_SAVE_SECONDS` while no request runs. Returns True if prefixes are left."""
        self._work.begin()
        self.kv.set_costs(Costs())  # keeping a cell lengthens no step while none runs
        more = self.kv.maintain(IDLE_SAVE_SECONDS)
        self.counters.set_gauges(len(self.running), len(self.waiting), self.kv.stats())
        self._work.end()
        return more

    def close(self) -> None:
        """Writes shared data of proposers, and blocks queued for the disk. No method may be called afterwards."""
        self.speculative_decoding.close()
        self._masks.close()
        self.kv.close()

    # ── admit and plan ──

    def _admit(self) -> None:
        """Starts waiting sequences. One that finds no slot or no cells may displace a running one, which then waits."""
        while self.waiting and (self._free_slots or self.lifecycle.yielding(self.waiting.first(self.running))):
            capacity = self._free_capacity()
            views = self.waiting.views(self.running)
            # A sequence that may displace another fits or not as if it had found a slot.
            admission = scheduler.admit(views, self.running.views(), structs.replace(capacity, slots=1))
            for hold in admission.holds:  # for models whose states are not divisible
                self.kv.save_at(self.running[hold.source].seq, hold.length)
            self.waiting.hold(admission.holds)
            key = admission.blocked if admission.start is None else admission.start
            if key is None:
                return
            sequence = self.waiting[key]
            if admission.start is not None and capacity.slots:
                self.lifecycle.start(sequence)
            elif (other := self.lifecycle.yielding(sequence)) is not None:
                self.lifecycle.displace(other)
            else:
                return

    @property
    def _free_slots(self) -> int:
        return len(self.slots) - len(self.running)

    def _maintain(self) -> None:
        """Evicts, saves and loads for a small share of a step, and closes gaps between sequence ids."""
        rows = sum(1 + len(sequence.draft) for sequence in self.running.values())
        resident, extra_pass = self.cost.resident_cell(rows), self.cost.extra_pass
        self.kv.set_costs(Costs(compute=self.cost.prompt_row, resident=resident, extra_pass=extra_pass))
        self.kv.maintain(MOVE_SHARE * self._last_step.seconds)
        if (moved := self.kv.close_gap()) is not None:
            self.running.change_id(*moved)
        self._load()

    def _load(self) -> None:
        """Loads the next blocks of each loading sequence, for a small share of a step while other sequences run."""
        loading = [sequence for sequence in self.running.values() if self.kv.loading(sequence.seq)]
        alone = len(loading) == len(self.running)
        until = time.perf_counter() + (self._targets.idle_step if alone else MOVE_SHARE * self._last_step.seconds)
        for sequence in loading:
            while self.kv.loading(sequence.seq):
                wait = alone and sequence is loading[0]
                try:
                    loaded = self.kv.load(sequence.seq, until - time.perf_counter(), wait=wait)
                except (Aborted, NativeFault) as error:
                    self.lifecycle.fail(sequence, _fault_of(error))
                    break
                if not loaded.tokens:
                    break
                sequence.load(*loaded)
                if time.perf_counter() >= until:
                    return

    def _plan(self) -> Plan:
        self.running.choose_adapters()
        views, context = self.running.views(), self.context
        prompt_rows = self._prompt_rows() if any(view.num_uncomputed > 1 for view in views) else 0
        limits = StepLimits(context.batch.capacity, context.outputs, prompt_rows, context.prefill_rows, context.ubatch)
        return scheduler.plan(views, self._free_capacity(), limits)

    def _prompt_rows(self) -> int:
        """Returns the maximum prompt rows of the step."""
        decoding = self.running.decoding()
        prefilling = (len(self.running.active) - len(decoding)) / max(1, len(decoding))
        prefilling = max(prefilling, self.running.prefill_share())
        shape = self.cost.layout.shape(decoding, self.kv.used_cells)
        return self.cost.prompt_rows(shape, *self._targets, prefilling, self.running.prefill_waits())

    def _free_capacity(self) -> FreeCapacity:
        return FreeCapacity(self._free_slots, self.kv.free_cells, self.kv.evictable_cells)

    # ── execute ──

    def _execute(self, rows: abc.Sequence[ScheduledRows]) -> None:
        """Decodes `rows`, or fewer if there are too few cells, and processes the logits.

        The count of free cells is exact for attention to all tokens; other models may have fewer. Then all idle
        prefixes are evicted and the step is repeated with fewer rows. A single row that does not fit is rejected."""
        switched = self.context.set_adapters(self.running.adapters)
        while True:
            self.kv.evict(sum(part.tokens + part.drafts for part in rows))
            placed = self.running.ordered(rows, self.cost, separate_prompts=self.context.prefill_rows > 1)
            firsts, cells = self._fill(placed), self.kv.used_cells
            failed = [self.running[part.key] for part in rows]
            sequence_rows = self.running.sequence_rows(placed)
            decoding, prompt_rows = self.running.split_decoding(placed, sequence_rows)
            passes = self.cost.layout.passes(sequence_rows)
            begun = time.perf_counter()
            try:
                logits = self.context.decode(partial(self._commit, placed))
            except NoFreeCells:
                self.kv.evict(self.context.cells)
                if fewer := scheduler.reduce_rows(rows):
                    rows = fewer
                    continue
                self.lifecycle.reject_rows(failed)
            except (Aborted, NativeFault) as error:
                self.lifecycle.fail_all(partial(_fault_of, error), failed)
            else:
                seconds = time.perf_counter() - begun
                self._last_step = LastStep(seconds, prompt_rows)
                self.running.count_step(seconds)
                if not switched:  # the first decode with other adapters takes longer
                    self._chooser.observe_step(decoding, prompt_rows, cells, seconds)
                self.counters.record_decode(len(rows), len(passes), seconds)
                self._outputs.process(placed, firsts, logits)
            return

    def _fill(self, rows: abc.Iterable[ScheduledRows]) -> list[int]:
        """Writes the batch and starts computing the grammar masks. Returns, for each of `rows`, the index of its first
        row of logits."""
        self.context.batch.clear()
        self._masks.begin([mask for part in rows if (mask := self.running[part.key].mask_request(part)) is not None])
        return [self.running[part.key].fill(self.context.batch, part) for part in rows]

    def _commit(self, rows: abc.Iterable[ScheduledRows]) -> None:
        """Counts the known tokens of `rows` as computed. A GPU may still be computing them."""
        self._charge(rows)
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

    def _charge(self, rows: abc.Iterable[ScheduledRows]) -> None:
        """Adds the cost of `rows` to the counters of their owners, in tokens of a prompt: a decoding sequence costs as
        many as take the time of its row. The recomputation after a preemption costs nothing."""
        sequences = [(self.running[part.key], part.tokens) for part in rows]
        decoding = sum(sequence.num_uncomputed == 1 for sequence, _ in sequences)
        if decoding != self._charged.decoding:  # the estimate takes as long as charging all sequences
            self._charged = _RowCharge(decoding, self.cost.even_seconds(decoding) / max(1, decoding))
        row = self.cost.prompt_row
        for sequence, tokens in sequences:
            if sequence.num_uncomputed == 1:
                self.lifecycle.charge(sequence, max(1.0, self._charged.seconds / row) if row else 1.0)
            elif sequence.first_token is None:
                self.lifecycle.charge(sequence, tokens)

    # ── draft ──

    def _draft(self) -> None:
        """Sets the drafts for the next step. Called after the flush, so that it does not delay this step's tokens."""
        if (max_rollback := self.context.max_rollback) == 0:
            return
        self.running.choose_adapters()
        context, count = self.context, len(self.running)
        # A request that starts before the next step may need a row of logits, so every slot counts for `outputs`. Its
        # prompt rows and cells yield to drafts.
        max_rows = min(context.outputs - len(self.slots), context.batch.capacity - count, self.kv.free_cells - count)
        prefilling = self.running.feed_proposers(FEED_TOKENS)
        candidates = self.running.draft_candidates(max_rows if max_rollback is None else min(max_rows, max_rollback))
        decoding = self.running.decoding() if candidates or prefilling else []
        upcoming = UpcomingStep(tuple(decoding), len(decoding), self.kv.used_cells, max(0, max_rows))
        planner = self.speculative_decoding.planner
        drafts = planner.plan([*candidates.values()], prefilling, upcoming, self._last_step)
        for key, draft in zip(candidates, drafts, strict=True):
            self.running[key].draft = draft.tokens


def _fault_of(error: Aborted | NativeFault) -> EngineFault:
    return ShutDown() if isinstance(error, Aborted) else EngineFault(f"the step failed: {error}")
