"""The context of one model with unified or per-slot KV: decodes, copies, cuts, saved states and shifts.

With unified KV a state is loaded into a spare sequence id, and the target sequence then shares the spare one's cells.
With per-slot KV the library can only replace the content of a sequence: to append a state, numpy joins it with the old
content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llama_cpp import llama_cpp as native

from engine.backend import NativeFault, Snapshot, State, StatePart
from engine.llama.decoder import Decoder
from engine.llama.library import FLASH_ATTENTION, native_log
from engine.llama.rollback import verified_rollback
from engine.llama.shift import Shifter
from engine.llama.state import StateCells, StateFormat, UnknownStateFormat
from engine.llama.top_k_chains import TopKChains

# Tokens that are decoded when a context is opened, and the number of positions by which their state is then shifted.
PROBE_TOKENS, PROBE_SHIFT = (1, 2, 3), 5


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

    context: LlamaContext
    seq: int

    def cut(self, start: int, end: int) -> State | None:
        """Returns the state of positions from `start` up to `end`; see `LlamaContext.state_of`."""
        return self.context.state_of(self.seq, start, end)


class LlamaContext(Decoder):
    """A context of one model. Belongs to the thread that created it, except `abort`."""

    def __init__(
        self,
        model: Any,
        params: Any,
        chains: TopKChains | None = None,
        *,
        partial: bool,
        window: int,
        shifting: bool = False,
    ) -> None:
        """Opens a context, or takes that of `chains`, and decodes a few tokens to verify the format of states. With
        `shifting`, also opens one for shifts if the library can shift the model's keys. `partial` and `window` are
        those of `engine.backend.Context`. Raises NativeFault, with nothing left in memory."""
        self._shifter: Shifter | None = None
        super().__init__(model, params, chains=chains)
        self.partial, self.window = partial, window
        self.max_rollback = None if partial else self.snapshots
        self.flash: bool = params.flash_attn_type != FLASH_ATTENTION["off"]
        # On a CPU without flash attention, llama.cpp uses a different kernel for a pass with a single row.
        self.prefill_rows = 1 if self.flash or not partial else 2
        if self.unified:
            self.sequences -= 1
        self._spare = self.sequences
        self._format: StateFormat | None = None
        try:
            if partial and not window:
                state = self._probe()
                if shifting and self._format is not None and state is not None:
                    self._shifter = self._open_shifter(model, params, self._format, state)
            if self.max_rollback:
                self.max_rollback = verified_rollback(self, _probe_tokens(self._vocabulary), self.max_rollback)
        except BaseException:
            self.close()
            raise
        self.shifts = self._shifter is not None

    @property
    def divisible(self) -> bool:
        """True if states can be cut: by numpy if their format is known, or by the library with unified KV."""
        return self.partial and (self.unified or self._format is not None)

    def _probe(self) -> State | None:
        """Determines and verifies the format of states: the state of a few tokens is cut, loaded into another sequence
        and compared. Returns that state; None, with `_format` None, if the verification fails. The cells are empty
        afterwards."""
        try:
            self.batch.add(0, 0, _probe_tokens(self._vocabulary), 0)
            self.decode()
            state, middle, end = self.get_state(0), len(PROBE_TOKENS) - 1, len(PROBE_TOKENS)
            if state is None:
                raise UnknownStateFormat("the library saves no state")
            self._format = StateFormat.of(state)
            blocks = [(self._format.join([StatePart(state, *span)]), *span) for span in ((0, middle), (middle, end))]
            self.drop(0)
            target = self.sequences - 1
            loaded = all(self.load(target, [StatePart(*block)]) for block in blocks)
            again = self.get_state(target)
            joined = [self._format.join([StatePart(each, 0, end)]) for each in (state, again) if each is not None]
            if not loaded or len(joined) < 2 or not np.array_equal(joined[0], joined[1]):
                raise UnknownStateFormat("a state differs after it was cut, joined and loaded")
        except UnknownStateFormat as reason:
            self._format = None
            effect = "the library cuts them" if self.unified else "they are kept whole"
            native_log.warning("the format of saved states is unknown, %s: %s", effect, reason)
            return None
        finally:
            self.batch.clear()
            self.clear()
        return state

    def _open_shifter(self, model: Any, params: Any, state_format: StateFormat, state: State) -> Shifter | None:
        """Opens a context for shifts. Returns None, with a warning, if the library cannot shift the model's keys."""
        shifter = None
        try:
            shifter = Shifter(model, params, state_format, self.sequence_cells, self.stop)
            if shifter.verify(state, _probe_tokens(self._vocabulary), PROBE_SHIFT):
                return shifter
            reason = "the library does not rotate this model's keys correctly"
        except NativeFault as fault:
            reason = str(fault)
        if shifter is not None:
            shifter.close()
        native_log.warning("cached tokens cannot be moved to other positions: %s", reason)
        return None

    def copy(self, source: int, target: int, length: int) -> bool:
        """Copies the first `length` positions of `source` to the empty `target`. Copies all positions if states are not
        divisible. Returns False, with `target` empty, if a position is missing or the library refuses the state."""
        self._check_ids(source, target)
        if not self.divisible:
            length = self.length(source)
        if not length:
            return True
        if self.unified:
            self._share(source, target, 0, length if self.divisible else -1)
            if not self.copy_snapshot(source, target):
                return False
        elif not self._copy_state(source, target, length):
            return False
        if self.intact(target, length):
            return True
        self.drop(target)
        return False

    def _copy_state(self, source: int, target: int, length: int) -> bool:
        state = self.get_state(source)
        if state is None:
            return False
        if self.divisible:
            assert self._format is not None
            try:
                state = self._format.join([StatePart(state, 0, length)], self.streams, target)
            except UnknownStateFormat:
                return False
        return self.set_state(target, state)

    def _share(self, source: int, target: int, start: int, end: int) -> None:
        """Adds the cells of `source` from `start` up to `end` to `target`. Raises NativeFault with per-slot KV, where
        the native call would end the process."""
        if not self.unified:
            raise NativeFault("cells of one slot cannot be shared with another")
        native.llama_memory_seq_cp(self._memory, source, target, start, end)

    def cut(self, seq: int, length: int) -> bool:
        """Drops the positions of `seq` from `length` on. Returns False, with nothing changed, if the model can only
        drop whole sequences."""
        self._check_ids(seq)
        return self.drop(seq, length or -1)

    def intact(self, seq: int, length: int) -> bool:
        """Returns True if `seq` has `length` positions, and cells for all positions that the next row attends to."""
        if self.length(seq) != length:
            return False
        if not length or not self.partial:  # a recurrent state has only its last position
            return True
        first = self.first_position(seq)
        return 0 <= first <= max(0, length - self.window) if self.window else first == 0

    def save(self, seq: int) -> Snapshot | None:
        """Returns a snapshot of `seq`; None if `seq` is empty or its state cannot be saved."""
        length = self.length(seq)
        if not length:
            return None
        if self.divisible and self._format is None:
            return LibrarySnapshot(self, seq)
        state = self.get_state(seq)
        if state is None:
            return None
        return WholeSnapshot(state, length) if self._format is None else self._blocks(self._format, state)

    def _blocks(self, state_format: StateFormat, state: State) -> Snapshot | None:
        try:
            return BlockSnapshot(state_format, state_format.cells(state))
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
        if self.unified:
            return self._load_spare(seq, state_format.join(parts), parts[0].start, parts[-1].end)
        before = self.get_state(seq) if length else None
        if before is None:
            return not length and self.set_state(seq, state_format.join(parts, self.streams, seq))
        state = state_format.join([StatePart(before, 0, length), *parts], self.streams, seq)
        if self.set_state(seq, state):
            return True
        if not self.set_state(seq, before):
            raise NativeFault(
                f"sequence {seq} lost its {length} positions: its state could not be restored after a failed load"
            )
        return False

    def _load_each(self, seq: int, length: int, parts: Sequence[StatePart]) -> bool:
        """Loads states that the library has cut, one after the other. On failure drops the new positions."""
        for part in parts:
            if not self._load_spare(seq, part.state, part.start, part.end):
                self.drop(seq, length or -1)
                return False
        return True

    def _load_spare(self, seq: int, state: State, start: int, end: int) -> bool:
        """Loads a state into the spare sequence, and shares its cells from `start` up to `end` with `seq`. Returns
        False if the library refuses the state or a position is missing."""
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
        if self.intact(seq, end):
            return True
        self.drop(seq)
        return False

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """Returns the block of positions from `start` up to `end` of `state`, moved by `by` positions; None if it
        cannot be moved. Raises Aborted."""
        return self._shifter.shift(state, start, end, by) if self._shifter is not None else None

    def close(self) -> None:
        """Frees the context, which must not be used again."""
        if self._shifter is not None:
            self._shifter.close()
        super().close()


def _probe_tokens(vocabulary: int) -> list[int]:
    return [min(token, vocabulary - 1) for token in PROBE_TOKENS]
