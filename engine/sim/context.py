"""The context of the simulated model: KV cells and decodes."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from threading import Event
from typing import NamedTuple

import numpy as np

from engine.adapters import AdapterSet
from engine.backend import Aborted, HostWork, Logits, NoFreeCells, Snapshot, State, StatePart, no_host_work
from engine.batch import Batch
from engine.branching import MAX_ALTERNATIVES
from engine.config import EngineConfig
from engine.pace import Layout, SequenceRows
from engine.sim.costs import SimCost
from engine.sim.hashing import Hashes, draws, history_hashes, next_hash
from engine.sim.vocab import END_TOKEN, FIRST_WORD_TOKEN, OUTPUT_WORDS, VOCAB_SIZE

# Logit of the next word. The logit of every other word is 0.
_NEXT_WORD_LOGIT = 40.0
# Logit of tokens that are in no text.
_UNUSED_LOGIT = -1.0
# Mean number of tokens before the end token.
_MEAN_OUTPUT_TOKENS = 256
# Standard deviation of a step's time, relative to the time.
_JITTER = 0.03
# Cells of all slots together if the configuration gives no number.
_DEFAULT_CELLS = 8192
# Minimum number of tokens per slot for per-slot KV, if the configuration gives no layout.
_MIN_SLOT_TOKENS = 1024


class SimSnapshot(NamedTuple):
    """Implements `engine.backend.Snapshot`: the hashes of one sequence."""

    hashes: array[int]

    def cut(self, start: int, end: int) -> State | None:
        """Returns `start` and the hashes of positions from `start` up to `end`; None if the sequence is shorter."""
        if end > len(self.hashes):
            return None
        return np.array([start, *self.hashes[start:end]], np.uint64).view(np.uint8)


class SimContext:
    """Implements `engine.backend.Context`. A cell holds a hash of all tokens up to its position."""

    partial, divisible, shifts = True, True, False
    max_rollback = None
    backend_sampling = None
    prefill_rows = 1
    window = 0

    def __init__(self, config: EngineConfig, cost: SimCost) -> None:
        batch, unified = config.batch, config.model.kv_unified
        self.cells = batch.context or _DEFAULT_CELLS
        self.unified = self.cells < _MIN_SLOT_TOKENS * batch.num_slots if unified is None else unified
        self.sequences = 2 * batch.num_slots + 17 if self.unified else batch.num_slots
        self.sequence_cells = self.cells if self.unified else self.cells // batch.num_slots
        self.outputs = batch.outputs or max(128, 8 * batch.num_slots)
        self.batch = Batch(max(batch.rows, self.outputs))
        self.ubatch = batch.ubatch
        self.flash = cost.flash
        self._layout = Layout(self.unified, self.ubatch, self.flash)
        self._cost = cost
        self._seed = config.sim.seed
        self._random = Random(self._seed)
        self._aborted = Event()
        self._hashes = [array("Q") for _ in range(self.sequences)]
        # Unified KV: the cells of each sequence, the number of sequences that hold each cell, and the unused cells.
        self._pool_cells: list[list[int]] = [[] for _ in range(self.sequences)]
        self._references = [0] * self.cells
        self._free_cells = list(range(self.cells))
        self._rows: Logits = np.zeros((self.outputs, max(VOCAB_SIZE, config.sim.vocabulary)), np.float32)
        self._num_written = 0
        self.alternatives = MAX_ALTERNATIVES if self.unified else 0
        self._alternatives: dict[int, tuple[int, int]] = {}  # hash and cell of the last alternative of each sequence

    # ── decode ──

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """Returns the logits of the batch's rows with `output`, after the simulated time of the step.

        `host_work` is called before the wait. `abort` ends the wait of a running decode, which still returns its
        logits. Raises Aborted after `abort`, and NoFreeCells with the cells unchanged.
        """
        begun = time.perf_counter()
        if self._aborted.is_set():
            raise Aborted
        rows = self._step_rows()
        if self.unified:
            fits = self.batch.rows <= len(self._free_cells)
        else:
            fits = all(count <= self.free_positions(seq) for seq, count, _ in rows)
        if not fits:
            raise NoFreeCells
        seconds = self._cost.seconds(self._layout.shape(rows, self.cells - len(self._free_cells)))
        logits = self._logits(self._append(rows))
        host_work()
        seconds *= max(0.0, 1 + _JITTER * self._random.gauss())
        if (left := begun + seconds - time.perf_counter()) > 0.0:
            self._aborted.wait(left)
        return logits

    def _step_rows(self) -> list[SequenceRows]:
        """Returns the number of rows and the length of each sequence, in the order of the batch."""
        seq, count = self.batch.seq, self.batch.rows
        firsts = [0, *(np.flatnonzero(seq[1:count] != seq[: count - 1]) + 1).tolist()]
        seqs = seq[firsts].tolist()
        assert self.unified or seqs == sorted(seqs), "ids ascend in the batch"
        return [
            SequenceRows(each, end - first, len(self._hashes[each]))
            for each, (first, end) in zip(seqs, pairwise((*firsts, count)), strict=True)
        ]

    def free_positions(self, seq: int) -> int:
        """Returns the number of positions that can be added to `seq`."""
        return len(self._free_cells) if self.unified else self.sequence_cells - self.length(seq)

    def _append(self, rows: Sequence[SequenceRows]) -> Hashes:
        """Allocates cells for `rows`, those of the batch. Returns the hashes of the rows with `output`."""
        batch = self.batch
        lasts = [hashes[-1] if (hashes := self._hashes[seq]) else self._seed for seq, *_ in rows]
        found = history_hashes(batch.token[: batch.rows], lasts, [count for _, count, _ in rows])
        alternatives = {each.row for each in batch.alternatives}
        saved, end = found.tobytes(), 0
        for seq, count, _ in rows:
            first, end = end, end + count
            last = end - 1 if end - 1 in alternatives else end
            self._hashes[seq].frombytes(saved[8 * first : 8 * last])
            if self.unified:
                self._take_cells(seq, last - first)
            if last < end:
                found[last] = self._add_alternative(seq, int(batch.pos[last]), int(batch.token[last]))
        return found[batch.output[: batch.rows] > 0]

    def _take_cells(self, seq: int, count: int) -> None:
        cells = self._free_cells[len(self._free_cells) - count :]
        del self._free_cells[len(self._free_cells) - count :]
        self._pool_cells[seq] += cells
        for cell in cells:
            self._references[cell] = 1

    def _add_alternative(self, seq: int, pos: int, token: int) -> int:
        """Allocates a cell for the alternative of `seq` at `pos`. Returns its hash."""
        hashes = self._hashes[seq]
        history = next_hash(hashes[pos - 1] if pos else self._seed, token)
        self._alternatives[seq] = history, self._free_cells.pop()
        return history

    def _drop_alternative(self, seq: int) -> None:
        if (found := self._alternatives.pop(seq, None)) is not None:
            self._free_cells.append(found[1])

    def adopt(self, seq: int, length: int) -> None:
        """Replaces the positions of `seq` from `length` on by its alternative of the last decode."""
        history, cell = self._alternatives.pop(seq)
        self.cut(seq, length)
        self._hashes[seq].append(history)
        self._free_cells.append(cell)  # `_take_cells` takes it from there
        self._take_cells(seq, 1)

    def _logits(self, hashes: Hashes) -> Logits:
        """Returns a row of logits for each hash; the next call overwrites the rows."""
        rows, indices = self._rows, np.arange(len(hashes))
        # Rows are filled at their first use, as the zeros of unused rows take no memory.
        rows[self._num_written : len(hashes), VOCAB_SIZE:] = _UNUSED_LOGIT
        self._num_written = max(self._num_written, len(hashes))
        # All but the unused tokens, which would take too long: biases and penalties of requests change rows in place.
        rows[: len(hashes), :VOCAB_SIZE] = 0.0
        drawn = draws(hashes)
        rows[indices, FIRST_WORD_TOKEN + drawn % len(OUTPUT_WORDS)] = _NEXT_WORD_LOGIT
        ended = drawn // len(OUTPUT_WORDS) % _MEAN_OUTPUT_TOKENS == 0
        rows[indices[ended], END_TOKEN] = _NEXT_WORD_LOGIT + 1
        return rows[: len(hashes)]

    def abort(self) -> None:
        """Ends the wait of the running decode, and makes every later decode raise Aborted. Any thread may call it."""
        self._aborted.set()

    # ── cells ──

    def set_adapters(self, adapters: AdapterSet) -> bool:
        """Returns False, as the simulated model has no adapters."""
        return False

    def copy(self, source: int, target: int, length: int) -> bool:
        """Copies the first `length` positions of `source` to the empty `target`: the same cells with unified KV, new
        cells with per-slot KV. Always returns True."""
        assert not self._hashes[target], "the target is empty"
        self._hashes[target] = self._hashes[source][:length]
        self._pool_cells[target] = self._pool_cells[source][:length]
        for cell in self._pool_cells[target]:
            self._references[cell] += 1
        return True

    def cut(self, seq: int, length: int) -> bool:
        """Drops the positions of `seq` from `length` on. Always returns True."""
        self._drop_alternative(seq)
        cells = self._pool_cells[seq]
        for cell in cells[length:]:
            self._references[cell] -= 1
            if not self._references[cell]:
                self._free_cells.append(cell)
        del cells[length:], self._hashes[seq][length:]
        return True

    def clear(self) -> None:
        """Frees every cell."""
        for seq in range(self.sequences):
            self.cut(seq, 0)

    def save(self, seq: int) -> Snapshot | None:
        """Returns a snapshot of `seq`."""
        return SimSnapshot(self._hashes[seq][:])

    def load(self, seq: int, parts: Sequence[StatePart]) -> bool:
        """Appends `parts` to `seq`. Returns False, with nothing changed, if there are too few cells or a state lacks
        positions."""
        end = self.length(seq)
        assert not parts or parts[0].start == end, "the first part continues the sequence"
        assert all(one.end == other.start for one, other in pairwise(parts)), "parts are consecutive"
        if sum(part.end - part.start for part in parts) > self.free_positions(seq):
            return False
        loaded: list[int] = []
        for state, start, stop in parts:
            first, *hashes = state.view(np.uint64).tolist()
            if not first <= start <= stop <= first + len(hashes):
                return False
            loaded += hashes[start - first : stop - first]
        self._hashes[seq].extend(loaded)
        if self.unified:
            self._take_cells(seq, len(loaded))
        return True

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """Returns None, as hashes cannot be moved to other positions."""
        return None

    def intact(self, seq: int, length: int) -> bool:
        """Returns True if `seq` has `length` positions."""
        return self.length(seq) == length

    def length(self, seq: int) -> int:
        """Returns the number of positions of `seq`."""
        return len(self._hashes[seq])
