"""Moves saved KV to other positions, in a small context.

Keys are rotated by their position. The library rotates the keys of all cells of a context at once, and even a rotation
by 0 rounds quantised keys again. So shifts have a context of few cells: they are cheap, and leave the cells of the
serving context unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backend import NativeFault, NoFreeCells, State, StatePart
from engine.llama.decoder import Decoder
from engine.llama.library import CACHE_TYPES, FLASH_ATTENTION, StopFlag
from engine.llama.params import metadata
from engine.llama.state import StateFormat, UnknownStateFormat

SHIFT_CELLS = 1024
SHIFT_ROWS = 8
# Largest difference between a rotated and a computed key, relative to the largest key: above the rounding of F16 and
# BF16, below the factor by which the library scales the keys of models with YaRN at each rotation.
TOLERANCE = 0.03

_BF16 = CACHE_TYPES["bf16"]
# Cache types of unquantised keys, with the numpy type of their bytes.
FLOAT_TYPES: dict[int, type[np.generic]] = {
    CACHE_TYPES["f32"]: np.float32,
    CACHE_TYPES["f16"]: np.float16,
    _BF16: np.uint16,
}


class Shifter:
    """Rotates the keys of states. Belongs to the thread that created it."""

    def __init__(self, model: Any, params: Any, state_format: StateFormat, cells: int, stop: StopFlag) -> None:
        """`params`, `cells` of a sequence and `stop` are those of the serving context. Raises NativeFault."""
        own = type(params).from_buffer_copy(params)
        own.n_ctx, own.n_seq_max, own.kv_unified = max(SHIFT_CELLS, _rope_cells(model, cells)), 1, False
        own.n_batch = own.n_ubatch = SHIFT_ROWS
        own.n_outputs_max = 1
        own.flash_attn_type = FLASH_ATTENTION["off" if state_format.transposed else "on"]
        self._decoder = Decoder(model, own, stop)
        self._decoder.positions = 2**31 - 1
        self._format = state_format

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """Returns the block of positions from `start` up to `end` of `state`, moved by `by` positions.

        Returns None if the state lacks a position or has another format, or if a position would be negative. Raises
        Aborted.
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
        self._compute([0], end + by)  # the library rotates the keys before it computes a row
        return self._decoder.get_state(0)

    def _compute(self, tokens: Sequence[int], start: int) -> None:
        self._decoder.batch.clear()
        self._decoder.batch.add(0, start, tokens, 0)
        self._decoder.decode()

    def verify(self, state: State, tokens: Sequence[int], by: int) -> bool:
        """Returns True if keys of the first layer equal, up to rounding, those computed at the new positions.

        `state` contains `tokens`, at most `SHIFT_ROWS`, from position 0 on. Quantised keys are not compared.
        """
        if not self._decoder.can_move():
            return False
        moved = self.shift(state, 0, len(tokens), by)
        try:
            self._compute(tokens, by)
            computed = self._decoder.get_state(0)
            if moved is None or computed is None:
                return False
            # The first layer's keys depend on the token and its position only.
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
    """Returns K or V of a cache type in `FLOAT_TYPES` as numbers."""
    whole = np.ascontiguousarray(data)
    if kind == _BF16:
        return (whole.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return whole.view(FLOAT_TYPES[kind]).astype(np.float32)


def _rope_cells(model: Any, cells: int) -> int:
    """Returns the minimum of cells with which the library uses the same rotations as with `cells`.

    Models that were first trained on a short context can have two sets of rotations, the second for longer contexts.
    """
    family = metadata(model, "general.architecture")
    first = metadata(model, f"{family}.rope.scaling.original_context_length")
    return int(first) + 1 if first.isdigit() and cells > int(first) else 0
