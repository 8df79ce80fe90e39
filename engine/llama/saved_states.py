"""Saved states of sequences: whole, or cut into blocks by numpy or by the library.

With unified KV a state is loaded into a spare sequence id, and the target sequence then shares the spare one's cells.
With per-slot KV the library can only replace the content of a sequence: to append a state, numpy joins it with the old
content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llama_cpp import llama_cpp as native

from engine.backend import NativeFault, Snapshot, State, StatePart
from engine.llama.decoder import Decoder
from engine.llama.library import native_log
from engine.llama.row_positions import RowPositions
from engine.llama.state import StateCells, StateFormat, UnknownStateFormat, sequence_coordinates
from engine.llama.top_k_chains import TopKChains


class BlockSnapshot(NamedTuple):
    """A native state of one sequence, from which numpy cuts blocks."""

    state_format: StateFormat
    cells: StateCells

    def cut(self, start: int, end: int) -> State | None:
        """Returns the block of positions from `start` up to `end`; None if a position is missing."""
        return self.state_format.cut(self.cells, start, end)


class WholeSnapshot(NamedTuple):
    """A native state of one sequence that cannot be cut."""

    state: State
    length: int

    def cut(self, start: int, end: int) -> State | None:
        """Returns the state if `start` is 0 and `end` is the length; None for any other span."""
        return self.state if (start, end) == (0, self.length) else None


class LibrarySnapshot(NamedTuple):
    """A sequence in unified KV. The library cuts its states, as numpy cannot read their format."""

    context: SavingDecoder
    seq: int

    def cut(self, start: int, end: int) -> State | None:
        """Returns the state of positions from `start` up to `end`; see `SavingDecoder.state_of`."""
        return self.context.state_of(self.seq, start, end)


class SavingDecoder(Decoder):
    """A context whose sequences can be saved and loaded."""

    def __init__(
        self, model: Any, params: Any, chains: TopKChains | None = None, *, partial: bool, window: int
    ) -> None:
        """See `engine.llama.context.LlamaContext`. The format of states is unknown until `_format` is set."""
        super().__init__(model, params, chains=chains)
        self.partial, self.window = partial, window
        if self.unified:
            self.sequences -= 1
        self._spare = self.sequences
        self._format: StateFormat | None = None

    @property
    def divisible(self) -> bool:
        """True if states can be cut: by numpy if their format is known, or by the library with unified KV."""
        return self.partial and (self.unified or self._format is not None)

    @property
    def numbers_states(self) -> bool:
        """True if the cells of blocks have the index of their row, see `engine.llama.state`."""
        return self._format is not None and self._format.has_coordinates

    def intact(self, seq: int, length: int) -> bool:
        """Returns True if `seq` has `length` rows, and cells for all positions that the next row attends to."""
        if self.length(seq) != length:
            return False
        if not length or not self.partial:  # a recurrent state has only its last position
            return True
        first = self.first_position(seq)
        return 0 <= first <= max(0, self.row_positions[seq].at(length) - self.window) if self.window else first == 0

    def save(self, seq: int) -> Snapshot | None:
        """Returns a snapshot of `seq`; None if `seq` is empty or its state cannot be saved."""
        length = self.length(seq)
        if not length:
            return None
        if self.divisible and self._format is None:
            # The library cuts at positions, which several rows of an image have with M-RoPE.
            return None if seq in self.row_positions else LibrarySnapshot(self, seq)
        try:
            if (state := self._numbered_state(seq)) is None:
                return None
            if self._format is None:
                return WholeSnapshot(state, length)
            return BlockSnapshot(self._format, self._format.cells(state))
        except UnknownStateFormat as reason:
            native_log.warning("a state cannot be saved: %s", reason)
            return None

    def state_of(self, seq: int, start: int, end: int) -> State | None:
        """Returns the state of positions from `start` up to `end` of `seq`, saved from the spare sequence.

        Returns None if a position is missing, or if the positions exceed the sliding window: the library does not save
        cells that no later row attends to.
        """
        self._check_ids(seq)
        if self.window and end - start > self.window:
            return None
        self._share(seq, self._spare, start, end)
        try:
            whole = (self.first_position(self._spare), self.last_position(self._spare)) == (start, end - 1)
            return self.get_state(self._spare) if whole else None
        finally:
            self.drop(self._spare)

    def load(self, seq: int, parts: Sequence[StatePart]) -> bool:
        """Appends `parts` to `seq`. Returns False, with nothing changed, if there are too few cells or a state has
        another format.

        Raises NativeFault, with the sequence empty, if the library refuses the new state and then also the old one.
        """
        length = self.length(seq)
        assert [part.start for part in parts] == [length, *(part.end for part in parts[:-1])], "parts are consecutive"
        if parts[-1].end > self.sequence_cells:
            return False
        if not self.divisible:
            return self._load_whole(seq, parts)
        if self._format is None:
            return self._load_each(seq, length, parts)
        try:
            return self._load_joined(self._format, seq, length, parts)
        except UnknownStateFormat as reason:
            native_log.debug("a state is not loaded: %s", reason)
            return False

    def _load_joined(self, state_format: StateFormat, seq: int, length: int, parts: Sequence[StatePart]) -> bool:
        """Joins blocks to one state and loads it. Raises UnknownStateFormat, with nothing changed."""
        positions, coordinates = self.row_positions[seq], state_format.coordinates(parts)
        first, last = int(coordinates[0, 0]), int(coordinates[0, -1])
        if not positions.continued_by(length, first):
            raise UnknownStateFormat(f"a state at position {first} does not follow {length} rows")
        if self.unified:
            done = self._load_spare(seq, state_format.join(parts), first, last + 1)
        else:
            done = self._append_state(state_format, seq, length, parts)
        if done:
            self.row_positions[seq] = positions.extended(length, coordinates)
        return done

    def _append_state(self, state_format: StateFormat, seq: int, length: int, parts: Sequence[StatePart]) -> bool:
        """Per-slot KV: replaces the content of `seq` by its `length` rows and `parts`."""
        positions, before = self.row_positions[seq], self._numbered_state(seq) if length else None
        if before is None:
            return not length and self.set_state(seq, state_format.join(parts, self.streams, seq))
        state = state_format.join([StatePart(before, 0, length), *parts], self.streams, seq)
        if self.set_state(seq, state):
            return True
        if not self.set_state(seq, before):
            raise NativeFault(
                f"sequence {seq} lost its {length} positions: its state could not be restored after a failed load"
            )
        self.row_positions[seq] = positions
        return False

    def _load_each(self, seq: int, length: int, parts: Sequence[StatePart]) -> bool:
        """Loads states that the library has cut, one after the other. On failure drops the new positions."""
        for part in parts:
            if not self._load_spare(seq, part.state, part.start, part.end):
                self.drop(seq, length or -1)
                return False
        return True

    def _load_spare(self, seq: int, state: State, start: int, end: int) -> bool:
        """Loads a state into the spare sequence, and shares its cells at positions from `start` up to `end` with `seq`.
        Returns False if the library refuses the state or a position is missing."""
        if not self.set_state(self._spare, state):
            return False
        if fits := self.first_position(self._spare) <= start and self.last_position(self._spare) >= end - 1:
            self._share(self._spare, seq, start, end)
        self.drop(self._spare)
        return fits

    def _load_whole(self, seq: int, parts: Sequence[StatePart]) -> bool:
        """Loads one state that cannot be cut into an empty sequence."""
        state, start, end = parts[0]
        if len(parts) > 1 or start or not self.set_state(seq, state):
            return False
        if self._sections > 1:
            try:
                self.row_positions[seq] = RowPositions.of(sequence_coordinates(state))
            except UnknownStateFormat as reason:
                native_log.debug("a state is not loaded: %s", reason)
        if self.intact(seq, end):
            return True
        self.drop(seq)
        return False

    def _numbered_state(self, seq: int) -> State | None:
        """Returns the state of `seq`, numbered if its format is known; None if the library cannot save it. Raises
        UnknownStateFormat."""
        state = self.get_state(seq)
        return state if state is None or self._format is None else self._format.numbered(state)

    def _share(self, source: int, target: int, start: int, end: int) -> None:
        """Adds the cells of `source` at positions from `start` up to `end` to `target`. Raises NativeFault with
        per-slot KV, where the native call would end the process."""
        if not self.unified:
            raise NativeFault("cells of one slot cannot be shared with another")
        native.llama_memory_seq_cp(self._memory, source, target, start, end)
