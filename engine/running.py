"""The running sequences, and what policies see of them."""

from __future__ import annotations

import time
from collections import abc
from itertools import pairwise
from math import inf

from engine.kv import KVCache
from engine.pace import SequenceRows, StepCost
from engine.scheduler import Rows, SequenceView
from engine.sequence import Sequence
from engine.speculate import Drafter, Wish


class Running(dict[int, Sequence]):
    """The sequences with an allocation in `kv` by key, oldest first. Belongs to the engine thread."""

    def __init__(self, kv: KVCache) -> None:
        super().__init__()
        self._kv = kv

    def views(self) -> list[SequenceView]:
        """What the scheduler sees of them."""
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
        """The rows of the decoding sequences in the next step, drafts included, in the order of their ids."""
        return sorted(
            SequenceRows(sequence.seq, 1 + len(sequence.draft), sequence.computed)
            for sequence in self.values()
            if sequence.num_uncomputed == 1
        )

    @property
    def waited(self) -> float:
        """Seconds that the oldest request without a first token has waited; 0 if there is none."""
        begun = (sequence.submitted for sequence in self.values() if sequence.first_token is None)
        return max(0.0, time.perf_counter() - min(begun, default=inf))

    def learn(self, tokens: int) -> list[Drafter]:
        """Feeds up to `tokens` new tokens to the proposers. Returns those of the sequences that are being prefilled."""
        for sequence in self.values():
            tokens -= sequence.drafter.learn(sequence.tokens, tokens)
        return [sequence.drafter for sequence in self.values() if sequence.num_uncomputed > 1]

    def wishes(self, most: int) -> dict[int, Wish]:
        """By key the decoding sequences that could have a draft of up to `most` tokens verified in the next step."""
        return {
            sequence.key: Wish(sequence.drafter, limit, sequence.room(), sequence.seq)
            for sequence in self.values()
            if sequence.num_uncomputed == 1
            and sequence.drafter.knows(sequence.tokens)
            and (limit := min(sequence.room(), most)) > 0
        }

    def ordered(self, rows: abc.Sequence[Rows], cost: StepCost, *, apart: bool = False) -> list[Rows]:
        """`rows` in the order that decides which of them share a pass with per-slot KV: a pass takes the next higher id
        wherever it stands in the batch. So ids ascend within a part, and parts descend.

        Parts are those that make the step cheapest. With `apart` each prompt is a part of its own.
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
        """`rows` by sequence id."""
        return [SequenceRows(self[part.key].seq, part.tokens + part.drafts, self[part.key].computed) for part in rows]

    def kinds(self, rows: abc.Sequence[Rows]) -> tuple[list[SequenceRows], int]:
        """Of `rows`, those of decoding sequences, in their order, and the number of the others, which are rows of
        prompts."""
        decoding = self.sequence_rows(part for part in rows if self[part.key].num_uncomputed == 1)
        total = sum(part.tokens + part.drafts for part in rows)
        return decoding, total - sum(part.rows for part in decoding)
