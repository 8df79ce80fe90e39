"""Keeps every sequence's cells in the order of its positions, so that no rounding depends on who ran beside it.

Attention sums over a row's cells in the order in which they lie, and floating-point sums depend on their order: two
sequences whose drafts were cut, or whose neighbours have left, would otherwise get new tokens into cells freed below
their older ones, which moves the last bit of a logit and, rarely, a token.

llama.cpp puts new rows into the lowest free cells. So order is kept by never leaving a free cell below a used one:
what is cut is handed to a sequence of nobody's, unless nothing lies above it, and rows always come on top. Cells that
are wasted so come back only all at once, when everybody has left: `engine.runner` retracts all requests then, and
they compute again what they had, which is the same to the bit.
"""

from __future__ import annotations

from array import array

from engine.backend import Aborted, Context, Logits, Meanwhile, NativeFault, State, nothing
from engine.batch import Batch


class Ordered:
    """A context that does the same as the one it wraps, with all cells in order."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.cells = context.cells
        self.sequences = context.sequences - 1
        self.outputs = context.outputs
        self.ubatch = context.ubatch
        self.partial = context.partial
        self.ordered = True
        self.window = context.window
        self.shifts = False
        self._nobody = self.sequences
        self._places = [array("i") for _ in range(self.sequences)]  # by position
        self._holders = array("i", [0]) * self.cells
        self._top = 0
        self._live = 0

    @property
    def batch(self) -> Batch:
        """The rows of the next decode."""
        return self._context.batch

    @property
    def wasted(self) -> int:
        """Cells that nobody holds and nobody gets before `clear`."""
        return self._top - self._live

    def decode(self, meanwhile: Meanwhile = nothing) -> Logits:
        """As the context's. After a fault all cells count as used, for nobody knows which are."""

        def placed() -> None:
            self._place()
            meanwhile()

        try:
            return self._context.decode(placed)
        except (Aborted, NativeFault):
            self._top = self.cells
            raise

    def _place(self) -> None:
        """Notes where the batch's rows lie."""
        rows = self.batch.rows
        for row, seq in enumerate(self.batch.seq[:rows].tolist()):
            self._places[seq].append(self._top + row)
            self._holders[self._top + row] = 1
        self._top += rows
        self._live += rows

    def copy(self, source: int, target: int, length: int) -> bool:
        """As the context's."""
        if not self._context.copy(source, target, length):
            return False
        self._places[target] = self._places[source][:length]
        for place in self._places[target]:
            self._holders[place] += 1
        return True

    def cut(self, seq: int, length: int) -> bool:
        """Drops positions from `length` on; their cells are wasted where others lie above."""
        dropped = self._places[seq][length:]
        for place in dropped:
            self._holders[place] -= 1
            self._live -= not self._holders[place]
        first, last = length, length + len(dropped)
        while first < last and self._holders[dropped[first - length]]:
            first += 1  # the part that others hold too, always the first
        while first < last and dropped[last - 1 - length] == self._top - 1:
            last, self._top = last - 1, self._top - 1
        self._context.cut(seq, last)
        if first < last:
            self._context.share(seq, self._nobody, first, last)
        self._context.cut(seq, length)
        del self._places[seq][length:]
        return True

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """As the context's, which only this class needs."""
        raise NotImplementedError

    def save(self, seq: int, start: int, end: int) -> State | None:
        """As the context's."""
        return self._context.save(seq, start, end)

    def load(self, seq: int, state: State, start: int, end: int, shift: int = 0) -> bool:
        """As the context's, on top of all cells, for a state that begins at `start`: what it has before, which is not
        wanted, would leave free cells below."""
        assert not shift, "what was moved is not exact"
        if not self._context.load(seq, state, start, end):
            return False
        size = end - start
        self._places[seq].extend(range(self._top, self._top + size))
        self._holders[self._top : self._top + size] = array("i", [1]) * size
        self._top += size
        self._live += size
        return True

    def clear(self) -> None:
        """Frees all cells, when no sequence has any: the wasted ones."""
        assert not self._live, "everybody has left"
        self._context.cut(self._nobody, 0)
        for seq in range(self.sequences):
            self._context.cut(seq, 0)
            del self._places[seq][:]
        self._top = 0

    def intact(self, seq: int, length: int) -> bool:
        """As the context's."""
        return self._context.intact(seq, length)

    def length(self, seq: int) -> int:
        """Positions of `seq`."""
        return self._context.length(seq)

    def abort(self) -> None:
        """As the context's."""
        self._context.abort()
