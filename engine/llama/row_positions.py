"""The native positions of rows, for models with M-RoPE, whose images take fewer positions than rows.

All rows of an image have one position in time, and a place in its grid. The text after the image continues behind the
longer side of the grid (llama.cpp: `mtmd_image_tokens_get_n_pos`). The engine counts rows: the index of a row is its
position in the prompt. The position is a function of the tokens before the row, so equal prefixes have equal positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch

# Positions of rows, [sections, rows]: in time, then the coordinates in an image, of which there are none without
# M-RoPE.
Coordinates = NDArray[np.int32]


class RowPositions(NamedTuple):
    """The positions of the rows of one sequence, by index. They never decrease."""

    listed: NDArray[np.int32]
    """Positions of the first rows, at least up to the last row of the last image."""
    following: int
    """Position of the first row after `listed`. The rows after it have consecutive positions."""

    @classmethod
    def of(cls, coordinates: Coordinates) -> RowPositions:
        """Returns the positions of a whole sequence whose rows have `coordinates`, in any order."""
        return NO_IMAGES.extended(0, coordinates[:, np.argsort(coordinates[0], kind="stable")])

    def at(self, index: int) -> int:
        """Returns the position of the row at `index`."""
        count = len(self.listed)
        return int(self.listed[index]) if index < count else self.following + index - count

    def count(self, last: int) -> int:
        """Returns the number of rows whose position is not after `last`."""
        if last >= self.following:
            return len(self.listed) + last - self.following + 1
        return int(np.searchsorted(self.listed, last, "right"))

    def image_start(self, index: int) -> int:
        """Returns the index of the first row that has the position of the row at `index`."""
        return int(np.searchsorted(self.listed, self.listed[index])) if index < len(self.listed) else index

    def cut(self, length: int) -> RowPositions:
        """Returns the positions of the first `length` rows and of text after them."""
        if length >= len(self.listed):
            return self
        listed = self.listed[:length]
        last = int(listed[-1]) if length else -1
        return RowPositions(listed, max(last + 1, int(self.listed[length])))

    def extended(self, length: int, coordinates: Coordinates) -> RowPositions:
        """Returns the positions after rows with `coordinates` have followed the first `length` rows."""
        before = self.cut(length)
        text = np.arange(before.following, before.following + length - len(before.listed), dtype=np.int32)
        behind = max(before.at(length), int(coordinates[:3].max()) + 1)
        return RowPositions(np.concatenate((before.listed, text, coordinates[0])), behind)

    def continued_by(self, length: int, position: int) -> bool:
        """Returns True if a row at `position` can follow the first `length` rows: it is text or the start of an image,
        or a further row of the image before it."""
        return position == self.at(length) or (length > 0 and position == self.at(length - 1))

    @property
    def is_trivial(self) -> bool:
        """True if the position of each row is its index."""
        count = len(self.listed)
        return self.following == count and np.array_equal(self.listed, np.arange(count))


NO_IMAGES = RowPositions(np.zeros(0, np.int32), 0)


class PositionTable:
    """The positions of all sequences of one context, by sequence id."""

    def __init__(self, sequences: int) -> None:
        self._changed: dict[int, RowPositions] = {}
        # Differences between the index and the position of the next row of each sequence.
        self._gaps: NDArray[np.int32] = np.zeros(sequences, np.int32)

    def __getitem__(self, seq: int) -> RowPositions:
        return self._changed.get(seq, NO_IMAGES)

    def __setitem__(self, seq: int, positions: RowPositions) -> None:
        self.drop(seq)
        if not positions.is_trivial:
            self._changed[seq] = positions
            self._gaps[seq] = len(positions.listed) - positions.following

    def __contains__(self, seq: int) -> bool:
        """Returns True if the position of a row of `seq` differs from its index."""
        return seq in self._changed

    def drop(self, seq: int) -> None:
        """Makes the position of each row of `seq` its index."""
        self._changed.pop(seq, None)
        self._gaps[seq] = 0

    def clear(self) -> None:
        """Makes the position of each row its index."""
        self._changed.clear()
        self._gaps[:] = 0

    def gaps(self, batch: Batch) -> NDArray[np.int32] | None:
        """Returns the differences between the indices and the positions of the rows of text in `batch`; None if no
        position differs from its index."""
        return self._gaps[batch.seq[: batch.rows]] if self._changed else None


def text_coordinates(first: int, count: int, sections: int) -> Coordinates:
    """Returns the coordinates of `count` rows without a grid, from the position `first` on."""
    return np.tile(np.arange(first, first + count, dtype=np.int32), (sections, 1))
