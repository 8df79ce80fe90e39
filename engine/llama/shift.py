"""Moves saved KV to other positions, in a small context of its own.

Keys are rotated by their position. The library rotates the keys of all cells of a context at once, so a context of few
cells beside the serving one makes a shift cheap, and leaves the cells of every sequence as they are: a rotation by 0
rounds quantised keys anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backend import NativeFault, NoFreeCells, Part, State
from engine.llama.decoder import Decoder
from engine.llama.library import CACHE_TYPES, FLASH_ATTENTION, StopFlag
from engine.llama.params import metadata
from engine.llama.state import StateFormat, UnknownLayout

CELLS = 1024
ROWS = 8
# Largest difference between a rotated and a computed key, relative to the largest key: more than the rounding of F16
# and BF16, less than the factor by which the library scales keys anew at each rotation for models with YaRN.
TOLERANCE = 0.03

BF16 = CACHE_TYPES["bf16"]
FLOATS: dict[int, type[np.generic]] = {
    CACHE_TYPES["f32"]: np.float32,
    CACHE_TYPES["f16"]: np.float16,
    BF16: np.uint16,
}


class Shifter:
    """Rotates the keys of states. Belongs to the thread that made it."""

    def __init__(self, model: Any, params: Any, form: StateFormat, cells: int, stop: StopFlag) -> None:
        """`params`, `cells` of a sequence and `stop` are those of the serving context. Raises NativeFault."""
        own = type(params).from_buffer_copy(params)
        own.n_ctx, own.n_seq_max, own.kv_unified = max(CELLS, _rope_cells(model, cells)), 1, False
        own.n_batch = own.n_ubatch = ROWS
        own.n_outputs_max = 1
        own.flash_attn_type = FLASH_ATTENTION["off" if form.transposed else "on"]
        self._decoder = Decoder(model, own, stop)
        self._decoder.positions = 2**31 - 1
        self._format = form

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """The block of positions from `start + by` up to `end + by`, made of `state`'s from `start` up to `end`. None
        if the state lacks one or has another format, or a position would be negative. Raises Aborted."""
        if start + by < 0:
            return None
        step = self._decoder.cells - 1
        moved: list[Part] = []
        try:
            for first in range(start, end, step):
                last = min(end, first + step)
                if (part := self._move(state, first, last, by)) is None:
                    return None
                moved.append(Part(part, first + by, last + by))
            return self._format.join(moved) if moved else None
        except (UnknownLayout, NativeFault, NoFreeCells):
            return None
        finally:
            self._decoder.clear()

    def _move(self, state: State, start: int, end: int, by: int) -> State | None:
        if not self._decoder.set_state(0, self._format.join([Part(state, start, end)])):
            return None
        self._decoder.move(0, by)
        self._compute([0], end + by)  # the library rotates before it computes the row
        return self._decoder.get_state(0)

    def _compute(self, tokens: Sequence[int], start: int) -> None:
        self._decoder.batch.clear()
        self._decoder.batch.add(0, start, tokens, 0)
        self._decoder.decode()

    def proven(self, state: State, tokens: Sequence[int], by: int) -> bool:
        """True if the first layer's keys of `state`, which holds at most `ROWS` tokens from position 0 on, are after a
        shift those that are computed there, but for rounding. Quantised keys are not compared."""
        if not self._decoder.can_move():
            return False
        moved = self.shift(state, 0, len(tokens), by)
        try:
            self._compute(tokens, by)
            computed = self._decoder.get_state(0)
            if moved is None or computed is None:
                return False
            # The first layer's keys depend on nothing but the token and its position.
            ours, wanted = (self._format.cells(each).view.data[0][:1] for each in (moved, computed))
        except (UnknownLayout, NativeFault):
            return False
        finally:
            self._decoder.clear()
        return close(ours, wanted, self._format.key_type)

    def close(self) -> None:
        """Frees the context."""
        self._decoder.close()


def close(one: NDArray[np.uint8], other: NDArray[np.uint8], kind: int) -> bool:
    """True if rounding alone may explain the difference between keys of type `kind`, or if they are quantised."""
    if kind not in FLOATS:
        return True
    left, right = (numbers(each, kind) for each in (one, other))
    return bool(np.abs(left - right).max() <= TOLERANCE * np.abs(right).max())


def numbers(data: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
    """K or V of a type in `FLOATS` as numbers."""
    whole = np.ascontiguousarray(data)
    if kind == BF16:
        return (whole.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return whole.view(FLOATS[kind]).astype(np.float32)


def _rope_cells(model: Any, cells: int) -> int:
    """Cells with which the library takes the same rotations as with `cells`: models that were trained on a short
    context first may have two sets, the second for contexts longer than that one."""
    family = metadata(model, "general.architecture")
    first = metadata(model, f"{family}.rope.scaling.original_context_length")
    return int(first) + 1 if first.isdigit() and cells > int(first) else 0
