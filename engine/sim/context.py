"""Cells without values, and steps that take as long as a curve says."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from threading import Event
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.backend import Aborted, Logits, Meanwhile, NoFreeCells, Part, Snapshot, State, nothing
from engine.batch import Batch
from engine.config import EngineConfig
from engine.contract import ModelError
from engine.pace import Curve, Layout, Measured, SequenceRows, Shape
from engine.sim.words import END, ENDS_ONCE_IN, MIX, SIZE, WORD, WORDS, following

Hashes = NDArray[np.uint64]
Tokens = NDArray[np.intp]

# The logit of the word that follows; all others have 0.
LIKELY = 40.0
# Standard deviation of a step's time, as a share of it.
JITTER = 0.03
# Tokens of the context if the configuration names no number.
CONTEXT = 8192
# With at least so many tokens for each slot, KV is per slot unless the configuration says otherwise.
PER_SLOT_TOKENS = 1024

PassCost = Callable[[int], float]
"""Seconds of a pass by its rows."""


def free(rows: int) -> float:
    """Returns 0."""
    return 0.0


def flat(rows: int) -> float:
    """Returns the seconds of a pass on a simulated GPU: rows are nearly free."""
    return 0.020 + 0.00005 * rows


def linear(rows: int) -> float:
    """Returns the seconds of a pass where a row costs the same in a batch as alone."""
    return 0.020 * rows


class Cost(NamedTuple):
    """The time of a step."""

    of_pass: PassCost
    row_cell: float = 0.0
    """Seconds of a pair of a row and an attended cell."""
    flash: bool = True
    """True if attention skips the cells of a pass that a row does not attend to."""

    def seconds(self, shape: Shape) -> float:
        """Returns the seconds of a step."""
        return sum(map(self.of_pass, shape.passes)) + self.row_cell * shape.attended


COSTS = {"free": Cost(free), "flat": Cost(flat), "linear": Cost(linear)}


def cost_of(name: str) -> Cost:
    """Returns one of COSTS, or the cost in a file that `paceline cost -o FILE.json` wrote. Raises ModelError."""
    if name in COSTS:
        return COSTS[name]
    try:
        measured = msgspec.json.decode(Path(name).read_bytes(), type=Measured)
    except (OSError, msgspec.MsgspecError) as error:
        known = ", ".join(COSTS)
        raise ModelError(
            f"--sim-cost is one of {known} or a file that paceline cost wrote, not {name!r}: {error}"
        ) from None
    return Cost(Curve(measured.rows).seconds, measured.row_cell, measured.flash)


class SimSnapshot(NamedTuple):
    """Implements `engine.backend.Snapshot`: the hashes of one sequence."""

    hashes: array[int]

    def cut(self, start: int, end: int) -> State | None:
        """Returns the start and the hashes of the positions from `start` up to `end`; `None` if there are fewer."""
        if end > len(self.hashes):
            return None
        return np.array([start, *self.hashes[start:end]], np.uint64).view(np.uint8)


class SimContext:
    """Implements `engine.backend.Context`. Each cell holds one hash of all tokens up to its position."""

    partial, divisible, shifts = True, True, False
    prefill_rows = 1
    window = 0

    def __init__(self, config: EngineConfig, cost: Cost) -> None:
        batch = config.batch
        self.cells = batch.context or CONTEXT
        unified: bool | None = getattr(config.model, "kv_unified", None)
        self.unified = self.cells < PER_SLOT_TOKENS * batch.slots if unified is None else unified
        self.sequences = 2 * batch.slots + 17 if self.unified else batch.slots
        self.sequence_cells = self.cells if self.unified else self.cells // batch.slots
        self.outputs = batch.outputs or max(128, 8 * batch.slots)
        self.batch = Batch(max(batch.rows, self.outputs))
        self.ubatch = batch.ubatch
        self.flash = cost.flash
        self._layout = Layout(self.unified, self.ubatch, self.flash)
        self._cost = cost
        self._seed = config.sim.seed
        self._random = Random(self._seed)
        self._stop = Event()
        self._hashes = [array("Q") for _ in range(self.sequences)]
        self._held: list[list[int]] = [[] for _ in range(self.sequences)]  # with unified KV the cells behind them
        self._holders = [0] * self.cells
        self._free = list(range(self.cells))
        self._rows: Logits = np.zeros((self.outputs, SIZE), np.float32)
        self._next: Tokens = np.empty(0, np.intp)

    # ── computing ──

    def decode(self, meanwhile: Meanwhile = nothing) -> Logits:
        """Returns the logits of the batch's rows that asked for them, after the step's time.

        `meanwhile` is called before the wait. Only a decode that begins after an abort raises Aborted.
        """
        begun = time.perf_counter()
        if self._stop.is_set():
            raise Aborted
        rows = self._step()
        for seq, count, _ in rows if not self.unified else ():
            if self.room(seq) < count:
                raise NoFreeCells
        if self.unified and self.batch.rows > len(self._free):
            raise NoFreeCells
        seconds = self._cost.seconds(self._layout.shape(rows, self.cells - len(self._free)))
        logits = self._logits(self._append())
        meanwhile()
        seconds *= max(0.0, 1 + JITTER * self._random.gauss())
        if (left := begun + seconds - time.perf_counter()) > 0.0:
            self._stop.wait(left)  # an abort ends the wait; the next decode raises
        return logits

    def _step(self) -> list[SequenceRows]:
        """Returns the rows of each sequence in the batch."""
        seqs, starts = np.unique(self.batch.seq[: self.batch.rows], return_index=True)
        assert self.unified or (np.diff(starts) > 0).all(), "ids ascend in the batch"
        ends = [*starts[1:].tolist(), self.batch.rows]
        return [
            SequenceRows(seq, end - start, self.length(seq))
            for seq, start, end in zip(seqs.tolist(), starts.tolist(), ends, strict=True)
        ]

    def room(self, seq: int) -> int:
        """Returns the positions that `seq` can still get."""
        return len(self._free) if self.unified else self.sequence_cells - self.length(seq)

    def _append(self) -> Hashes:
        """Gives the batch's rows cells and returns the hashes of those that asked for logits."""
        batch, wanted = self.batch, array("Q")
        columns = (column[: batch.rows].tolist() for column in (batch.seq, batch.token, batch.output))
        last = -1
        for seq, token, output in zip(*columns, strict=True):
            if seq != last:
                hashes, last = self._hashes[seq], seq
                known = hashes[-1] if hashes else self._seed
            known = following(known, token)
            self._add(seq, known)
            if output:
                wanted.append(known)
        return np.array(wanted, np.uint64)

    def _add(self, seq: int, known: int) -> None:
        self._hashes[seq].append(known)
        if self.unified:
            self._held[seq].append(cell := self._free.pop())
            self._holders[cell] = 1

    def _logits(self, hashes: Hashes) -> Logits:
        """Returns a row of logits for each hash, in the memory of the last ones."""
        rows, places = self._rows, np.arange(len(hashes))
        rows[np.arange(len(self._next)), self._next] = 0.0
        rows[: len(self._next), END] = 0.0
        drawn = (((hashes ^ (hashes >> np.uint64(31))) * np.uint64(MIX)) >> np.uint64(40)).astype(np.intp)
        self._next = WORD + drawn % len(WORDS)
        rows[places, self._next] = LIKELY
        rows[places[drawn // len(WORDS) % ENDS_ONCE_IN == 0], END] = LIKELY + 1
        return rows[: len(hashes)]

    def abort(self) -> None:
        """Ends the wait of the running decode, and makes every later decode raise Aborted."""
        self._stop.set()

    # ── cells ──

    def copy(self, source: int, target: int, length: int) -> bool:
        """Gives `target` the first positions of `source`: the same cells with unified KV, else cells of its own."""
        assert not self._hashes[target], "the target is empty"
        self._hashes[target] = self._hashes[source][:length]
        self._held[target] = self._held[source][:length]
        for cell in self._held[target]:
            self._holders[cell] += 1
        return True

    def cut(self, seq: int, length: int) -> bool:
        """Drops positions from `length` on."""
        held = self._held[seq]
        for cell in held[length:]:
            self._holders[cell] -= 1
            if not self._holders[cell]:
                self._free.append(cell)
        del held[length:], self._hashes[seq][length:]
        return True

    def clear(self) -> None:
        """Frees every cell."""
        for seq in range(self.sequences):
            self.cut(seq, 0)

    def save(self, seq: int) -> Snapshot | None:
        """Returns the hashes of `seq`."""
        return SimSnapshot(self._hashes[seq][:])

    def load(self, seq: int, parts: Sequence[Part]) -> bool:
        """Appends `parts` to `seq`; returns False if there are too few cells or a state is too short."""
        end = self.length(seq)
        assert not parts or parts[0].start == end, "the first part continues the sequence"
        assert all(one.end == other.start for one, other in pairwise(parts)), "parts are consecutive"
        if sum(part.end - part.start for part in parts) > self.room(seq):
            return False
        loaded: list[int] = []
        for state, start, stop in parts:
            first, *hashes = state.view(np.uint64).tolist()
            if not first <= start <= stop <= first + len(hashes):
                return False
            loaded += hashes[start - first : stop - first]
        for known in loaded:
            self._add(seq, known)
        return True

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """Returns `None`: a hash belongs to its position."""
        return None

    def intact(self, seq: int, length: int) -> bool:
        """Returns True if `seq` has `length` positions."""
        return self.length(seq) == length

    def length(self, seq: int) -> int:
        """Returns the positions of `seq`."""
        return len(self._hashes[seq])
