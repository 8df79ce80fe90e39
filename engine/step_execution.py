"""Executes the plan of a step: fills the batch, decodes it, commits the computed tokens and processes the logits."""

from __future__ import annotations

import time
from array import array
from collections import abc
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from engine import scheduler
from engine.backend import Aborted, Backend, NativeFault, NoFreeCells
from engine.backend_picks import BackendPicks
from engine.contract import EngineFault, ShutDown
from engine.grammar import Masks
from engine.kv import Costs, KVCache
from engine.lifecycle import Lifecycle
from engine.outbox import Outbox
from engine.output_processor import OutputProcessor
from engine.pace import DraftChooser
from engine.running import PlacedRows
from engine.scheduler import ScheduledRows
from engine.speculate import LastStep
from engine.stats import Counters

# Of a series of decodes of the same single rows every fourth is recorded, as recording takes as long as picking a
# token.
_OBSERVE_INTERVAL_STEPS = 4


class _RowCharge(NamedTuple):
    """Expected seconds of one row in a step with `decoding` decoding sequences."""

    decoding: int
    seconds: float


class StepExecution:
    """Executes the steps of one engine. Belongs to the engine thread."""

    def __init__(
        self,
        backend: Backend,
        kv: KVCache,
        lifecycle: Lifecycle,
        outbox: Outbox,
        counters: Counters,
        chooser: DraftChooser,
    ) -> None:
        self._context = backend.context
        self._kv = kv
        self._lifecycle = lifecycle
        self._running = lifecycle.running
        self._counters = counters
        self._chooser = chooser
        self._cost = chooser.cost
        self._masks = Masks(backend.vocab.size, overlapped=backend.info.offloaded)
        self._backend_picks = BackendPicks(self._context.backend_sampling, len(lifecycle.slots))
        self._outputs = OutputProcessor(kv, lifecycle, outbox, counters, self._masks, chooser, self._backend_picks)
        self._charged = _RowCharge(0, 0.0)
        self._rows: list[tuple[int, int]] = []  # id and number of rows of each sequence in the last decode
        self._passes = 0  # of the last decode
        self._repeats = 0  # further decodes with the same `_rows`
        self.last_step = LastStep(0.0)
        """Measurements of the last decode."""

    def close(self) -> None:
        """Ends the computation of grammar masks. No method may be called afterwards."""
        self._masks.close()

    def execute(self, rows: abc.Sequence[ScheduledRows]) -> None:
        """Decodes `rows`, or fewer if there are too few cells, and processes the logits.

        The count of free cells is exact for attention to all tokens; other models may have fewer. Then all idle
        prefixes are evicted and the step is repeated with fewer rows. A single row that does not fit is rejected."""
        switched = self._context.set_adapters(self._running.adapters)
        while True:
            self._kv.evict(sum(part.tokens + part.drafts for part in rows))
            placed = self._running.ordered(rows, self._cost, separate_prompts=self._context.prefill_rows > 1)
            firsts, cells = self._fill(placed), self._kv.used_cells
            self._count_passes(placed)
            begun = time.perf_counter()
            try:
                switched |= self._backend_picks.prepare(placed)
                logits = self._context.decode(partial(self.commit, placed))
            except NoFreeCells:
                self._kv.evict(self._context.cells)
                if fewer := scheduler.reduce_rows(rows):
                    rows = fewer
                    continue
                self._lifecycle.reject_rows([each.sequence for each in placed])
            except (Aborted, NativeFault) as error:
                self._lifecycle.fail_all(partial(step_fault, error), [each.sequence for each in placed])
            else:
                seconds = time.perf_counter() - begun
                prompt_rows = sum([each.rows.rows for each in placed if not each.decodes])
                self.last_step = LastStep(seconds, prompt_rows)
                self._running.count_step(seconds)
                if not switched:  # the first decode with other adapters or counts takes longer
                    self._observe(placed, prompt_rows, cells, seconds)
                self._counters.record_decode(len(rows), self._passes, seconds)
                self._outputs.process(placed, firsts, logits)
            return

    def _count_passes(self, placed: abc.Sequence[PlacedRows]) -> None:
        """Counts the passes of the next decode, and the decodes before it with the same rows."""
        rows = [each.rows[:2] for each in placed]
        self._repeats = self._repeats + 1 if rows == self._rows else 0
        if not self._repeats:
            self._rows, self._passes = rows, len(self._cost.layout.passes([each.rows for each in placed]))

    def _observe(self, placed: abc.Sequence[PlacedRows], prompt_rows: int, cells: int, seconds: float) -> None:
        """Records the decode for the cost model, and sets the costs of the KV cache. In a series of decodes of the same
        single rows, one in `_OBSERVE_INTERVAL_STEPS` is recorded."""
        rows, repeats = self._context.batch.rows, 1
        if not prompt_rows and rows == len(placed) and self._repeats:
            if self._repeats % _OBSERVE_INTERVAL_STEPS:
                return
            repeats = _OBSERVE_INTERVAL_STEPS
        decoding = [each.rows for each in placed if each.decodes]
        self._chooser.observe_step(decoding, prompt_rows, cells, seconds, repeats)
        # The many rows of a prompt are in few of the steps for which a cell stays resident, so a prompt counts as one.
        rows += len(placed) - len(decoding) - prompt_rows
        cost = self._cost
        self._kv.set_costs(Costs(cost.prompt_row, resident=cost.resident_cell(rows), extra_pass=cost.extra_pass))

    def _fill(self, rows: abc.Sequence[PlacedRows]) -> abc.Sequence[int]:
        """Writes the batch and starts computing the grammar masks. Returns, for each of `rows`, the index of its first
        row of logits."""
        batch = self._context.batch
        grammars = [each for each in rows if each.sequence.matcher is not None]
        self._masks.begin([mask for each in grammars if (mask := each.sequence.mask_request(each.part)) is not None])
        tokens, outputs = array("i"), []
        alternatives: list[tuple[int, int, int]] = []
        for _, part, sequence, _ in rows:
            first, end = len(tokens), sequence.computed + part.tokens
            tokens.extend(sequence.tokens[sequence.computed : end])
            if part.drafts:
                tokens.extend(array("i", sequence.draft[: part.drafts]))
                if sequence.has_alternative(part.drafts):
                    alternatives.append((len(tokens) - 1, end + sequence.alternative_place, first))
            outputs.append(part.drafts + 1 if end == len(sequence.tokens) else 0)
        batch.fill([each.rows for each in rows], tokens, outputs)
        for row in alternatives:
            batch.make_alternative(*row)
        return [0, *accumulate(outputs[:-1])]

    def commit(self, rows: abc.Sequence[PlacedRows]) -> None:
        """Counts the known tokens of `rows` as computed, and charges them to their owners. A GPU may still be computing
        them."""
        row_tokens, waiting = self._row_tokens(sum([each.decodes for each in rows])), self._lifecycle.waiting
        charges: dict[str, float] = {}
        for _, part, sequence, decodes in rows:
            if decodes or sequence.first_token is None:  # else recomputed after a preemption, which costs nothing
                request, tokens = sequence.request, row_tokens if decodes else part.tokens
                charges[request.owner] = charges.get(request.owner, 0.0) + tokens / request.weight
            self._kv.commit(sequence.seq, sequence.commit(part.tokens))
            if sequence.computed < len(sequence.tokens):
                continue
            if sequence.cached is None and (cached := sequence.end_prefill()):
                self._counters.cached_tokens += cached
                self._counters.hits += 1
            if waiting.has_in_flight:
                waiting.remove_in_flight(sequence)  # no effect after the step that completes the prefill
        self._lifecycle.charge(charges)
        self._kv.count_step()

    def _row_tokens(self, decoding: int) -> float:
        """Returns the number of tokens of a prompt that take as long as the row of one of `decoding` sequences."""
        if decoding != self._charged.decoding:  # the estimate takes as long as charging all sequences
            self._charged = _RowCharge(decoding, self._cost.even_seconds(decoding) / max(1, decoding))
        row = self._cost.prompt_row
        return max(1.0, self._charged.seconds / row) if row else 1.0


def step_fault(error: Aborted | NativeFault) -> EngineFault:
    """Returns the error of the requests of a step that was stopped or has failed."""
    return ShutDown() if isinstance(error, Aborted) else EngineFault(f"the step failed: {error}")
