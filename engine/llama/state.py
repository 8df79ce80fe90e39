"""Cuts and joins the KV of a sequence in llama.cpp's state format, by numpy alone.

The format is that of `llama_state_seq_get_data` over `llama_kv_cache::state_write` (llama.cpp 0c1e57098), for models
whose layers all attend to the whole context. A state consists of:

- a magic number and a sequence id
- the number of streams
- for each stream a cell count; the following only if the count is not 0:
  - one record for each cell (position, 1, sequence id)
  - 1 if V is transposed, otherwise 0, and the number of layers
  - K of each layer, then V of each layer that has V

K or V of a layer consists of a head of 12 bytes, with the type and the sizes, and one row for each cell. Transposed V
has one row of all cells for each element instead.

A block is a state of one stream with sequence id 0. Blocks are equal in both KV layouts, and unified KV can load them
unchanged. All cells of a sequence are in one stream, so a state with several streams is a block plus empty streams.

Cells are addressed by the index of their row, which is their position. With M-RoPE, rows of one image have one position
and later rows a smaller one than their index: there the index takes the place of the sequence id, which the library
does not use when it loads a state. `StateFormat.numbered` writes it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.backend import State, StatePart
from engine.llama.row_positions import Coordinates

STATE_MAGIC = 0xAF143CD8
# Magic number, sequence id and number of streams.
PREAMBLE_BYTES = 12
# Transposition of V and number of layers.
SHAPE_BYTES = 8
# Head of K or V of one layer.
HEAD_BYTES = 12

_PLAIN = [("pos", "<i4"), ("count", "<u4")]
# The record of a cell without and with M-RoPE, which adds the coordinates in an image and a token.
_CELL_RECORDS = (
    np.dtype([*_PLAIN, ("seq", "<i4")]),
    np.dtype([*_PLAIN, ("x", "<i4"), ("y", "<i4"), ("token", "<i4"), ("seq", "<i4")]),
)


class UnknownStateFormat(ValueError):
    """The bytes are not a state of the expected format."""


class LayerRun(NamedTuple):
    """Consecutive layers whose heads of K, or of V, are equal."""

    layers: int
    head: bytes
    planes: int
    """Number of arrays over all cells in a layer: 1, or one for each element if V is transposed."""
    item_bytes: int
    """Bytes of one cell in one plane."""

    def layer_bytes(self, cells: int) -> int:
        """Returns the bytes of one layer with `cells` cells, its head included."""
        return HEAD_BYTES + self.planes * cells * self.item_bytes


class StateView(NamedTuple):
    """The parts of a state as arrays that share the state's memory."""

    cells: NDArray[Any]
    """Records of the cells, [cells]."""
    heads: list[NDArray[np.uint8]]
    """Heads of each run, [layers, HEAD_BYTES]."""
    data: list[NDArray[np.uint8]]
    """K or V of each run, [layers, planes, cells, item_bytes]."""


class StateCells:
    """The cells of one state, addressed by the index of their row, here called position."""

    def __init__(self, view: StateView) -> None:
        self.view = view
        positions: NDArray[np.int32] = view.cells["seq" if _has_coordinates(view.cells.dtype) else "pos"]
        self._order: NDArray[np.intp] | None = None
        if not (np.diff(positions) > 0).all():  # with unified KV the cells of a sequence can be in any order
            self._order = np.argsort(positions)
            positions = positions[self._order]
            if not (np.diff(positions) > 0).all():
                raise UnknownStateFormat("a state has two cells of one position")
        self._positions = positions

    def find(self, start: int, end: int) -> slice | NDArray[np.intp] | None:
        """Returns the indices of the cells at positions from `start` up to `end`, in order; None if a position is
        missing."""
        first = int(np.searchsorted(self._positions, start))
        found = self._positions[first : first + end - start]
        if not 0 < end - start == len(found) or (found[0], found[-1]) != (start, end - 1):
            return None
        indices = slice(first, first + len(found))
        return indices if self._order is None else self._order[indices]


# A state, the indices of the cells to copy from it, and their number.
_Source = tuple[StateView, slice | NDArray[np.intp], int]


class StateFormat(NamedTuple):
    """The offsets and sizes in the states of one model with one type of K and one type of V."""

    cell: np.dtype[Any]
    """Record of a cell."""
    transposed: bool
    """True if V is transposed."""
    layers: int
    runs: tuple[LayerRun, ...]
    """The runs of K, then those of V."""

    @classmethod
    def of(cls, state: State) -> StateFormat:
        """Returns the format of a state with at least one cell. Raises UnknownStateFormat."""
        reasons = []
        for cell in _CELL_RECORDS:
            try:
                found = _parse(state, cell)
                found._checked_view(state)
            except (UnknownStateFormat, struct.error) as reason:
                reasons.append(str(reason))
            else:
                return found
        raise UnknownStateFormat("; ".join(reasons))

    @property
    def has_coordinates(self) -> bool:
        """True if cells have coordinates in an image, so that states are numbered."""
        return _has_coordinates(self.cell)

    @property
    def key_type(self) -> int:
        """Type of the first layer's K (`enum ggml_type`)."""
        return int.from_bytes(self.runs[0].head[:4], "little")

    def cells(self, state: State) -> StateCells:
        """Returns the cells of `state`, which is a block or numbered. The cells share the state's memory. Raises
        UnknownStateFormat if `state` has another format."""
        return StateCells(self._checked_view(state))

    def numbered(self, state: State) -> State:
        """Returns `state`, that of a whole sequence from the library. With coordinates, writes the index of its row
        into each cell. Raises UnknownStateFormat."""
        if _has_coordinates(self.cell):
            cells = self._checked_view(state).cells
            order = np.lexsort((cells["x"], cells["y"], cells["pos"]))
            cells["seq"][order] = np.arange(len(order))
        return state

    def _checked_view(self, state: State) -> StateView:
        streams, stream, count = _streams(state)
        if not count or len(state) != self.size(count, streams):
            raise UnknownStateFormat(f"a state of {len(state)} bytes with {count} cells and {streams} streams")
        view = self._view(state, count, stream)
        at = _first_cell(stream) + count * self.cell.itemsize
        trailing = state[len(state) - 4 * (streams - stream - 1) :]
        if struct.unpack_from("<II", state.data, at) != (self.transposed, self.layers) or trailing.any():
            raise UnknownStateFormat("a state with another number of layers, transposition or stream")
        if not (view.cells["count"] == 1).all():
            raise UnknownStateFormat("a state with cells of several sequences")
        for run, heads in zip(self.runs, view.heads, strict=True):
            if not (heads == np.frombuffer(run.head, np.uint8)).all():
                raise UnknownStateFormat("a state with other types or widths of K or V")
        return view

    def size(self, count: int, streams: int = 1) -> int:
        """Returns the bytes of a state with `count` cells in one of `streams` streams."""
        layers = sum(run.layers * run.layer_bytes(count) for run in self.runs)
        return PREAMBLE_BYTES + 4 * streams + count * self.cell.itemsize + SHAPE_BYTES + layers

    def cut(self, cells: StateCells, start: int, end: int) -> State | None:
        """Returns the block of positions from `start` up to `end`; None if a position is missing."""
        indices = cells.find(start, end)
        return None if indices is None else self._join([(cells.view, indices, end - start)], 1, 0)

    def join(self, parts: Sequence[StatePart], streams: int = 1, stream: int = 0) -> State:
        """Returns one state with all `parts`, for a context with `streams` streams. The cells are in stream `stream`.

        Raises UnknownStateFormat if a part has another format or lacks a position.
        """
        return self._join([self._cells_of(part) for part in parts], streams, stream)

    def coordinates(self, parts: Sequence[StatePart]) -> Coordinates:
        """Returns the coordinates of the rows in all `parts`. Raises UnknownStateFormat as `join` does."""
        sources = [self._cells_of(part) for part in parts]
        return np.concatenate([_coordinates(view.cells[indices]) for view, indices, _ in sources], axis=1)

    def _cells_of(self, part: StatePart) -> _Source:
        cells = self.cells(part.state)
        indices = cells.find(part.start, part.end)
        if indices is None:
            raise UnknownStateFormat(f"a state that lacks a position from {part.start} to {part.end - 1}")
        return cells.view, indices, part.end - part.start

    def _join(self, sources: Sequence[_Source], streams: int, stream: int) -> State:
        total = sum(count for _, _, count in sources)
        joined: State = np.empty(self.size(total, streams), np.uint8)
        first = _first_cell(stream)
        struct.pack_into("<IiI", joined.data, 0, STATE_MAGIC, 0, streams)
        joined[PREAMBLE_BYTES:first] = joined[len(joined) - 4 * (streams - stream - 1) :] = 0
        struct.pack_into("<I", joined.data, first - 4, total)
        struct.pack_into("<II", joined.data, first + total * self.cell.itemsize, self.transposed, self.layers)
        view = self._view(joined, total, stream)
        for run, heads in zip(self.runs, view.heads, strict=True):
            heads[:] = np.frombuffer(run.head, np.uint8)
        at = 0
        for source, indices, count in sources:
            view.cells[at : at + count] = source.cells[indices]
            for target, data in zip(view.data, source.data, strict=True):
                target[:, :, at : at + count] = data[:, :, indices]
            at += count
        if not _has_coordinates(self.cell):
            view.cells["seq"] = 0
        return joined

    def _view(self, state: State, count: int, stream: int) -> StateView:
        at = _first_cell(stream)
        cells: NDArray[Any] = np.ndarray(count, self.cell, state, at)
        at += count * self.cell.itemsize + SHAPE_BYTES
        heads, data = [], []
        for layers, _, planes, item_bytes in self.runs:
            size = HEAD_BYTES + planes * count * item_bytes
            heads.append(np.ndarray((layers, HEAD_BYTES), np.uint8, state, at, (size, 1)))
            shape, strides = (layers, planes, count, item_bytes), (size, count * item_bytes, item_bytes, 1)
            data.append(np.ndarray(shape, np.uint8, state, at + HEAD_BYTES, strides))
            at += layers * size
        return StateView(cells, heads, data)


def sequence_coordinates(state: State) -> Coordinates:
    """Returns the coordinates of the cells of a state whose first part is one of this format with M-RoPE, also if
    recurrent states follow. Raises UnknownStateFormat."""
    _, stream, count = _streams(state)
    at, cell = _first_cell(stream), _CELL_RECORDS[1]
    if not 0 < count <= (len(state) - at) // cell.itemsize:
        raise UnknownStateFormat(f"a state of {len(state)} bytes with {count} cells")
    return _coordinates(np.ndarray(count, cell, state, at))


def _coordinates(cells: NDArray[Any]) -> Coordinates:
    sections = ("pos", "y", "x") if _has_coordinates(cells.dtype) else ("pos",)
    return np.stack([cells[section] for section in sections])


def _has_coordinates(cell: np.dtype[Any]) -> bool:
    return cell == _CELL_RECORDS[1]


def _first_cell(stream: int) -> int:
    """Returns the byte offset of the first cell's record if `stream` is the first stream with cells."""
    return PREAMBLE_BYTES + 4 * (stream + 1)


def _streams(state: State) -> tuple[int, int, int]:
    """Returns the number of streams of a state, the first stream with cells, and the number of cells in that stream.

    Raises UnknownStateFormat.
    """
    if len(state) < PREAMBLE_BYTES + 4:
        raise UnknownStateFormat(f"a state of {len(state)} bytes")
    magic, _, streams = struct.unpack_from("<IiI", state.data)
    if magic != STATE_MAGIC or not 0 < 4 * streams <= len(state) - PREAMBLE_BYTES:
        raise UnknownStateFormat(f"a state that begins with {magic:#x} and has {streams} streams")
    # Empty streams before the first cells have the count 0. The bytes after the first other count are not counts.
    filled = np.flatnonzero(state[PREAMBLE_BYTES : PREAMBLE_BYTES + 4 * streams].view("<u4"))
    stream = int(filled[0]) if len(filled) else 0
    return streams, stream, struct.unpack_from("<I", state.data, PREAMBLE_BYTES + 4 * stream)[0]


def _parse(state: State, cell: np.dtype[Any]) -> StateFormat:
    """Returns the format that the heads in `state` describe, with cell records of type `cell`. Raises
    UnknownStateFormat."""
    streams, stream, count = _streams(state)
    at = _first_cell(stream) + count * cell.itemsize
    end = len(state) - 4 * (streams - stream - 1)
    transposed, layers = struct.unpack_from("<II", state.data, at)
    if not count or transposed > 1 or not 0 < layers * HEAD_BYTES <= len(state):
        raise UnknownStateFormat(f"a state with {count} cells, transposition {transposed} and {layers} layers")
    at += SHAPE_BYTES

    def heads() -> Iterator[tuple[bytes, int, int]]:
        """Yields the head, the planes and the item bytes of each layer's K, then of each layer's V. Some layers have no
        V."""
        nonlocal at
        layer = 0
        while at < end:
            head = state[at : at + HEAD_BYTES].tobytes()
            if layer >= layers and transposed:
                _, item_bytes, planes = struct.unpack("<iII", head)
            else:
                (_, item_bytes), planes = struct.unpack("<iQ", head), 1
            yield head, planes, item_bytes
            at += HEAD_BYTES + planes * count * item_bytes
            layer += 1

    found = list(heads())
    if at != end or len(found) < layers:
        raise UnknownStateFormat(f"a state with {end - at} bytes after its {len(found)} layers of K and V")
    keys, values = _runs(found[:layers]), _runs(found[layers:])
    return StateFormat(cell, bool(transposed), layers, (*keys, *values))


def _runs(heads: Sequence[tuple[bytes, int, int]]) -> Iterator[LayerRun]:
    """Yields one run for each group of consecutive equal heads."""
    for (head, planes, item_bytes), equal in groupby(heads):
        yield LayerRun(len(list(equal)), head, planes, item_bytes)
