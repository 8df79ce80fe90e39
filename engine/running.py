"""The running sequences, and their views for the policies."""

from __future__ import annotations

import time
from collections import abc
from itertools import pairwise
from math import inf

from engine.kv import KVCache
from engine.pace import SequenceRows, StepCost
from engine.scheduler import Rows, SequenceView
from engine.sequence import Sequence
from engine.speculate import DraftCandidate, SequenceProposers


class Running(dict[int, Sequence]):
    """The sequences with an allocation in `kv`, by key, oldest first. Belongs to the engine thread."""

    def __init__(self, kv: KVCache) -> None:
        super().__init__()
        self._kv = kv

    def views(self) -> list[SequenceView]:
        """Returns the scheduler's input, oldest sequence first."""
        tight = self._kv.free + self._kv.evictable <= len(self)  # a sequence may have to be preempted
        now = time.perf_counter()
        return [self._view(sequence, tight, now) for sequence in self.values()]

    def _view(self, sequence: Sequence, tight: bool, now: float) -> SequenceView:
        known = len(sequence.tokens)
        return SequenceView(
            sequence.key,
            known,
            sequence.computed,
            len(sequence.draft),
            exclusive=self._kv.exclusive(sequence.seq) if tight else 0,
            blocked=sequence.num_uncomputed - self._kv.ready(sequence.seq, known),
            waited=now - sequence.submitted,
        )

    def decoding(self) -> list[SequenceRows]:
        """Returns the rows of the decoding sequences in the next step, drafts included, in the order of their ids."""
        return sorted(
            SequenceRows(sequence.seq, 1 + len(sequence.draft), sequence.computed)
            for sequence in self.values()
            if sequence.num_uncomputed == 1
        )

    @property
    def waited(self) -> float:
        """Age in seconds of the oldest request without a first token; 0 if there is none."""
        begun = (sequence.submitted for sequence in self.values() if sequence.first_token is None)
        return max(0.0, time.perf_counter() - min(begun, default=inf))

    def feed_proposers(self, tokens: int) -> list[SequenceProposers]:
        """Feeds up to `tokens` new tokens to the proposers. Returns those of the sequences that are being prefilled."""
        for sequence in self.values():
            tokens -= sequence.proposers.feed(sequence.tokens, tokens)
        return [sequence.proposers for sequence in self.values() if sequence.num_uncomputed > 1]

    def draft_candidates(self, most: int) -> dict[int, DraftCandidate]:
        """Returns by key the decoding sequences for which the next step could verify a draft of up to `most` tokens."""
        return {
            sequence.key: DraftCandidate(sequence.proposers, limit, sequence.draft_room(), sequence.seq)
            for sequence in self.values()
            if sequence.num_uncomputed == 1
            and sequence.proposers.can_draft(sequence.tokens)
            and (limit := min(sequence.draft_room(), most)) > 0
        }

    def ordered(self, rows: abc.Sequence[Rows], cost: StepCost, *, apart: bool = False) -> list[Rows]:
        """Returns `rows` in the batch order that makes the step cheapest with per-slot KV.

        A pass takes rows of consecutive ascending ids, wherever they are in the batch. Hence ids ascend within the rows
        of one pass, and passes are ordered by descending ids. With `apart` each prompt has a pass of its own.
        """
        runs: list[list[Rows]] = [[]]
        for part in sorted(rows, key=lambda part: self[part.key].seq):
            if apart and self[part.key].num_uncomputed > 1:
                runs += [[part], []]
            else:
                runs[-1].append(part)
        parts = [run[start:end] for run in runs if run for start, end in pairwise((0, *self._cuts(run, cost)))]
        return [part for run in reversed(parts) for part in run]

    def _cuts(self, rows: abc.Sequence[Rows], cost: StepCost) -> list[int]:
        return cost.cuts(self.sequence_rows(rows)) if len(rows) > 1 else [len(rows)]

    def sequence_rows(self, rows: abc.Iterable[Rows]) -> list[SequenceRows]:
        """Returns `rows` with the sequences' ids and computed tokens."""
        return [SequenceRows(self[part.key].seq, part.tokens + part.drafts, self[part.key].computed) for part in rows]

    def split(self, rows: abc.Sequence[Rows]) -> tuple[list[SequenceRows], int]:
        """Returns those of `rows` that decode, in the same order, and the number of prompt rows among `rows`."""
        decoding = self.sequence_rows(part for part in rows if self[part.key].num_uncomputed == 1)
        total = sum(part.tokens + part.drafts for part in rows)
        return decoding, total - sum(part.rows for part in decoding)
