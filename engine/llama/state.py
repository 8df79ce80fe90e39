"""Cuts and joins the KV of a sequence in llama.cpp's state format, by numpy alone.

The format is that of `llama_state_seq_get_data` over `llama_kv_cache::state_write` (llama.cpp 0c1e57098), for models
whose layers all attend to the whole context: a magic number and a sequence id; the number of streams; for each stream a
cell count and, unless that is 0, one record for each cell (position, 1, sequence id), whether V is transposed, the
number of layers, K of each layer, then V of each layer that has V. K and V of a layer are a head of 12 bytes, which
names the type and the sizes, and a row for each cell; or, for transposed V, a row of all cells for each element.

A block is such a state of one stream with sequence id 0: equal in both KV layouts, and loadable as it is with unified
KV. A sequence has its cells in one stream, so a state of several streams differs from a block only by empty streams.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.backend import Part, State

MAGIC = 0xAF143CD8
HEAD_BYTES = 12
PREAMBLE_BYTES = 12
SHAPE_BYTES = 8

_PLAIN = [("pos", "<i4"), ("count", "<u4")]
CELLS = (
    np.dtype([*_PLAIN, ("seq", "<i4")]),
    np.dtype([*_PLAIN, ("x", "<i4"), ("y", "<i4"), ("token", "<i4"), ("seq", "<i4")]),
)
"""A cell's record, and that of models with M-RoPE, which has a place in an image and a token too."""


class UnknownLayout(ValueError):
    """Bytes that are no state of the expected format."""


class Run(NamedTuple):
    """Consecutive layers whose K, or whose V, have equal heads."""

    layers: int
    head: bytes
    width: int
    """Rows of a layer along which the cells lie: 1, or one for each element if V is transposed."""
    item: int
    """Bytes of one cell in one of those rows."""

    def bytes(self, cells: int) -> int:
        """Bytes of one layer with its head."""
        return HEAD_BYTES + self.width * cells * self.item


class View(NamedTuple):
    """A state's memory as arrays."""

    cells: NDArray[Any]
    """The cells' records."""
    heads: list[NDArray[np.uint8]]
    """For each run, [layers, HEAD_BYTES]."""
    data: list[NDArray[np.uint8]]
    """For each run, [layers, width, cells, item]."""


class Cells:
    """The cells of one state, addressed by position."""

    def __init__(self, view: View) -> None:
        self.view = view
        positions: NDArray[np.int32] = view.cells["pos"]
        self._order: NDArray[np.intp] | None = None
        if not (np.diff(positions) > 0).all():  # unified KV puts a sequence's cells where others are free
            self._order = np.argsort(positions)
            positions = positions[self._order]
            if not (np.diff(positions) > 0).all():
                raise UnknownLayout("a state has two cells of one position")
        self._positions = positions

    def find(self, start: int, end: int) -> slice | NDArray[np.intp] | None:
        """Where the positions from `start` up to `end` lie, in order; None if some are missing."""
        first = int(np.searchsorted(self._positions, start))
        found = self._positions[first : first + end - start]
        if not 0 < end - start == len(found) or (found[0], found[-1]) != (start, end - 1):
            return None
        place = slice(first, first + len(found))
        return place if self._order is None else self._order[place]


class StateFormat(NamedTuple):
    """Where the parts of a state lie, for one model with one type of K and of V."""

    cell: np.dtype[Any]
    transposed: bool
    layers: int
    runs: tuple[Run, ...]
    """Those of K, then those of V."""

    @classmethod
    def of(cls, state: State) -> StateFormat:
        """The format of a state with at least one cell. Raises UnknownLayout."""
        reasons = []
        for cell in CELLS:
            try:
                found = _walk(state, cell)
                found.cells(state)
            except (UnknownLayout, struct.error) as reason:
                reasons.append(str(reason))
            else:
                return found
        raise UnknownLayout("; ".join(reasons))

    @property
    def key_type(self) -> int:
        """The library's number for the type of the first layer's K."""
        return int.from_bytes(self.runs[0].head[:4], "little")

    def cells(self, state: State) -> Cells:
        """The cells of `state`, whose memory they share. Raises UnknownLayout if it has another format."""
        streams, stream, count = _streams(state)
        if not count or len(state) != self.size(count, streams):
            raise UnknownLayout(f"a state of {len(state)} bytes with {count} cells and {streams} streams")
        view = self._view(state, count, stream)
        at = _first_cell(stream) + count * self.cell.itemsize
        trailing = state[len(state) - 4 * (streams - stream - 1) :]
        if struct.unpack_from("<II", state.data, at) != (self.transposed, self.layers) or trailing.any():
            raise UnknownLayout("a state with another number of layers, transposition or stream")
        if not (view.cells["count"] == 1).all():
            raise UnknownLayout("a state with cells of several sequences")
        for run, heads in zip(self.runs, view.heads, strict=True):
            if not (heads == np.frombuffer(run.head, np.uint8)).all():
                raise UnknownLayout("a state with other types or widths of K or V")
        return Cells(view)

    def size(self, count: int, streams: int = 1) -> int:
        """Bytes of a state of `count` cells."""
        layers = sum(run.layers * run.bytes(count) for run in self.runs)
        return PREAMBLE_BYTES + 4 * streams + count * self.cell.itemsize + SHAPE_BYTES + layers

    def cut(self, cells: Cells, start: int, end: int) -> State | None:
        """The block of positions from `start` up to `end`; None if some are missing."""
        place = cells.find(start, end)
        return None if place is None else self._join([(cells.view, place, end - start)], 1, 0)

    def join(self, parts: Sequence[Part], streams: int = 1, stream: int = 0) -> State:
        """One state of all `parts`, for a context of `streams` streams with the sequence in `stream`.

        Raises UnknownLayout if a part has another format or lacks a position.
        """
        pieces: list[tuple[View, slice | NDArray[np.intp], int]] = []
        for part in parts:
            cells = self.cells(part.state)
            place = cells.find(part.start, part.end)
            if place is None:
                raise UnknownLayout(f"a state that lacks a position from {part.start} to {part.end - 1}")
            pieces.append((cells.view, place, part.end - part.start))
        return self._join(pieces, streams, stream)

    def _join(self, pieces: Sequence[tuple[View, slice | NDArray[np.intp], int]], streams: int, stream: int) -> State:
        total = sum(count for _, _, count in pieces)
        made: State = np.empty(self.size(total, streams), np.uint8)
        first = _first_cell(stream)
        struct.pack_into("<IiI", made.data, 0, MAGIC, 0, streams)
        made[PREAMBLE_BYTES:first] = made[len(made) - 4 * (streams - stream - 1) :] = 0
        struct.pack_into("<I", made.data, first - 4, total)
        struct.pack_into("<II", made.data, first + total * self.cell.itemsize, self.transposed, self.layers)
        view = self._view(made, total, stream)
        for run, heads in zip(self.runs, view.heads, strict=True):
            heads[:] = np.frombuffer(run.head, np.uint8)
        at = 0
        for source, place, count in pieces:
            view.cells[at : at + count] = source.cells[place]
            for target, data in zip(view.data, source.data, strict=True):
                target[:, :, at : at + count] = data[:, :, place]
            at += count
        view.cells["seq"] = 0
        return made

    def _view(self, state: State, count: int, stream: int) -> View:
        at = _first_cell(stream)
        cells: NDArray[Any] = np.ndarray(count, self.cell, state, at)
        at += count * self.cell.itemsize + SHAPE_BYTES
        heads, data = [], []
        for layers, _, width, item in self.runs:
            size = HEAD_BYTES + width * count * item
            heads.append(np.ndarray((layers, HEAD_BYTES), np.uint8, state, at, (size, 1)))
            shape, strides = (layers, width, count, item), (size, count * item, item, 1)
            data.append(np.ndarray(shape, np.uint8, state, at + HEAD_BYTES, strides))
            at += layers * size
        return View(cells, heads, data)


def _first_cell(stream: int) -> int:
    """Where the records of the cells of `stream` begin if no stream before it has cells."""
    return PREAMBLE_BYTES + 4 * (stream + 1)


def _streams(state: State) -> tuple[int, int, int]:
    """The number of streams of a state, the first that has cells, and how many. Raises UnknownLayout."""
    if len(state) < PREAMBLE_BYTES + 4:
        raise UnknownLayout(f"a state of {len(state)} bytes")
    magic, _, streams = struct.unpack_from("<IiI", state.data)
    if magic != MAGIC or not 0 < 4 * streams <= len(state) - PREAMBLE_BYTES:
        raise UnknownLayout(f"a state that begins with {magic:#x} and has {streams} streams")
    # The empty streams before the first cells are zeros; what follows those cells is not a count.
    filled = np.flatnonzero(state[PREAMBLE_BYTES : PREAMBLE_BYTES + 4 * streams].view("<u4"))
    stream = int(filled[0]) if len(filled) else 0
    return streams, stream, struct.unpack_from("<I", state.data, PREAMBLE_BYTES + 4 * stream)[0]


def _walk(state: State, cell: np.dtype[Any]) -> StateFormat:
    """The format that a state claims to have, if its cells' records are like `cell`."""
    streams, stream, count = _streams(state)
    at = _first_cell(stream) + count * cell.itemsize
    end = len(state) - 4 * (streams - stream - 1)
    transposed, layers = struct.unpack_from("<II", state.data, at)
    if not count or transposed > 1 or not 0 < layers * HEAD_BYTES <= len(state):
        raise UnknownLayout(f"a state with {count} cells, transposition {transposed} and {layers} layers")
    at += SHAPE_BYTES

    def heads() -> Iterator[tuple[bytes, int, int]]:
        """The heads of K, then of V, which some layers lack; each with width and item."""
        nonlocal at
        layer = 0
        while at < end:
            head = state[at : at + HEAD_BYTES].tobytes()
            if layer >= layers and transposed:
                _, item, width = struct.unpack("<iII", head)
            else:
                (_, item), width = struct.unpack("<iQ", head), 1
            yield head, width, item
            at += HEAD_BYTES + width * count * item
            layer += 1

    found = list(heads())
    if at != end or len(found) < layers:
        raise UnknownLayout(f"a state with {end - at} bytes after its {len(found)} layers of K and V")
    keys, values = _runs(found[:layers]), _runs(found[layers:])
    return StateFormat(cell, bool(transposed), layers, (*keys, *values))


def _runs(heads: Sequence[tuple[bytes, int, int]]) -> Iterator[Run]:
    """Consecutive equal heads as one run each."""
    for (head, width, item), equal in groupby(heads):
        yield Run(len(list(equal)), head, width, item)
