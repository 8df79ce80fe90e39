"""Processes the logits of a step: emits tokens, commits the cells of accepted drafts, and ends sequences."""

from __future__ import annotations

import logging
import time
from collections import abc

from engine.backend import Logits, NativeFault
from engine.contract import REQUEST_FAILED, EngineFault, FinishReason
from engine.grammar import Masks
from engine.kv import KVCache
from engine.lifecycle import Lifecycle
from engine.outbox import Outbox
from engine.pace import DraftChooser
from engine.sampling import Peak, row_peaks
from engine.scheduler import ScheduledRows
from engine.sequence import Sequence
from engine.stats import Counters
from engine.verify import verify

log = logging.getLogger("paceline.engine")


class OutputProcessor:
    """Turns the rows of logits of each step into tokens of the running sequences. Belongs to the engine thread."""

    def __init__(
        self,
        kv: KVCache,
        lifecycle: Lifecycle,
        outbox: Outbox,
        counters: Counters,
        masks: Masks,
        chooser: DraftChooser,
    ) -> None:
        self._kv = kv
        self._lifecycle = lifecycle
        self._outbox = outbox
        self._counters = counters
        self._masks = masks
        self._chooser = chooser

    def process(self, rows: abc.Iterable[ScheduledRows], firsts: abc.Iterable[int], logits: Logits) -> None:
        """Processes `logits`, [rows with logits, vocabulary], of a step. `firsts` has, for each of `rows`, the index
        of its first row of logits.

        An exception other than a native fault ends only the request that caused it. Raises NativeFault.
        """
        now, peaks = time.perf_counter(), row_peaks(logits)
        for part, first in zip(rows, firsts, strict=True):
            sequence = self._lifecycle.running[part.key]
            if (progress := sequence.prefill_progress) is not None:
                self._outbox.prefill_progress(sequence.key, progress)
            if sequence.num_uncomputed:
                continue
            end = first + part.drafts + 1
            try:
                self._emit(sequence, logits[first:end], peaks[first:end], now)
            except NativeFault:
                raise
            except Exception:  # the other sequences go on
                log.exception("request %s failed", sequence.request.id)
                self._lifecycle.fail(sequence, EngineFault(REQUEST_FAILED))

    def _emit(self, sequence: Sequence, rows: Logits, peaks: abc.Sequence[Peak], now: float) -> None:
        """Samples the next tokens of `sequence`, commits the cells of accepted draft tokens, and rolls back the cells
        of rejected ones."""
        if sequence.ends_after_prefill:
            self._lifecycle.finish(sequence, FinishReason.LENGTH)
            return
        drafts, draft = len(peaks) - 1, sequence.draft
        result = verify(sequence, draft[:drafts], rows, peaks, self._masks.of(sequence.key))
        if result.ids:
            gap = sequence.mark_emission(now)
            self._counters.record_emission(len(result.ids), gap, now - sequence.submitted)
            if gap is None:
                self._counters.record_prefill(sequence.num_uncached, now - (sequence.admitted or now))
        if result.streamed:
            self._outbox.tokens(sequence.key, result.streamed, result.logprobs, result.origins)
        if result.error is not None:
            self._lifecycle.fail(sequence, result.error)
            return
        assert result.ids, "each verification without an error emits a token"
        intact = self._keep_accepted(sequence, drafts, result.accepted)
        verified = self._chooser.assess(drafts, result.accepted) if drafts else None
        sequence.proposers.observe(sequence.tokens, result.ids, verified)
        sequence.draft = ()
        if result.reason is not None:
            self._lifecycle.finish(sequence, result.reason, keep=intact)
        elif sequence.needs_shift:
            self._lifecycle.preempt(sequence)
            sequence.proposers.shift(*sequence.shift())
        elif not intact:
            self._lifecycle.preempt(sequence, keep=False)

    def _keep_accepted(self, sequence: Sequence, drafts: int, accepted: int) -> bool:
        """Commits the first `accepted` of `drafts` draft tokens in cells, and rolls back the other draft tokens.

        Returns False if the sequence cannot be continued: a sliding window lacks cells after the rollback, or the
        context has refused it.
        """
        if not drafts:
            return True
        self._kv.commit(sequence.seq, sequence.draft[:accepted])
        sequence.computed += accepted
        self._counters.drafted_tokens += drafts
        self._counters.accepted_tokens += accepted
        return accepted == drafts or self._kv.rollback(sequence.seq)
