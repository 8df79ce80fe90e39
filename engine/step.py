"""The step of the engine: admit, plan, execute, process, draft. Only here do KV cells and tokens change, together."""

from __future__ import annotations

import time
from functools import partial

from msgspec import structs

from engine import scheduler
from engine.backend import Aborted, Backend, NativeFault
from engine.branching import max_alternatives
from engine.kv import Costs, KVCache, Offload
from engine.lifecycle import Lifecycle
from engine.media import MediaEncoder
from engine.media_prefill import MediaPrefill
from engine.outbox import Outbox
from engine.pace import StepTargets, UpcomingStep
from engine.scheduler import FreeCapacity, Plan, StepLimits
from engine.speculate import FEED_TOKENS, SpeculativeDecoding
from engine.stats import Counters
from engine.step_execution import StepExecution, step_fault
from engine.watchdog import WorkClock

# Share of a step that may be spent on loading blocks while other sequences run, and the same share for saving blocks.
MOVE_SHARE = 0.1
# Seconds between two polls of the inbox while an idle engine saves prefixes.
IDLE_SAVE_SECONDS = 0.02


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
        encoder: MediaEncoder | None = None,
    ) -> None:
        context = backend.context
        # With unified KV a prompt gets a new id, while the id of the idle sequence whose cells it shares stays in use.
        assert context.sequences >= slots + context.unified, "unified KV needs one more id than slots"
        assert min(context.outputs, context.batch.capacity) >= slots, "each slot can decode in every step"
        self.backend = backend
        self.context = context
        self.kv = KVCache(context, offload, reuse)
        self.cost = speculative_decoding.chooser.cost
        self.counters = Counters(context.cells, lambda: speculative_decoding.draft_stats, self.cost.even_seconds)
        self.lifecycle = Lifecycle(self.kv, slots, speculative_decoding, outbox, self.counters, queue_timeout)
        self.running = self.lifecycle.running
        self.waiting = self.lifecycle.waiting
        self.slots = self.lifecycle.slots
        self._media = None if encoder is None else MediaPrefill(encoder, self.kv, self.lifecycle)
        self._media_seconds = 0.0
        self._max_alternatives = max_alternatives(context)
        speculative_decoding.with_second_choices = self._max_alternatives > 0
        self._targets = targets
        self._decode_limits = StepLimits(context.batch.capacity, context.outputs, 0)
        self._outbox = outbox
        self.speculative_decoding = speculative_decoding
        self._execution = StepExecution(
            backend, self.kv, self.lifecycle, outbox, self.counters, speculative_decoding.chooser
        )
        self._work = work or WorkClock()

    def step(self) -> None:
        """Admits sequences, decodes and processes the rows of one step, flushes the outbox, and sets the drafts of the
        next step."""
        self._work.begin()
        begun, steps = time.perf_counter(), self.counters.steps
        self.lifecycle.expire(begun)
        self._admit()
        self._maintain()
        media_rows = self._prefill_media()
        plan = self._plan(media_rows)
        for key in plan.preempt:
            self.lifecycle.preempt(self.running[key])
        if plan.rows:
            self._execution.execute(plan.rows)
        elif self._media is not None and not media_rows:
            self._media.wait()
        self.counters.set_gauges(len(self.running), len(self.waiting), self.kv.stats())
        self._outbox.flush()
        if self.counters.steps > steps:  # a decode completed
            # Without the time of `_draft`: proposers account for their own time.
            self.cost.add_host_time(
                time.perf_counter() - begun - self._execution.last_step.seconds - self._media_seconds
            )
        self._draft()
        self.counters.record_step(time.perf_counter() - begun, decoded=self.counters.steps > steps)
        self._work.end()

    def check_idle(self) -> None:
        """Raises AssertionError, which ends the engine, unless prefix tree and context agree. Usually under 1 ms."""
        self.kv.check(tiers=False)

    def maintain_idle(self) -> bool:
        """Saves prefixes for about `IDLE_SAVE_SECONDS` while no request runs. Returns True if prefixes are left."""
        self._work.begin()
        # Without `resident`, as keeping a cell lengthens no step while none runs.
        self.kv.set_costs(Costs(self.cost.prompt_row, extra_pass=self.cost.extra_pass))
        more = self.kv.maintain(IDLE_SAVE_SECONDS)
        self.counters.set_gauges(len(self.running), len(self.waiting), self.kv.stats())
        self._work.end()
        return more

    def close(self) -> None:
        """Writes shared data of proposers, and blocks queued for the disk. No method may be called afterwards."""
        self.speculative_decoding.close()
        self._execution.close()
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
        self.kv.maintain(self._move_seconds)
        if (moved := self.kv.close_gap()) is not None:
            self.running.change_id(*moved)
        self._load()

    @property
    def _move_seconds(self) -> float:
        """Seconds of a step that may be spent on saving, and again on loading, while sequences run."""
        return MOVE_SHARE * self._execution.last_step.seconds

    def _load(self) -> None:
        """Loads the next blocks of each loading sequence, for a small share of a step while other sequences run."""
        loading = self.running.loading()
        if not loading:
            return
        alone = len(loading) == len(self.running)
        until = time.perf_counter() + (self._targets.idle_step if alone else self._move_seconds)
        for sequence in loading:
            while self.kv.loading(sequence.seq):
                wait = alone and sequence is loading[0]
                try:
                    loaded = self.kv.load(sequence.seq, until - time.perf_counter(), wait=wait)
                except (Aborted, NativeFault) as error:
                    self.lifecycle.fail(sequence, step_fault(error))
                    break
                if not loaded.tokens:
                    break
                sequence.load(*loaded)
                if time.perf_counter() >= until:
                    return

    def _prefill_media(self) -> int:
        """Decodes rows of an image or sound in place of a prompt chunk. Returns their number."""
        self._media_seconds, begun = 0.0, time.perf_counter()
        if self._media is None or not self._media.prepare():
            return 0
        self.running.choose_adapters()
        self.context.set_adapters(self.running.adapters)
        prompt_rows = partial(self._prompt_rows, own_pass=True)
        rows = self._media.decode(self._execution.commit, prompt_rows, self.context.batch.capacity)
        self._media_seconds = time.perf_counter() - begun
        if rows:  # counts as a prompt chunk of the decode that follows
            decoding = self.cost.layout.shape(self.running.decoding(), self.kv.used_cells)
            self.cost.observe(decoding, rows, self._media_seconds, own_pass=True)
        return rows

    def _plan(self, media_rows: int = 0) -> Plan:
        self.running.choose_adapters()
        context = self.context
        drafts = None if media_rows else self.running.decode_drafts()
        plan = scheduler.plan_decoding(drafts, self._free_capacity(), self._decode_limits) if drafts else None
        if plan is not None:
            return plan
        views = self.running.views()
        # The rows of an image stand in place of a chunk of a prompt, so that the decoding sequences are not delayed.
        prefills = not media_rows and any(view.num_uncomputed > 1 for view in views)
        prompt_rows = self._prompt_rows() if prefills else 0
        limits = StepLimits(context.batch.capacity, context.outputs, prompt_rows, context.prefill_rows, context.ubatch)
        return scheduler.plan(views, self._free_capacity(), limits)

    def _prompt_rows(self, *, own_pass: bool = False) -> int:
        """Returns the maximum prompt rows of the step, with `own_pass` for rows that are decoded before its other
        ones."""
        decoding = self.running.decoding()
        prefilling = (len(self.running.active) - len(decoding)) / max(1, len(decoding))
        prefilling = max(prefilling, self.running.prefill_share())
        shape = self.cost.layout.shape(decoding, self.kv.used_cells)
        return self.cost.prompt_rows(shape, *self._targets, prefilling, self.running.prefill_waits(), own_pass=own_pass)

    def _free_capacity(self) -> FreeCapacity:
        return FreeCapacity(self._free_slots, self.kv.free_cells, self.kv.evictable_cells)

    # ── draft ──

    def _draft(self) -> None:
        """Sets the drafts for the next step. Called after the flush, so that it does not delay this step's tokens."""
        if (max_rollback := self.context.max_rollback) == 0 or not self.running.may_draft:
            return
        self.running.choose_adapters()
        context, count = self.context, len(self.running)
        # A request that starts before the next step may need a row of logits, so every slot counts for `outputs`. Its
        # prompt rows and cells yield to drafts.
        max_rows = min(context.outputs - len(self.slots), context.batch.capacity - count, self.kv.free_cells - count)
        prefilling = self.running.feed_proposers(FEED_TOKENS)
        candidates = self.running.draft_candidates(max_rows if max_rollback is None else min(max_rows, max_rollback))
        decoding = self.running.decoding() if candidates or prefilling else []
        upcoming = UpcomingStep(
            tuple(decoding), len(decoding), self.kv.used_cells, max(0, max_rows), self._max_alternatives
        )
        planner = self.speculative_decoding.planner
        drafts = planner.plan([*candidates.values()], prefilling, upcoming, self._execution.last_step)
        for key, draft in zip(candidates, drafts, strict=True):
            self.running[key].draft, self.running[key].alternative_place = draft.tokens, draft.place
