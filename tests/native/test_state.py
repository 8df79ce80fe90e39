"""The library's saved states on tiny models of each kind, without the engine: the facts behind KV blocks.

With unified KV the library can save a sequence in blocks: a scratch sequence shares the block's cells, its state is
saved, and later loaded into the scratch sequence again, from which the target gets the cells.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp as native

from engine.backend import Logits
from engine.llama import library
from tests.native import tiny

SCRATCH, WINDOW = 9, 32
EMPTY = (-1, -1)
TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 490, 400)]


class NativeContext:
    """A context of a tiny model, used without the engine."""

    def __init__(self, path: Path, cells: int = 1024, flash: int = 0, unified: bool = True) -> None:
        library.initialize()
        self._model = native.llama_model_load_from_file(str(path).encode(), native.llama_model_default_params())
        params = native.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = cells, 256, 256
        params.n_seq_max = 20 if unified else 4
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type, params.kv_unified = flash, unified
        assert self._model, library.first_error()
        self._handle = native.llama_init_from_model(self._model, params)
        assert self._handle, library.first_error()
        self._memory = native.llama_get_memory(self._handle)
        self._batch = native.llama_batch_init(256, 0, 1)

    def feed(self, seq: int, start: int, tokens: Sequence[int]) -> int:
        """Decodes rows of one sequence, the last row with logits; returns the library's result code."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row], batch.logits[row] = token, start + row, row == len(tokens) - 1
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, seq
        return int(native.llama_decode(self._handle, batch))

    def compute(self, seq: int, start: int, end: int) -> Logits:
        """Decodes `TOKENS[start:end]`, in chunks of 256 rows; returns the logits of the last row."""
        for begin in range(start, end, 256):
            assert self.feed(seq, begin, TOKENS[begin : min(end, begin + 256)]) == 0
        return self.logits()

    def logits(self) -> Logits:
        """Returns a copy of the logits of the last row."""
        size = native.llama_vocab_n_tokens(native.llama_model_get_vocab(self._model))
        return np.ctypeslib.as_array(native.llama_get_logits_ith(self._handle, -1), (size,)).copy()

    def next_four_logits(self, seq: int, start: int) -> Logits:
        """Returns the logits of the next four rows, each in a separate decode."""
        return np.stack([self.compute(seq, position, position + 1) for position in range(start, start + 4)])

    def position_range(self, seq: int) -> tuple[int, int]:
        """Returns the first and last position of a sequence; (-1, -1) for an empty one."""
        of = native.llama_memory_seq_pos_min, native.llama_memory_seq_pos_max
        return of[0](self._memory, seq), of[1](self._memory, seq)

    def share(self, source: int, target: int, start: int = -1, end: int = -1) -> None:
        """Adds the cells of `source` from `start` to `end` to `target`; -1 means no bound."""
        native.llama_memory_seq_cp(self._memory, source, target, start, end)

    def kind(self) -> tuple[bool, bool, int]:
        """Returns the kind of the model: True if it is recurrent, True if it is hybrid, and its sliding window."""
        of = native.llama_model_is_recurrent, native.llama_model_is_hybrid, native.llama_model_n_swa
        return of[0](self._model), of[1](self._model), of[2](self._model)

    def drop(self, seq: int, start: int = -1, end: int = -1) -> bool:
        """Removes the cells from `start` to `end` of a sequence; returns False if the library refuses."""
        return bool(native.llama_memory_seq_rm(self._memory, seq, start, end))

    def save(self, seq: int, flags: int = 0) -> bytes:
        """Returns the state of a sequence."""
        size = native.llama_state_seq_get_size_ext(self._handle, seq, flags)
        buffer = (ctypes.c_uint8 * size)()
        assert native.llama_state_seq_get_data_ext(self._handle, buffer, size, seq, flags) == size
        return bytes(buffer)

    def load(self, seq: int, state: bytes, flags: int = 0) -> bool:
        """Loads a state; returns False if the library refuses, and asserts that a state is loaded wholly or not at
        all."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        took: int = native.llama_state_seq_set_data_ext(self._handle, buffer, len(state), seq, flags)
        assert took in (0, len(state))
        return took > 0

    def blocks(self, seq: int, length: int, size: int) -> list[tuple[int, int, bytes]]:
        """Returns start, end and state of each block of `size` tokens in the first `length` positions of a sequence."""
        saved = []
        for start in range(0, length, size):
            end = min(length, start + size)
            self.share(seq, SCRATCH, start, end)
            saved.append((start, end, self.save(SCRATCH)))
            self.drop(SCRATCH)
        return saved

    def restore(self, seq: int, blocks: list[tuple[int, int, bytes]], length: int) -> None:
        """Loads the first `length` positions from `blocks`."""
        for start, end, state in blocks:
            if start < length:
                assert self.load(SCRATCH, state)
                self.share(SCRATCH, seq, start, min(end, length))
                self.drop(SCRATCH)

    def clear(self) -> None:
        """Frees all cells."""
        native.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        """Frees everything."""
        native.llama_batch_free(self._batch)
        native.llama_free(self._handle)
        native.llama_model_free(self._model)


OpenContext = Callable[..., NativeContext]
KINDS: dict[str, Callable[[Path], Path]] = {
    "plain": lambda path: tiny.windowed(path, 0),
    "windowed": lambda path: tiny.windowed(path, WINDOW),
    "recurrent": tiny.recurrent,
    "hybrid": tiny.hybrid,
}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[OpenContext]:
    """Yields a function that opens a tiny model by its kind."""
    contexts: list[NativeContext] = []

    def open_kind(kind: str, **settings: Any) -> NativeContext:
        contexts.append(NativeContext(KINDS[kind](tmp_path / f"{kind}.gguf"), **settings))
        return contexts[-1]

    yield open_kind
    for cells in contexts:
        cells.close()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("plain", (False, False, 0)),
        ("windowed", (False, False, WINDOW)),
        ("recurrent", (True, False, 0)),
        ("hybrid", (False, True, 0)),
    ],
)
def test_tiny_models_are_of_their_kind_and_have_varied_outputs(
    opened: OpenContext, name: str, kind: tuple[bool, bool, int]
) -> None:
    cells = opened(name)
    assert cells.kind() == kind
    chosen = [int(cells.compute(0, 0, 10).argmax())]
    for position in range(10, 50):
        assert cells.feed(0, position, chosen[-1:]) == 0
        chosen.append(int(cells.logits().argmax()))
    assert len(set(chosen)) > 25
    assert not np.allclose(cells.compute(1, 0, 100), cells.compute(2, 90, 100), atol=1), "the context counts"


@pytest.mark.parametrize("flash", [0, 1])
@pytest.mark.parametrize("kind", ["plain", "windowed", "hybrid"])
def test_a_sequence_is_restored_from_blocks(opened: OpenContext, kind: str, flash: int) -> None:
    cells = opened(kind, flash=flash)
    cells.compute(0, 0, 200)
    blocks = cells.blocks(0, 200, WINDOW)
    expected = cells.next_four_logits(0, 200)
    cells.clear()
    cells.restore(1, blocks, 200)
    assert cells.position_range(1) == ((199, 199) if kind == "hybrid" else (0, 199))
    assert np.array_equal(cells.next_four_logits(1, 200), expected)


@pytest.mark.parametrize("kind", ["plain", "windowed"])
def test_a_part_of_a_block_is_restored(opened: OpenContext, kind: str) -> None:
    cells = opened(kind)
    cells.compute(0, 0, 200)
    blocks = cells.blocks(0, 200, WINDOW)
    cells.drop(0, 150)
    expected = cells.next_four_logits(0, 150)
    cells.clear()
    cells.restore(1, blocks, 150)
    assert cells.position_range(1) == (0, 149)
    assert np.array_equal(cells.next_four_logits(1, 150), expected)


def test_a_block_longer_than_the_window_has_undetected_holes(opened: OpenContext) -> None:
    cells = opened("windowed")
    cells.compute(0, 0, 200)
    blocks = cells.blocks(0, 200, 2 * WINDOW)
    cells.drop(0, 165)
    expected = cells.next_four_logits(0, 165)
    cells.clear()
    cells.restore(1, blocks, 165)
    assert cells.position_range(1) == (WINDOW, 164)
    assert not np.allclose(cells.next_four_logits(1, 165), expected, atol=1)


@pytest.mark.parametrize("kind", ["plain", "windowed", "hybrid"])
def test_a_state_without_room_leaves_the_empty_target_empty(opened: OpenContext, kind: str) -> None:
    cells = opened(kind, cells=256)
    cells.compute(2, 0, 100)
    state = cells.save(2)
    cells.drop(2)
    cells.compute(0, 0, 200)
    assert not cells.load(1, state)
    assert cells.position_range(1) == EMPTY
    cells.compute(0, 200, 201)
    cells.drop(0)
    assert cells.load(1, state)
    cells.compute(1, 100, 101)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_damaged_state_is_refused(opened: OpenContext, kind: str) -> None:
    cells = opened(kind)
    cells.compute(0, 0, 50)
    state = cells.save(0)
    for damaged in (b"\0" * 4 + state[4:], state[:3], state[:20], state[: len(state) // 2], state[:-1]):
        assert not cells.load(1, damaged)
        assert cells.position_range(1) == EMPTY


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_a_recurrent_state_is_kept_whole_or_dropped(opened: OpenContext, kind: str) -> None:
    cells = opened(kind)
    cells.compute(0, 0, 150)
    assert cells.position_range(0) == (149, 149)
    state = cells.save(0)
    cells.share(0, 4)
    assert not cells.drop(0, 149)
    assert cells.drop(0, 150), "there is nothing to drop"
    expected = cells.next_four_logits(0, 150)
    assert cells.position_range(4) == (149, 149), "a copy stays when its source goes on"
    assert np.array_equal(cells.next_four_logits(4, 150), expected)
    assert cells.drop(0)
    assert cells.position_range(0) == EMPTY
    assert cells.drop(4)
    assert cells.load(3, state)
    assert np.array_equal(cells.next_four_logits(3, 150), expected)


def test_a_hybrid_prefix_is_blocks_and_a_checkpoint(opened: OpenContext) -> None:
    cells = opened("hybrid")
    cells.compute(0, 0, 100)
    checkpoint = cells.save(0, native.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
    expected = cells.next_four_logits(0, 100)
    cells.compute(0, 104, 200)
    blocks = cells.blocks(0, 200, 64)
    cells.clear()
    cells.restore(1, blocks, 100)
    assert cells.position_range(1) == (199, 99), "the recurrent part has the position at which the blocks were saved"
    assert cells.load(1, checkpoint, native.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
    assert cells.position_range(1) == (99, 99)
    assert np.array_equal(cells.next_four_logits(1, 100), expected)


def test_cells_before_a_window_are_overwritten_and_only_the_first_position_shows_it(opened: OpenContext) -> None:
    cells = opened("windowed")
    cells.compute(1, 0, 20)
    cells.compute(0, 0, 300)
    cells.drop(1)
    cells.compute(2, 0, 70)
    assert cells.position_range(0) == (50, 299), "although two thirds of the cells are free"
    cells.share(0, 3, 0, 50)
    assert cells.position_range(3) == EMPTY
    cells.drop(3)
    assert cells.drop(0, 60)
    assert cells.position_range(0) == (50, 59), "a row at 60 attends to positions from 29 on"
    assert cells.feed(0, 60, TOKENS[60:61]) == 0


@pytest.mark.parametrize("flash", [0, 1])
def test_a_state_of_one_slot_replaces_what_another_slot_has(opened: OpenContext, flash: int) -> None:
    cells = opened("plain", flash=flash, unified=False)
    cells.compute(1, 0, 100)
    cells.compute(3, 0, 50)
    state = cells.save(1)
    expected = cells.next_four_logits(1, 100)
    assert cells.load(3, state)
    assert cells.position_range(3) == (0, 99)
    assert np.array_equal(cells.next_four_logits(3, 100), expected)
    assert not cells.load(3, state[:1000])
    assert cells.position_range(3) == EMPTY, "a refused state leaves the sequence empty"
    assert not cells.load(3, state[:-1])
    assert cells.position_range(3) == (0, 99), "cells without content, which must be dropped"
    assert not opened("plain", flash=flash).load(3, state), "with unified KV there is another number of streams"


def test_each_slot_has_cells_of_its_own(opened: OpenContext) -> None:
    cells = opened("plain", unified=False)
    cells.compute(0, 0, 256)
    assert cells.feed(0, 256, TOKENS[:1]) == 1, "although the other slots are empty"
    assert cells.position_range(0) == (0, 255)
    cells.compute(1, 0, 256)
