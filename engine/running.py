"""The running sequences, and the inputs that the scheduler and the draft planner take from them."""

from __future__ import annotations

import time
from collections import abc
from itertools import pairwise

from engine.adapters import AdapterSet, AdapterTurns
from engine.fairness import Claim, TokenCounters, prefill_share
from engine.kv import Allocation, KVCache
from engine.pace import PrefillWait, SequenceRows, StepCost
from engine.rollback import with_rollbacks
from engine.scheduler import ScheduledRows, SequenceView
from engine.sequence import Sequence
from engine.speculate import DraftCandidate, SequenceProposers


class Running(dict[int, Sequence]):
    """The sequences with an allocation in `kv`, by key, in the order of their starts. Belongs to the engine thread."""

    def __init__(self, kv: KVCache, counters: TokenCounters) -> None:
        super().__init__()
        self._kv = kv
        self._counters = counters
        self._turns = AdapterTurns()
        self.adapters: AdapterSet = ()
        """The LoRA adapters of the next step. Sequences with other adapters are paused."""

    def choose_adapters(self) -> None:
        """Sets `adapters` to those of a sequence that has rows. Has the same result until the next step."""
        has_rows = (sequence for sequence in self.values() if not self._kv.loading(sequence.seq))
        self.adapters = self._turns.choose({sequence.adapters: None for sequence in has_rows})

    def count_step(self, seconds: float) -> None:
        """Counts a step of `adapters`, after which other adapters may be chosen."""
        self._turns.count_step(seconds)

    @property
    def active(self) -> list[Sequence]:
        """The sequences that have the adapters of the next step, in the order of their starts."""
        return [sequence for sequence in self.values() if sequence.adapters == self.adapters]

    def views(self) -> list[SequenceView]:
        """Returns the scheduler's input, in the order of the sequences' starts."""
        scarce = self._kv.free_cells + self._kv.evictable_cells <= len(self)  # a sequence may have to be preempted
        now = time.perf_counter()
        return [self._view(sequence, scarce, now) for sequence in self.values()]

    def _view(self, sequence: Sequence, scarce: bool, now: float) -> SequenceView:
        known = len(sequence.tokens)
        return SequenceView(
            sequence.key,
            known,
            sequence.computed,
            len(sequence.draft),
            exclusive=self._kv.exclusive(sequence.seq) if scarce else 0,
            blocked=sequence.num_uncomputed - self._kv.ready(sequence.seq, known),
            waited=now - sequence.submitted,
            paused=sequence.adapters != self.adapters,
            priority=sequence.request.priority,
            served=self._counters[sequence.request.owner],
        )

    def claims(self) -> list[Claim]:
        """Returns the claims of the sequences to their slots, in the order of their starts."""
        return [sequence.claim for sequence in self.values()]

    def prefill_share(self) -> float:
        """Returns the seconds of prefill for each second of decoding that the owners of active sequences need."""
        owners: tuple[dict[str, float], dict[str, float]] = {}, {}
        for sequence in self.active:
            owners[sequence.num_uncomputed == 1][sequence.request.owner] = sequence.request.weight
        return prefill_share(*owners)

    def decoding(self) -> list[SequenceRows]:
        """Returns the rows of the active decoding sequences in the next step, drafts included, in the order of their
        ids."""
        return sorted(
            SequenceRows(sequence.seq, 1 + len(sequence.draft), sequence.computed)
            for sequence in self.active
            if sequence.num_uncomputed == 1
        )

    def change_id(self, old: int, new: int) -> None:
        """Gives the sequence with the id `old` the allocation of the id `new`, to which the KV cache moved it."""
        sequence = next(sequence for sequence in self.values() if sequence.seq == old)
        sequence.allocation = Allocation(new, sequence.computed)

    def prefill_waits(self) -> list[PrefillWait]:
        """Returns age and length of each active prompt without a first token."""
        now = time.perf_counter()
        return [
            PrefillWait(now - sequence.submitted, sequence.num_uncached)
            for sequence in self.active
            if sequence.first_token is None
        ]

    def feed_proposers(self, tokens: int) -> list[SequenceProposers]:
        """Feeds up to `tokens` new tokens in all to the proposers. Returns the proposers of the sequences that are
        being prefilled."""
        for sequence in self.values():
            tokens -= sequence.proposers.feed(sequence.tokens, tokens)
        return [sequence.proposers for sequence in self.values() if sequence.num_uncomputed > 1]

    def draft_candidates(self, max_tokens: int) -> dict[int, DraftCandidate]:
        """Returns, by key, the active decoding sequences for which the next step can verify a draft of up to
        `max_tokens` tokens."""
        return {
            sequence.key: DraftCandidate(sequence.proposers, limit, sequence.draft_room(), sequence.seq)
            for sequence in self.active
            if sequence.num_uncomputed == 1
            and sequence.proposers.can_draft(sequence.tokens)
            and not self._kv.saves_next(sequence.seq)
            and (limit := min(sequence.draft_room(), max_tokens)) > 0
        }

    def ordered(
        self, rows: abc.Sequence[ScheduledRows], cost: StepCost, *, separate_prompts: bool = False
    ) -> list[ScheduledRows]:
        """Returns `rows` in the batch order that makes the step cheapest with per-slot KV, or with recurrent states;
        for these with shorter drafts if the sequences could else not be rolled back.

        llama.cpp puts rows of consecutive ascending sequence ids into one pass. So ids ascend within the rows of a
        pass, and the passes stand in the order of descending ids, so that llama.cpp does not merge them. With
        `separate_prompts` each prompt has a pass of its own.
        """
        if cost.layout.recurrent:
            return with_rollbacks(rows, {part.key: self[part.key].seq for part in rows}, cost.layout)
        groups: list[list[ScheduledRows]] = [[]]
        for part in sorted(rows, key=lambda part: self[part.key].seq):
            if separate_prompts and self[part.key].num_uncomputed > 1:
                groups += [[part], []]
            else:
                groups[-1].append(part)
        passes = [
            group[start:end] for group in groups if group for start, end in pairwise((0, *self._cuts(group, cost)))
        ]
        return [part for pass_rows in reversed(passes) for part in pass_rows]

    def _cuts(self, rows: abc.Sequence[ScheduledRows], cost: StepCost) -> list[int]:
        return cost.cuts(self.sequence_rows(rows)) if len(rows) > 1 else [len(rows)]

    def sequence_rows(self, rows: abc.Iterable[ScheduledRows]) -> list[SequenceRows]:
        """Returns the number of rows of each of `rows`, with its sequence's id and number of computed tokens."""
        return [SequenceRows(self[part.key].seq, part.tokens + part.drafts, self[part.key].computed) for part in rows]

    def split_decoding(
        self, rows: abc.Sequence[ScheduledRows], sequence_rows: abc.Sequence[SequenceRows]
    ) -> tuple[list[SequenceRows], int]:
        """Returns the part of `sequence_rows` that belongs to decoding sequences, and the number of all other rows.
        `sequence_rows` is the result of the method `sequence_rows` for `rows`."""
        parts = zip(rows, sequence_rows, strict=True)
        decoding = [each for part, each in parts if self[part.key].num_uncomputed == 1]
        return decoding, sum(each.rows for each in sequence_rows) - sum(each.rows for each in decoding)
