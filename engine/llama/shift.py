"""Moves saved KV to other positions, in a small context of its own.

The rotation of a key depends on its position, so moved keys are rotated again. The library rotates the keys of all
cells of a context together, and even a rotation by 0 rounds quantised keys again. A separate context with few cells
makes shifts cheap and leaves the cells of the serving context unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as native
from numpy.typing import NDArray

from engine.backend import NativeFault, NoFreeCells, State, StatePart
from engine.llama.decoder import Decoder
from engine.llama.library import CACHE_TYPES, FLASH_ATTENTION, StopFlag
from engine.llama.params import metadata
from engine.llama.state import StateFormat, UnknownStateFormat

# Minimum number of cells of the context for shifts, and the rows of one pass.
SHIFT_CELLS = 1024
SHIFT_ROWS = 8
# Maximum difference between a rotated and a computed key, relative to the largest key. The rounding of F16 and BF16 is
# smaller; the error for models with YaRN, whose keys the library scales at each rotation, is larger.
TOLERANCE = 0.03

_BF16 = CACHE_TYPES["bf16"]
# Cache types that are not quantised, each with the numpy type of its elements.
FLOAT_TYPES: dict[int, type[np.generic]] = {
    CACHE_TYPES["f32"]: np.float32,
    CACHE_TYPES["f16"]: np.float16,
    _BF16: np.uint16,
}


class _MovableDecoder(Decoder):
    """A context whose sequences can be moved to other positions."""

    def move(self, seq: int, by: int) -> None:
        """Adds `by` to all positions of a sequence. The next decode rotates the keys accordingly."""
        native.llama_memory_seq_add(self._memory, seq, -1, -1, by)

    def can_move(self) -> bool:
        """Returns True if the library can rotate keys to other positions."""
        return bool(native.llama_memory_can_shift(self._memory))


class Shifter:
    """Rotates the keys of states. Only the thread that created it may use it."""

    def __init__(self, model: Any, params: Any, state_format: StateFormat, cells: int, stop: StopFlag) -> None:
        """`params` and `stop` are those of the serving context, `cells` is its number of cells per sequence. Raises
        NativeFault."""
        own = type(params).from_buffer_copy(params)
        own.n_ctx, own.n_seq_max, own.kv_unified = max(SHIFT_CELLS, _rope_cells(model, cells)), 1, False
        own.n_batch = own.n_ubatch = SHIFT_ROWS
        own.n_outputs_max = 1
        own.flash_attn_type = FLASH_ATTENTION["off" if state_format.transposed else "on"]
        self._decoder = _MovableDecoder(model, own, stop)
        self._decoder.positions = 2**31 - 1
        self._format = state_format

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """Returns the block of positions from `start` up to `end` of `state`, moved by `by` positions.

        Returns None if the state lacks a position or has another format, if a position would be negative, or if the
        library fails. Raises Aborted.
        """
        if start + by < 0:
            return None
        step = self._decoder.cells - 1
        moved: list[StatePart] = []
        try:
            for first in range(start, end, step):
                last = min(end, first + step)
                if (part := self._move(state, first, last, by)) is None:
                    return None
                moved.append(StatePart(part, first + by, last + by))
            return self._format.join(moved) if moved else None
        except (UnknownStateFormat, NativeFault, NoFreeCells):
            return None
        finally:
            self._decoder.clear()

    def _move(self, state: State, start: int, end: int, by: int) -> State | None:
        if not self._decoder.set_state(0, self._format.join([StatePart(state, start, end)])):
            return None
        self._decoder.move(0, by)
        self._compute([0], end + by)  # a decode, as the library rotates the keys only before computing a row
        return self._decoder.get_state(0)

    def _compute(self, tokens: Sequence[int], start: int) -> None:
        self._decoder.batch.clear()
        self._decoder.batch.add(0, start, tokens, 0)
        self._decoder.decode()

    def verify(self, state: State, tokens: Sequence[int], by: int) -> bool:
        """Returns True if shifted keys of the first layer equal, up to rounding, keys computed at the new positions.

        `state` is that of `tokens` from position 0 on; there are at most `SHIFT_ROWS` tokens. `by` is the shift in
        positions. Quantised keys are not compared.
        """
        if not self._decoder.can_move():
            return False
        moved = self.shift(state, 0, len(tokens), by)
        try:
            self._compute(tokens, by)
            computed = self._decoder.get_state(0)
            if moved is None or computed is None:
                return False
            # Only the first layer is compared: its keys depend on nothing but the token and its position.
            rotated, expected = (self._format.cells(each).view.data[0][:1] for each in (moved, computed))
        except (UnknownStateFormat, NativeFault):
            return False
        finally:
            self._decoder.clear()
        return equal_keys(rotated, expected, self._format.key_type)

    def close(self) -> None:
        """Frees the context."""
        self._decoder.close()


def equal_keys(one: NDArray[np.uint8], other: NDArray[np.uint8], kind: int) -> bool:
    """Returns True if keys of cache type `kind` are equal up to rounding, or if they are quantised."""
    if kind not in FLOAT_TYPES:
        return True
    left, right = (as_floats(each, kind) for each in (one, other))
    return bool(np.abs(left - right).max() <= TOLERANCE * np.abs(right).max())


def as_floats(data: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
    """Returns the bytes of K or V of the cache type `kind`, one of `FLOAT_TYPES`, as numbers."""
    whole = np.ascontiguousarray(data)
    if kind == _BF16:
        return (whole.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return whole.view(FLOAT_TYPES[kind]).astype(np.float32)


def _rope_cells(model: Any, cells: int) -> int:
    """Returns the minimum number of cells with which the library uses the same rotations as with `cells`.

    A model that was first trained on a short context can have a second set of rotations for longer contexts.
    """
    family = metadata(model, "general.architecture")
    first = metadata(model, f"{family}.rope.scaling.original_context_length")
    return int(first) + 1 if first.isdigit() and cells > int(first) else 0
