"""States of one text, gathered from where they are kept, put back, and erased.

They are in parts as pieces are: up to `PIECE` tokens from a multiple of `PIECE` on; or, of a model that keeps one
state for all of a text, one part from its start.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Container, Sequence
from typing import NamedTuple

from engine.memory.cells import Cells
from engine.memory.lease import AHEAD
from engine.memory.pieces import PIECE, Piece
from engine.memory.textfile import Part


class Gathered(NamedTuple):
    """What was found of a text, in order and without a gap."""

    parts: list[Part]
    more: bool
    """Whether there may be more: to be asked for from where these end, soon if these are none."""


def gather(cells: Cells, tokens: array[int], salt: str, start: int, seconds: float) -> Gathered:
    """Parts of `tokens` from `start` on, which is 0 or the end of what was gathered before, until `seconds` are over.

    Nothing changes, but that what is only on disk comes to RAM if there is room.
    """
    if not cells.context.partial:
        return _whole(cells, tokens, salt) if not start else Gathered([], False)
    until = time.perf_counter() + seconds
    parts: list[Part] = []
    # What was moved in the cells cannot be saved from there before the next decode.
    match = cells.tree.match(tokens if not cells.shifted else tokens[:0], salt)
    stored: dict[int, Piece] = {}
    while start < len(tokens) and time.perf_counter() < until:
        end = min(start + PIECE, len(tokens))
        state = cells.context.save(match.seq, start, end) if end <= match.length else None
        if state is None:
            if start not in stored:
                stored = _continuing(cells, tokens, salt, start)
            piece = stored.get(start)
            if piece is None or piece.end != end:
                return Gathered(parts + _rest(cells, tokens, match.seq, start, match.length), False)
            if not _fetched(cells, stored, start):
                return Gathered(parts, True)
            state = cells.store.take(piece) if cells.store is not None else None
            if state is None:
                return Gathered(parts, False)
        parts.append(Part(start, tokens[start:end], state))
        start = end
    return Gathered(parts, start < len(tokens))


def _continuing(cells: Cells, tokens: array[int], salt: str, start: int) -> dict[int, Piece]:
    """The stored pieces that continue `start` tokens, by their start."""
    found = cells.store.find(tokens, salt, start).pieces if cells.store is not None else ()
    return {piece.start: piece for piece in found}


def _fetched(cells: Cells, stored: dict[int, Piece], start: int) -> bool:
    """Whether the piece at `start` can be taken; those after it are read ahead."""
    places = range(start, start + AHEAD * PIECE, PIECE)
    return cells.fetch([stored[place] for place in places if place in stored], wait=False)


def _rest(cells: Cells, tokens: array[int], seq: int, start: int, end: int) -> list[Part]:
    """The tokens from `start` to `end`, fewer than a piece, which `seq` has: the last ones that can be had."""
    state = cells.context.save(seq, start, end) if start < end < start + PIECE else None
    return [] if state is None else [Part(start, tokens[start:end], state)]


def _whole(cells: Cells, tokens: array[int], salt: str) -> Gathered:
    """The one state that reaches furthest."""
    match = cells.tree.match(tokens, salt, whole=True)
    pieces = cells.store.find(tokens, salt, match.length).pieces if cells.store is not None else ()
    if cells.store is not None and pieces:
        if not cells.fetch(pieces, wait=False):
            return Gathered([], True)
        length, state = pieces[0].end, cells.store.take(pieces[0])
    else:
        length, state = match.length, cells.context.save(match.seq, 0, match.length) if match.length else None
    return Gathered([] if state is None else [Part(0, tokens[:length], state)], False)


def put(cells: Cells, tokens: array[int], salt: str, parts: Sequence[Part]) -> None:
    """Puts parts into the store, which there is, of a text that has `tokens` up to the end of the last of them.

    They are in order, without a gap, and what precedes them was put before. Others may have to leave.
    """
    store = cells.store
    assert store is not None, "somewhere to put them"
    states = {part.end: part.state for part in parts}
    for piece in store.places(tokens, salt, parts[0].start):
        state = states.get(piece.end)
        if state is None:
            store.forget(piece)
        else:
            store.keep(piece, state)


def known(cells: Cells, tokens: array[int], salt: str) -> int:
    """How many of `tokens` a request that begins with them would not have to compute."""
    return cells.find(tokens + array("i", [0]), salt).reach


def erase(cells: Cells, tokens: array[int], salt: str, running: Container[int]) -> int:
    """Forgets `tokens` as far as no other text begins so: what is stored, and idle sequences that have nothing else;
    sequences in `running` are leased. Returns how many are known no more."""
    before = known(cells, tokens, salt)
    for seq in cells.tree.sequences(salt):
        held = cells.tree.tokens(seq) if seq not in running else None
        if held is not None and held == tokens[: len(held)]:
            cells.release(seq, keep=False)
    if cells.store is not None:
        cells.store.erase(tokens, salt)
    return before - known(cells, tokens, salt)
