"""The running sequences, and the inputs that the scheduler and the draft planner take from them."""

from __future__ import annotations

import time
from collections import Counter, abc
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from engine.adapters import AdapterSet, AdapterTurns
from engine.fairness import Claim, TokenCounters, prefill_share
from engine.kv import Allocation, KVCache
from engine.pace import PrefillWait, SequenceRows, StepCost
from engine.rollback import with_rollbacks
from engine.scheduler import ScheduledRows, SequenceView
from engine.sequence import Sequence
from engine.speculate import DraftCandidate, SequenceProposers


class PlacedRows(NamedTuple):
    """A sequence's rows in the batch of a step."""

    rows: SequenceRows
    part: ScheduledRows
    sequence: Sequence
    decodes: bool
    """True if the sequence decodes, False if it is prefilled."""


class Running(dict[int, Sequence]):
    """The sequences with an allocation in `kv`, by key, in the order of their starts. Belongs to the engine thread."""

    def __init__(self, kv: KVCache, counters: TokenCounters) -> None:
        super().__init__()
        self._kv = kv
        self._counters = counters
        self._turns = AdapterTurns()
        self.adapters: AdapterSet = ()
        """The LoRA adapters of the next step. Sequences with other adapters are paused."""
        self._loading: list[Sequence] = []  # sequences with blocks to load, maybe after a part of the prefill
        self._drafting: list[Sequence] = []  # sequences with proposers
        self._adapter_sets = Counter[AdapterSet]()

    def add(self, sequence: Sequence) -> None:
        """Adds a sequence that has an allocation."""
        self[sequence.key] = sequence
        self._adapter_sets[sequence.adapters] += 1
        if self._kv.has_blocks_to_load(sequence.seq):
            self._loading.append(sequence)
        if sequence.proposers.types:
            self._drafting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence. No effect on one that does not run."""
        if self.pop(sequence.key, None) is None:
            return
        self._adapter_sets[sequence.adapters] -= 1
        self._adapter_sets += Counter()  # drops the sets without sequences
        self._loading = [each for each in self._loading if each is not sequence]
        self._drafting = [each for each in self._drafting if each is not sequence]

    @property
    def may_draft(self) -> bool:
        """True if any sequence has proposers."""
        return bool(self._drafting)

    def loading(self) -> list[Sequence]:
        """Returns the sequences of which a block must be loaded before the next token is computed."""
        if not self._loading:
            return []
        self._loading = [sequence for sequence in self._loading if self._kv.has_blocks_to_load(sequence.seq)]
        return [sequence for sequence in self._loading if self._kv.loading(sequence.seq)]

    def choose_adapters(self) -> None:
        """Sets `adapters` to those of a sequence that has rows. Has the same result until the next step."""
        if len(self._adapter_sets) == 1:
            (self.adapters,) = self._adapter_sets
            return
        has_rows = (each for each in self.values() if not (self._kv.loading(each.seq) or each.awaits_encoding))
        self.adapters = self._turns.choose({sequence.adapters: None for sequence in has_rows})

    def count_step(self, seconds: float) -> None:
        """Counts a step of `adapters`, after which other adapters may be chosen."""
        self._turns.count_step(seconds)

    @property
    def active(self) -> list[Sequence]:
        """The sequences that have the adapters of the next step, in the order of their starts."""
        if len(self._adapter_sets) == 1:
            return [*self.values()]
        return [sequence for sequence in self.values() if sequence.adapters == self.adapters]

    def decode_drafts(self) -> dict[int, int] | None:
        """Returns the number of draft tokens of each sequence by key, if all sequences decode and none is paused; else
        None."""
        if len(self._adapter_sets) != 1:
            return None
        drafts: dict[int, int] = {}
        for sequence in self.values():
            if len(sequence.tokens) - sequence.computed != 1:
                return None
            drafts[sequence.key] = len(sequence.draft)
        return drafts

    def views(self, sequences: abc.Iterable[Sequence] | None = None) -> list[SequenceView]:
        """Returns the scheduler's input for `sequences`, by default all, in the order of their starts."""
        scarce = self._kv.free_cells + self._kv.evictable_cells <= len(self)  # a sequence may have to be preempted
        now = time.perf_counter()
        return [self._view(each, scarce, now) for each in (self.values() if sequences is None else sequences)]

    def _view(self, sequence: Sequence, scarce: bool, now: float) -> SequenceView:
        known = len(sequence.tokens)
        return SequenceView(
            sequence.key,
            known,
            sequence.computed,
            len(sequence.draft),
            exclusive=self._kv.exclusive(sequence.seq) if scarce else 0,
            blocked=sequence.num_uncomputed - self.num_ready(sequence),
            waited=now - sequence.submitted,
            paused=sequence.adapters != self.adapters,
            priority=sequence.request.priority,
            served=self._counters[sequence.request.owner],
            due=sequence.due,
        )

    def num_ready(self, sequence: Sequence) -> int:
        """Returns the number of uncomputed tokens before the next block to load, save point, image or sound."""
        ready = self._kv.ready(sequence.seq, len(sequence.tokens))
        return min(ready, sequence.num_ready) if sequence.request.media else ready

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
            if len(sequence.tokens) - sequence.computed == 1
        )

    def change_id(self, old: int, new: int) -> None:
        """Gives the sequence with the id `old` the allocation of the id `new`, to which the KV cache moved it."""
        sequence = next(sequence for sequence in self.values() if sequence.seq == old)
        sequence.change_allocation(Allocation(new, sequence.computed))

    def prefill_waits(self) -> list[PrefillWait]:
        """Returns age and length of each active prompt without a first token."""
        now = time.perf_counter()
        return [
            PrefillWait(now - sequence.prefill_due, sequence.num_uncached)
            for sequence in self.active
            if sequence.first_token is None
        ]

    def feed_proposers(self, tokens: int) -> list[SequenceProposers]:
        """Feeds up to `tokens` new tokens in all to the proposers. Returns the proposers of the sequences that are
        being prefilled."""
        for sequence in self._drafting:
            tokens -= sequence.proposers.feed(sequence.history, tokens)
        return [sequence.proposers for sequence in self._drafting if sequence.num_uncomputed > 1]

    def draft_candidates(self, max_tokens: int) -> dict[int, DraftCandidate]:
        """Returns, by key, the active decoding sequences for which the next step can verify a draft of up to
        `max_tokens` tokens."""
        return {
            each.key: DraftCandidate(each.proposers, min(room, max_tokens), room, each.seq, _may_branch(each))
            for each in (self._drafting if max_tokens > 0 else ())
            if len(each.tokens) - each.computed == 1
            and each.adapters == self.adapters
            and each.proposers.can_draft(each.history)
            and not self._kv.saves_next(each.seq)
            and (room := each.draft_room()) > 0
        }

    def placed(self, part: ScheduledRows) -> PlacedRows:
        """Returns `part` with its sequence."""
        sequence = self[part.key]
        rows = SequenceRows(sequence.seq, part.tokens + part.drafts, sequence.computed)
        return PlacedRows(rows, part, sequence, len(sequence.tokens) - sequence.computed == 1)

    def ordered(
        self, rows: abc.Sequence[ScheduledRows], cost: StepCost, *, separate_prompts: bool = False
    ) -> list[PlacedRows]:
        """Returns `rows` in the batch order that makes the step cheapest with per-slot KV, or with recurrent states;
        for these with shorter drafts if the sequences could else not be rolled back.

        llama.cpp puts rows of consecutive ascending sequence ids into one pass. So ids ascend within the rows of a
        pass, and the passes stand in the order of descending ids, so that llama.cpp does not merge them. With
        `separate_prompts` each prompt has a pass of its own.
        """
        if cost.layout.recurrent:
            shortened = with_rollbacks(rows, {part.key: self[part.key].seq for part in rows}, cost.layout)
            return [self.placed(part) for part in shortened]
        groups: list[list[PlacedRows]] = [[]]
        placed = sorted(map(self.placed, rows), key=itemgetter(0))
        if len(placed) == 1:
            return placed
        if separate_prompts:
            for each in placed:
                if each.decodes:
                    groups[-1].append(each)
                else:
                    groups += [[each], []]
        else:
            groups = [placed]
        passes = [group[start:end] for group in groups if group for start, end in pairwise((0, *_cuts(group, cost)))]
        return passes[0] if len(passes) == 1 else [each for pass_rows in reversed(passes) for each in pass_rows]


def _cuts(group: abc.Sequence[PlacedRows], cost: StepCost) -> list[int]:
    return cost.cuts([each.rows for each in group]) if len(group) > 1 else [len(group)]


def _may_branch(sequence: Sequence) -> bool:
    """Returns True if a draft of `sequence` may have an alternative: `pick_rows` picks its tokens, costs decide about
    its drafts, and its rows have consecutive positions, without images."""
    return sequence.row_params is not None and not sequence.proposers.fixed and not sequence.request.media
