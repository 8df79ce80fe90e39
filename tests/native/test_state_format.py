"""Cutting and joining states of every shape; the tests build the states byte by byte."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import pytest

from engine.backend import State, StatePart
from engine.llama.state import STATE_MAGIC, StateFormat, UnknownStateFormat


class BuiltState(NamedTuple):
    """A state, and its keys and values by layer: [layers][cells, bytes of a row]."""

    state: State
    keys: list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]
    values: list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]


def build_state(
    positions: list[int],
    widths: tuple[int, ...] = (6, 6, 6),
    *,
    values: tuple[int, ...] | None = None,
    transposed: bool = False,
    image: bool = False,
    streams: int = 1,
    stream: int = 0,
) -> BuiltState:
    """Returns a state of `positions` as `llama_kv_cache::state_write` writes it; `widths` are the F16 numbers of a row
    by layer."""
    random, count = np.random.default_rng(len(positions)), len(positions)
    keys = [random.integers(0, 256, (count, 2 * width), np.uint8) for width in widths]
    rows = [random.integers(0, 256, (count, 2 * width), np.uint8) for width in (widths if values is None else values)]
    parts = [struct.pack("<IiI", STATE_MAGIC, stream, streams), bytes(4 * stream), struct.pack("<I", count)]
    for position in positions:
        # Four rows of three positions: a grid of two by two, then text.
        image_position = struct.pack("<iii", position % 2, position // 2 % 2, 77) if image else b""
        parts.append(
            struct.pack("<iI", position // 4 * 3 if image else position, 1) + image_position + struct.pack("<i", stream)
        )
    parts.append(struct.pack("<II", transposed, len(widths)))
    parts += [struct.pack("<iQ", 1, row.shape[1]) + row.tobytes() for row in keys]
    for row in rows:
        head = struct.pack("<iII", 1, 2, row.shape[1] // 2) if transposed else struct.pack("<iQ", 1, row.shape[1])
        body = row.reshape(count, -1, 2).transpose(1, 0, 2) if transposed else row
        parts.append(head + body.tobytes())
    parts.append(bytes(4 * (streams - stream - 1)))
    return BuiltState(np.frombuffer(bytearray().join(parts), np.uint8), keys, rows)


SHAPES: dict[str, dict[str, object]] = {
    "equal layers": {},
    "transposed": {"transposed": True},
    "layers of several widths": {"widths": (6, 6, 2, 2, 6), "transposed": True},
    "values narrower than keys": {"widths": (8, 8), "values": (4, 4)},
    "no values": {"widths": (8, 8, 8), "values": ()},
    "values of some layers": {"widths": (8, 8, 4), "values": (8, 4)},
    "places in images": {"image": True},
    "in the third stream of five": {"streams": 5, "stream": 2, "transposed": True},
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_cut_and_joined_a_state_is_as_before(shape: str) -> None:
    given = SHAPES[shape]
    state = build_state(list(range(10)), **given).state  # type: ignore[arg-type]
    form = StateFormat.of(state)
    cells = form.cells(form.numbered(state))
    spans = [(0, 4), (4, 5), (5, 10)]
    blocks = [StatePart(block, *span) for span in spans if (block := form.cut(cells, *span)) is not None]
    assert all(StateFormat.of(block.state) == form for block in blocks)
    assert [block.state.nbytes for block in blocks] == [form.size(end - start) for start, end in spans]
    whole = build_state(list(range(10)), **{**given, "streams": 1, "stream": 0})  # type: ignore[arg-type]
    assert np.array_equal(form.join(blocks), form.numbered(whole.state)), "a block has one stream and sequence 0"
    there = form.join(blocks, 5, 2).copy()
    expected = build_state(list(range(10)), **{**given, "streams": 5, "stream": 2}).state.copy()  # type: ignore[arg-type]
    if not given.get("image"):
        form.cells(expected).view.cells["seq"] = 0
    form.numbered(expected)
    expected[4:8] = 0
    assert np.array_equal(there, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_cells_in_any_order_are_cut_by_position(transposed: bool) -> None:
    order = [14, 15, 12, 13, 10, 11]
    source = build_state(order, transposed=transposed)
    form = StateFormat.of(source.state)
    block = form.cut(form.cells(source.state), 11, 14)
    assert block is not None
    view = form.cells(block).view
    assert view.cells["pos"].tolist() == [11, 12, 13]
    at = [order.index(position) for position in (11, 12, 13)]
    keys, values = (data.transpose(0, 2, 1, 3).reshape(3, 3, -1) for data in view.data)
    assert all(np.array_equal(keys[layer], source.keys[layer][at]) for layer in range(3))
    assert all(np.array_equal(values[layer], source.values[layer][at]) for layer in range(3))


def test_missing_positions_are_no_block() -> None:
    state = build_state([3, 4, 6, 7]).state
    form = StateFormat.of(state)
    cells = form.cells(state)
    assert form.cut(cells, 3, 5) is not None
    for span in ((2, 4), (4, 7), (5, 6), (6, 9), (0, 2), (4, 4)):
        assert form.cut(cells, *span) is None
    with pytest.raises(UnknownStateFormat, match="lacks a position from 4 to 6"):
        form.join([StatePart(state, 4, 7)])


@pytest.mark.parametrize("size", [0, 3, 15, 16, 40, 100])
def test_a_state_that_ends_early_is_unknown(size: int) -> None:
    state = build_state(list(range(4))).state
    form = StateFormat.of(state)
    for short in (state[:size], state[:-1], np.concatenate([state, state[:4]])):
        with pytest.raises(UnknownStateFormat):
            form.cells(short)
        with pytest.raises(UnknownStateFormat):
            StateFormat.of(short)


def test_a_state_of_another_model_or_type_is_unknown() -> None:
    form = StateFormat.of(build_state([0, 1]).state)
    for shape in ("transposed", "layers of several widths", "values narrower than keys", "places in images"):
        with pytest.raises(UnknownStateFormat):
            form.cells(build_state([0, 1], **SHAPES[shape]).state)  # type: ignore[arg-type]
    other = build_state([0, 1]).state.copy()
    other[other.tobytes().index(struct.pack("<iQ", 1, 12))] = 30  # BF16 keys of as many bytes
    with pytest.raises(UnknownStateFormat, match="other types"):
        form.cells(other)
    double = build_state([0, 0]).state
    with pytest.raises(UnknownStateFormat, match="one position"):
        form.cells(double)


def test_an_empty_sequence_has_no_format() -> None:
    with pytest.raises(UnknownStateFormat):
        StateFormat.of(np.frombuffer(struct.pack("<IiIII", STATE_MAGIC, 0, 2, 0, 0), np.uint8))
