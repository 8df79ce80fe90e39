"""Rows of alternatives in unified KV: a second sequence id shares the cells before an alternative.

A row attends to the cells of its first sequence id. The row of an alternative has the id of a *branch*, which shares
with its sequence the cells before that position, and not the row of the token that the alternative replaces. A branch
keeps its cells from step to step, as sharing those of a whole sequence takes 0.1 ms for 1000 cells.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as native

from engine.backend import HostWork, Logits, NativeFault, no_host_work
from engine.batch import Batch
from engine.llama.context import LlamaContext


class Branches:
    """The branches of the sequences of one context with unified KV."""

    def __init__(self, memory: Any, batch: Batch, native_batch: Any, ids: range) -> None:
        """`ids` are the sequence ids of the branches, and `native_batch` is the batch of the library over `batch`."""
        self._memory = memory
        self._batch = batch
        self._free = [*ids]
        self._branches: dict[int, int] = {}  # by sequence, the least recently used first
        self._pairs = np.zeros((batch.capacity, 2), np.int32)
        self._counts, self._ids = native_batch.n_seq_id, native_batch.seq_id

    def fill(self) -> None:
        """Writes the ids of the rows of alternatives, and of the rows to which they attend, into the native batch."""
        in_use = {int(self._batch.seq[each.row]) for each in self._batch.alternatives}
        for each in self._batch.alternatives:
            seq = int(self._batch.seq[each.row])
            branch = self._branch(seq, in_use)
            known = native.llama_memory_seq_pos_max(self._memory, branch) + 1
            if known < (start := int(self._batch.pos[each.first])):
                native.llama_memory_seq_cp(self._memory, seq, branch, known, start)
            for row in range(each.first, each.end):
                self._set_ids(row, seq, branch)
            self._set_ids(each.row, branch)

    def restore(self) -> None:
        """Gives every row of the native batch the one id of its sequence again."""
        for each in self._batch.alternatives:
            for row in (*range(each.first, each.end), each.row):
                self._set_pointer(row, self._batch.seq.ctypes.data + 4 * row, 1)

    def _set_ids(self, row: int, *ids: int) -> None:
        self._pairs[row, : len(ids)] = ids
        self._set_pointer(row, self._pairs.ctypes.data + 8 * row, len(ids))

    def _set_pointer(self, row: int, address: int, count: int) -> None:
        self._ids[row] = ctypes.cast(address, ctypes.POINTER(native.llama_seq_id))
        self._counts[row] = count

    def _branch(self, seq: int, in_use: set[int]) -> int:
        """Returns the branch of `seq`, which may be that of a sequence without an alternative in this batch."""
        branch = self._branches.pop(seq, -1)
        if branch < 0:
            if not self._free:
                self.drop(next(other for other in self._branches if other not in in_use), -1)
            branch = self._free.pop()
        self._branches[seq] = branch
        return branch

    def adopt(self, seq: int, position: int) -> None:
        """Replaces the cells of `seq` from `position` on by the one that its branch has at that position."""
        native.llama_memory_seq_rm(self._memory, seq, position, -1)
        native.llama_memory_seq_cp(self._memory, self._branches[seq], seq, position, position + 1)

    def drop(self, seq: int, start: int) -> None:
        """Drops the positions from `start` on of the branch of `seq`, so that no cell outlives its sequence. Drops the
        whole branch if `start` is not positive."""
        branch = self._branches.get(seq, -1)
        if branch < 0:
            return
        native.llama_memory_seq_rm(self._memory, branch, start, -1)
        if start <= 0:
            self._free.append(self._branches.pop(seq))

    def clear(self) -> None:
        """Frees the ids of all branches, after the library has freed their cells."""
        self._free += self._branches.values()
        self._branches.clear()


class BranchingLlamaContext(LlamaContext):
    """A context with unified KV, of a model whose layers all attend to the whole context. Implements
    `engine.branching.BranchingContext`."""

    _branches: Branches | None = None
    """None while the context is opened."""

    def __init__(self, model: Any, params: Any, branches: int, *, shifting: bool = False) -> None:
        """The last ids, but for the spare one, are those of `branches` branches. See `LlamaContext`."""
        super().__init__(model, params, partial=True, window=0, shifting=shifting)
        self.alternatives = branches
        self.sequences -= branches
        ids = range(self.sequences, self._spare)
        self._branches = Branches(self._memory, self.batch, self._native_batch, ids)

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """See `Decoder.decode`."""
        if self._branches is None or not self.batch.alternatives:
            return super().decode(host_work)
        if (count := len(self.batch.alternatives)) > self.alternatives:
            raise NativeFault(f"a batch has {count} alternatives; at most {self.alternatives} are possible")
        self._branches.fill()
        try:
            return super().decode(host_work)
        finally:
            self._branches.restore()

    def adopt(self, seq: int, length: int) -> None:
        """See `BranchingContext.adopt`."""
        self._check_ids(seq)
        assert self._branches is not None, "the context is open"
        self._branches.adopt(seq, length)

    def drop(self, seq: int, start: int = -1) -> bool:
        """See `Decoder.drop`. Drops the same positions of the sequence's branch."""
        if self._branches is not None:
            self._branches.drop(seq, start)
        return super().drop(seq, start)

    def clear(self) -> None:
        """Frees every cell."""
        if self._branches is not None:
            self._branches.clear()
        super().clear()
