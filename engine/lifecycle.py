"""The transitions of sequences: submitted, started, preempted, and ended with one terminal update."""

from __future__ import annotations

import time
from collections import abc
from functools import partial

from engine import scheduler
from engine.contract import EngineError, EngineFault, Failed, FinishReason
from engine.fairness import TokenCounters, displaced
from engine.kv import KVCache
from engine.outbox import Outbox
from engine.running import Running
from engine.sequence import Sequence, finished
from engine.slots import Slots
from engine.speculate import SpeculativeDecoding
from engine.stats import Counters
from engine.time_limits import TimeLimits
from engine.waiting import Waiting


class Lifecycle:
    """The sequences of one engine, each either waiting or running in a slot. Belongs to the engine thread."""

    def __init__(
        self,
        kv: KVCache,
        slots: int,
        speculative_decoding: SpeculativeDecoding,
        outbox: Outbox,
        counters: Counters,
        queue_timeout: float = 0.0,
    ) -> None:
        self._token_counters = TokenCounters()
        self.running = Running(kv, self._token_counters)
        self.waiting = Waiting(kv, self._token_counters)
        self.slots = Slots(slots)
        self._kv = kv
        self._speculative_decoding = speculative_decoding
        self._outbox = outbox
        self._counters = counters
        self._time_limits = TimeLimits(queue_timeout)

    @property
    def busy(self) -> bool:
        """True if any sequence runs or waits."""
        return bool(self.running or self.waiting)

    def submit(self, sequence: Sequence) -> None:
        """Adds a new request to the queue."""
        sequence.proposers = self._speculative_decoding.sequence_proposers(
            sequence.request, sequence.sampler, sequence.matcher
        )
        self._token_counters.join(sequence.request.owner)
        self.waiting.put(sequence)
        self._time_limits.add(sequence, lambda key: key in self.running or self.waiting.get(key) is not None)

    def reject(self, key: int, error: EngineError) -> None:
        """Ends a request that has no sequence."""
        self._counters.finished["error"] += 1
        self._outbox.end(key, Failed(error))

    def start(self, sequence: Sequence) -> None:
        """Moves a waiting sequence into a free slot, preferably that of its request, and allocates the longest cached
        prefix of its tokens."""
        first = sequence.admitted is None
        match = sequence.match or self._kv.match(sequence.tokens, sequence.salt)
        self.waiting.discard(sequence)
        keep = sequence.request.cache
        sequence.start(self._kv.allocate(match, self.slots.preferred_seq(sequence), keep=keep))
        self.running.add(sequence)
        self.slots.take(sequence)
        self._outbox.slot_taken(sequence.key, sequence.slot)
        self.waiting.add_in_flight(sequence)
        if keep:
            for length in scheduler.save_points(len(sequence.tokens), divisible=self._kv.divisible):
                self._kv.save_at(sequence.seq, length)
        self._counters.restores += self._kv.loading(sequence.seq)
        if first:
            self._counters.queue.add(time.perf_counter() - sequence.submitted)
            self._counters.prompt_tokens += sequence.prompt_length

    def charge(self, tokens: abc.Mapping[str, float]) -> None:
        """Adds `tokens`, by owner and already divided by the owner's weight, to the counters."""
        for owner, count in tokens.items():
            self._token_counters.charge(owner, count)

    def preempt(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Moves a running sequence to the front of the queue. Its cells become an idle prefix if `keep`, else free."""
        self._suspend(sequence, keep=keep)
        self.waiting.put_first(sequence)
        self._counters.preemptions += 1

    def yielding(self, waiting: Sequence) -> Sequence | None:
        """Returns the running sequence that yields to `waiting`. None if that has to wait."""
        key = displaced(waiting.claim, self.running.claims())
        return None if key is None else self.running[key]

    def displace(self, sequence: Sequence) -> None:
        """Moves a running sequence that yields to another to its place in the queue. Its cells become an idle
        prefix."""
        self._suspend(sequence, keep=True)
        self.waiting.put(sequence)
        self._counters.displacements += 1

    def expire(self, now: float) -> None:
        """Ends the requests that exceed a time limit: with an error before their first token, else with LENGTH."""
        for key in self._time_limits.reached(now):
            sequence = self.running.get(key) or self.waiting.get(key)
            if sequence is None:
                continue
            if (error := self._time_limits.error(sequence, now)) is not None:
                self.fail(sequence, error)
            elif sequence.due <= now:
                self.finish(sequence, FinishReason.LENGTH)

    def end(self, key: int, reason: FinishReason) -> None:
        """Ends a running or waiting request. No effect on a request that has ended."""
        if (sequence := self.running.get(key) or self.waiting.get(key)) is not None:
            self.finish(sequence, reason)

    def finish(self, sequence: Sequence, reason: FinishReason, *, keep: bool = True) -> None:
        """Ends a sequence with `Finished`. Its cells become an idle prefix if `keep`, else free."""
        self._end(sequence, reason.value, keep=keep)
        self._outbox.end(sequence.key, finished(sequence, reason))

    def fail(self, sequence: Sequence, error: EngineError) -> None:
        """Ends a sequence with `Failed`. Its cells are freed, as their content may be wrong."""
        self._end(sequence, "error", keep=False)
        self._outbox.end(sequence.key, Failed(error))

    def fail_all(
        self, new_fault: abc.Callable[[], EngineFault], sequences: abc.Iterable[Sequence] | None = None
    ) -> None:
        """Ends each of `sequences` with a fault of its own. `None` means all running and waiting sequences."""
        for sequence in [*self.running.values(), *self.waiting] if sequences is None else sequences:
            self.fail(sequence, new_fault())

    def reject_rows(self, sequences: abc.Collection[Sequence]) -> None:
        """Preempts `sequences`, whose rows found no cells, while paused sequences hold cells; else fails them."""
        if len(self.running.active) == len(self.running):
            no_cell = "the KV cache has no free cell for a single row of the sequence"
            self.fail_all(partial(EngineFault, no_cell), sequences)
            return
        for sequence in sequences:
            self.preempt(sequence)

    def _suspend(self, sequence: Sequence, *, keep: bool) -> None:
        self._leave(sequence, keep=keep)
        self.waiting.unhold(sequence.key)
        sequence.proposers.preempt()

    def _end(self, sequence: Sequence, outcome: str, *, keep: bool) -> None:
        self._leave(sequence, keep=keep)
        self._token_counters.leave(sequence.request.owner)
        sequence.proposers.end()
        if sequence.admitted is not None:
            self._speculative_decoding.log_stats(sequence.proposers)
        self._counters.finished[outcome] += 1
        longest = max(self._counters.longest_sequence, sequence.prompt_length + sequence.emitted)
        self._counters.longest_sequence = longest

    def _leave(self, sequence: Sequence, *, keep: bool) -> None:
        self.slots.leave(sequence)
        self.running.remove(sequence)
        self.waiting.discard(sequence)
        if sequence.allocation is not None:
            self._kv.release(sequence.seq, keep=keep and sequence.request.cache)
            sequence.stop()
