"""Cells without values, and steps that take as long as a curve says."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from pathlib import Path
from random import Random
from threading import Event

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.backend import Aborted, Logits, Meanwhile, NoFreeCells, State, nothing
from engine.batch import Batch
from engine.config import EngineConfig
from engine.contract import ModelError
from engine.pace import Curve, Measured
from engine.sim.words import END, ENDS_ONCE_IN, MIX, SIZE, WORD, WORDS, following

Hashes = NDArray[np.uint64]
Tokens = NDArray[np.intp]

LIKELY = 40.0
"""The logit of what it says; that of all else is 0."""
JITTER = 0.03
"""By how much a step's time varies, as a share of it."""
CONTEXT = 8192
"""Tokens of its context if nobody says."""

Cost = Callable[[int, int], float]
"""Seconds of a step by its rows and by the cells that are resident."""


def free(rows: int, cells: int = 0) -> float:
    """Nothing."""
    return 0.0


def flat(rows: int, cells: int = 0) -> float:
    """As on a GPU: rows are nearly free."""
    return 0.020 + 0.00005 * rows


def linear(rows: int, cells: int = 0) -> float:
    """As where computing is the limit: a row costs the same in a batch as alone."""
    return 0.020 * rows


COSTS: dict[str, Cost] = {"free": free, "flat": flat, "linear": linear}


def cost_of(name: str) -> Cost:
    """One of COSTS, or what `paceline cost -o FILE.json` wrote. Raises ModelError."""
    if name in COSTS:
        return COSTS[name]
    try:
        measured = msgspec.json.decode(Path(name).read_bytes(), type=Measured)
    except (OSError, msgspec.MsgspecError) as error:
        known = ", ".join(COSTS)
        raise ModelError(
            f"--sim-cost is one of {known} or a file that paceline cost wrote, not {name!r}: {error}"
        ) from None
    curve = Curve(measured.rows)
    return lambda rows, cells: curve.seconds(rows) + measured.row_cell * rows * cells


class SimContext:
    """Implements `engine.backend.Context`. Of each cell it knows one hash, of all tokens up to there."""

    partial, shifts, ordered = True, False, False
    window = wasted = 0

    def __init__(self, config: EngineConfig, cost: Cost) -> None:
        batch = config.batch
        self.cells = batch.context or CONTEXT
        self.sequences = 2 * batch.slots + 17
        self.outputs = batch.outputs or max(128, 8 * batch.slots)
        self.batch = Batch(max(batch.rows, self.outputs))
        self.ubatch = batch.ubatch
        self._cost = cost
        self._seed = config.sim.seed
        self._random = Random(self._seed)
        self._stop = Event()
        self._hashes = [array("Q") for _ in range(self.sequences)]
        self._held: list[list[int]] = [[] for _ in range(self.sequences)]  # the cells behind them
        self._holders = [0] * self.cells
        self._free = list(range(self.cells))
        self._rows: Logits = np.zeros((self.outputs, SIZE), np.float32)
        self._said: Tokens = np.empty(0, np.intp)

    # ── computing ──

    def decode(self, meanwhile: Meanwhile = nothing) -> Logits:
        """The logits of the batch's rows that asked for them; they come when a step's time is over, and `meanwhile` is
        called before. Only a decode that begins after an abort raises Aborted."""
        begun, batch = time.perf_counter(), self.batch
        if self._stop.is_set():
            raise Aborted
        if batch.rows > len(self._free):
            raise NoFreeCells
        seconds = self._cost(batch.rows, self.cells - len(self._free))
        rows = self._say(self._append())
        meanwhile()
        seconds *= max(0.0, 1 + JITTER * self._random.gauss())
        if (left := begun + seconds - time.perf_counter()) > 0.0:
            self._stop.wait(left)  # an abort ends the wait; the next decode says so
        return rows

    def _append(self) -> Hashes:
        """Gives the batch's rows cells; the hashes of those that want logits."""
        batch, wanted = self.batch, array("Q")
        columns = (column[: batch.rows].tolist() for column in (batch.seq, batch.token, batch.output))
        last = -1
        for seq, token, output in zip(*columns, strict=True):
            if seq != last:
                hashes, held, last = self._hashes[seq], self._held[seq], seq
                known = hashes[-1] if hashes else self._seed
            hashes.append(known := following(known, token))
            held.append(cell := self._free.pop())
            self._holders[cell] = 1
            if output:
                wanted.append(known)
        return np.array(wanted, np.uint64)

    def _say(self, hashes: Hashes) -> Logits:
        """A row of logits for each hash, in the place of the last ones."""
        rows, places = self._rows, np.arange(len(hashes))
        rows[np.arange(len(self._said)), self._said] = 0.0
        rows[: len(self._said), END] = 0.0
        drawn = (((hashes ^ (hashes >> np.uint64(31))) * np.uint64(MIX)) >> np.uint64(40)).astype(np.intp)
        self._said = WORD + drawn % len(WORDS)
        rows[places, self._said] = LIKELY
        rows[places[drawn // len(WORDS) % ENDS_ONCE_IN == 0], END] = LIKELY + 1
        return rows[: len(hashes)]

    def abort(self) -> None:
        """Ends the running decode's wait, and makes every later decode raise Aborted."""
        self._stop.set()

    # ── cells ──

    def copy(self, source: int, target: int, length: int) -> bool:
        """Lets `target` share the first cells of `source`."""
        assert not self._held[target], "the target must be empty"
        self._hashes[target] = self._hashes[source][:length]
        self._held[target] = self._held[source][:length]
        for cell in self._held[target]:
            self._holders[cell] += 1
        return True

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """Only for contexts whose cells must stay in order."""
        raise NotImplementedError

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

    def save(self, seq: int, start: int, end: int) -> State | None:
        """The hashes of these positions, after the first of them."""
        if end > len(self._hashes[seq]):
            return None
        return np.array([start, *self._hashes[seq][start:end]], np.uint64).view(np.uint8)

    def load(self, seq: int, state: State, start: int, end: int, shift: int = 0) -> bool:
        """Gives the positions of a state cells; False if there are too few."""
        first, *hashes = state.view(np.uint64).tolist()
        assert first <= start == self.length(seq), "continues what is there"
        if shift or end - first > len(hashes) or end - start > len(self._free):
            return False
        for known in hashes[start - first : end - first]:
            self._hashes[seq].append(known)
            self._held[seq].append(cell := self._free.pop())
            self._holders[cell] = 1
        return True

    def intact(self, seq: int, length: int) -> bool:
        """Always, as far as it goes."""
        return self.length(seq) == length

    def length(self, seq: int) -> int:
        """Positions of `seq`."""
        return len(self._hashes[seq])
