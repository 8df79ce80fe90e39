"""The cells of all MTP layers of a model, which follow those of the model's sequences.

Each layer has a context of its own. One context would have the cells of all layers, but with the positions of one: to
compute a row with a second layer its position had to be dropped, and the library could choose another cell for it. Some
layers (`CELL_READERS`) have no cells and read those of the model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.adapters import AdapterSet
from engine.backend import Snapshot, State, StatePart
from engine.llama.mtp_layer import Hidden, MtpLayer, num_layers
from engine.llama.threads import ThreadPools


class JointSnapshot(NamedTuple):
    """Snapshots of one sequence in the model's cells and in those of each MTP layer."""

    snapshots: Sequence[Snapshot]

    def cut(self, start: int, end: int) -> State | None:
        """Returns all states of positions from `start` up to `end` as one, preceded by their sizes; None if one is
        missing."""
        states = [state for each in self.snapshots if (state := each.cut(start, end)) is not None]
        if len(states) < len(self.snapshots):
            return None
        return np.concatenate((np.array([state.nbytes for state in states], np.int64).view(np.uint8), *states))


def split_parts(parts: Sequence[StatePart], count: int) -> list[list[StatePart]]:
    """Returns the parts of each of `count` states that `JointSnapshot.cut` joined."""
    split: list[list[StatePart]] = [[] for _ in range(count)]
    for part in parts:
        sizes = part.state[: 8 * count].view(np.int64)
        ends = 8 * count + np.cumsum(sizes)
        for own, size, end in zip(split, sizes.tolist(), ends.tolist(), strict=True):
            own.append(StatePart(part.state[end - size : end].copy(), part.start, part.end))
    return split


class MtpLayers:
    """The MTP layers of a model. Belongs to the engine thread."""

    def __init__(self, model: Any, params: Any, other: Any, *, window: int) -> None:
        """`other` is the model's context, which was opened with `params`. Raises NativeFault, with nothing left in
        memory."""
        self.contexts: list[MtpLayer] = []
        """The contexts, one for each layer, or one for all layers if they read the model's cells."""
        try:
            for index in range(num_layers(model) or 1):
                self.contexts.append(MtpLayer(model, params, other, index, window=window))
        except BaseException:
            self.close()
            raise
        self._layers = self.contexts if num_layers(model) else []

    def __len__(self) -> int:
        """Returns the number of layers with cells."""
        return len(self._layers)

    # ── rows ──

    @property
    def room(self) -> int:
        """Number of rows that `add` can still add."""
        batch = self.contexts[0].batch
        return batch.capacity - batch.rows

    def clear_batch(self) -> None:
        """Removes all added rows."""
        for layer in self.contexts:
            layer.batch.clear()

    def add(self, seq: int, start: int, tokens: array[int], hidden: Hidden) -> None:
        """Adds rows to the batch of each layer, see `MtpLayer.add`."""
        for layer in self._layers:
            layer.add(seq, start, tokens, hidden)

    def decode(self) -> None:
        """Computes and removes the added rows. Raises as `Decoder.decode` does."""
        for layer in self._layers:
            if layer.batch.rows:
                layer.decode()
                layer.batch.clear()

    # ── sequences, see `engine.backend.Context` ──

    def copy(self, source: int, target: int, length: int) -> bool:
        """Copies the first `length` positions in all layers. On failure the target is empty."""
        if all(layer.copy(source, target, length) for layer in self._layers):
            return True
        self.cut(target, 0)
        return False

    def cut(self, seq: int, length: int) -> None:
        """Drops the positions from `length` on in all layers."""
        for layer in self._layers:
            layer.cut(seq, length)

    def save(self, seq: int) -> list[Snapshot] | None:
        """Returns a snapshot for each layer; None if one is missing."""
        saved = [snapshot for layer in self._layers if (snapshot := layer.save(seq)) is not None]
        return saved if len(saved) == len(self._layers) else None

    def load(self, seq: int, parts: Sequence[Sequence[StatePart]]) -> bool:
        """Appends the parts of each layer. On failure some layers may have them. Raises NativeFault."""
        return all(layer.load(seq, own) for layer, own in zip(self._layers, parts, strict=True))

    def clear(self) -> None:
        """Frees every cell."""
        for layer in self._layers:
            layer.clear()

    # ── settings ──

    def set_adapters(self, loaded: Sequence[Any], adapters: AdapterSet) -> None:
        """Applies `adapters`, by their ids in `loaded`, to later decodes."""
        for layer in self.contexts:
            layer.adapters = loaded
            layer.set_adapters(adapters)

    def attach(self, pools: ThreadPools) -> None:
        """Makes later decodes use the threads of `pools`."""
        for layer in self.contexts:
            layer.attach(pools)

    def close(self) -> None:
        """Frees the contexts."""
        for layer in self.contexts:
            layer.close()
