"""The context of a model that computes no text: it has no cells, and the engine's steps never use it."""

from __future__ import annotations

from collections.abc import Sequence

from engine.adapters import AdapterSet
from engine.backend import HostWork, Logits, NativeFault, Snapshot, State, StatePart, no_host_work
from engine.batch import Batch


class TextlessContext:
    """Implements `engine.backend.Context` with empty sequences. Every decode raises NativeFault."""

    unified = flash = partial = divisible = shifts = False
    max_rollback = 0
    backend_sampling = None
    cells = sequence_cells = window = 0
    prefill_rows = 1
    streams = 1

    def __init__(self, slots: int) -> None:
        self.sequences = self.outputs = self.ubatch = slots
        self.batch = Batch(slots)

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """Raises NativeFault."""
        raise NativeFault("the model computes embeddings, not text")

    def set_adapters(self, adapters: AdapterSet) -> bool:
        """Returns False."""
        return False

    def copy(self, source: int, target: int, length: int) -> bool:
        """Returns True for the empty copy, which is the only possible one."""
        return not length

    def cut(self, seq: int, length: int) -> bool:
        """Returns True, as an empty sequence stays empty."""
        return True

    def save(self, seq: int) -> Snapshot | None:
        """Returns None."""
        return None

    def load(self, seq: int, parts: Sequence[StatePart]) -> bool:
        """Returns False."""
        return False

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """Returns None."""
        return None

    def intact(self, seq: int, length: int) -> bool:
        """Returns True for the length 0."""
        return not length

    def length(self, seq: int) -> int:
        """Returns 0."""
        return 0

    def clear(self) -> None:
        """Does nothing."""

    def abort(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
