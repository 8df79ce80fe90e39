"""The KV cells of one model in either layout: copies, cuts, saved states and shifts, beside decodes.

With unified KV states pass through a spare sequence id, from which the target gets the cells. With per-slot KV a state
replaces what its sequence has: appending joins the old content and the new, by numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llama_cpp import llama_cpp as native

from engine.backend import NativeFault, Part, Snapshot, State
from engine.llama.decoder import Decoder
from engine.llama.library import FLASH_ATTENTION, log
from engine.llama.shift import Shifter
from engine.llama.state import Cells, StateFormat, UnknownLayout

# Tokens that are decoded when a context is opened, and the positions by which their state is moved.
PROBE_TOKENS, PROBE_SHIFT = (1, 2, 3), 5


class BlockSnapshot(NamedTuple):
    """A native state that is cut by numpy."""

    form: StateFormat
    cells: Cells

    def cut(self, start: int, end: int) -> State | None:
        """The block of these positions; None if some are missing."""
        return self.form.cut(self.cells, start, end)


class WholeSnapshot(NamedTuple):
    """A native state that cannot be cut."""

    state: State
    length: int

    def cut(self, start: int, end: int) -> State | None:
        """The state; None unless all positions are asked for."""
        return self.state if (start, end) == (0, self.length) else None


class SpareSnapshot(NamedTuple):
    """A sequence of a unified context whose states are cut by the library."""

    context: LlamaContext
    seq: int

    def cut(self, start: int, end: int) -> State | None:
        """The state of these positions; None if some are gone, or are more than the sliding window."""
        return self.context.state_of(self.seq, start, end)


class LlamaContext(Decoder):
    """A context of one model. Belongs to the thread that made it, `abort` excepted."""

    def __init__(self, model: Any, params: Any, *, partial: bool, window: int, shifting: bool = False) -> None:
        """Decodes a few tokens to prove the format of states. With `shifting` a context for shifts is opened too, if
        the model allows them. Raises NativeFault, with nothing left in memory."""
        super().__init__(model, params)
        self.partial = partial
        self.window = window
        self.flash: bool = params.flash_attn_type != FLASH_ATTENTION["off"]
        # Without flash attention llama.cpp multiplies a single row with the cells by another kernel on a CPU.
        self.prefill_rows = 1 if self.flash or not partial else 2
        if self.unified:
            self.sequences -= 1
        self._spare = self.sequences
        self._format: StateFormat | None = None
        self._shifter: Shifter | None = None
        try:
            if partial and not window:
                state = self._probe()
                if shifting and self._format is not None and state is not None:
                    self._shifter = self._open_shifter(model, params, self._format, state)
        except BaseException:
            self.close()
            raise
        self.shifts = self._shifter is not None

    @property
    def divisible(self) -> bool:
        """True if states can be cut: by numpy, or by the library with unified KV."""
        return self.partial and (self.unified or self._format is not None)

    def _probe(self) -> State | None:
        """Learns the format of states and proves it: the state of a few tokens is cut, joined, loaded elsewhere and
        compared. Returns that state; without proof None, and there is no format. The cells are empty afterwards."""
        try:
            self.batch.add(0, 0, self._probe_tokens(), 0)
            self.decode()
            state, middle, end = self.get_state(0), len(PROBE_TOKENS) - 1, len(PROBE_TOKENS)
            if state is None:
                raise UnknownLayout("the library saves no state")
            self._format = StateFormat.of(state)
            blocks = [(self._format.join([Part(state, *span)]), *span) for span in ((0, middle), (middle, end))]
            self.drop(0)
            target = self.sequences - 1
            loaded = all(self.load(target, [Part(*block)]) for block in blocks)
            again = self.get_state(target)
            whole = [self._format.join([Part(each, 0, end)]) for each in (state, again) if each is not None]
            if not loaded or len(whole) < 2 or not np.array_equal(whole[0], whole[1]):
                raise UnknownLayout("a state differs after it was cut, joined and loaded")
        except UnknownLayout as reason:
            self._format = None
            how = "the library cuts them" if self.unified else "they are kept whole"
            log.warning("the format of saved states is unknown, %s: %s", how, reason)
            return None
        finally:
            self.batch.clear()
            self.clear()
        return state

    def _probe_tokens(self) -> list[int]:
        return [min(token, self._vocabulary - 1) for token in PROBE_TOKENS]

    def _open_shifter(self, model: Any, params: Any, form: StateFormat, state: State) -> Shifter | None:
        """A context for shifts; None, with a line in the log, if the library cannot shift the model's keys."""
        shifter = None
        try:
            shifter = Shifter(model, params, form, self.sequence_cells, self.stop)
            if shifter.proven(state, self._probe_tokens(), PROBE_SHIFT):
                return shifter
            reason = "the library does not rotate this model's keys correctly"
        except NativeFault as fault:
            reason = str(fault)
        if shifter is not None:
            shifter.close()
        log.warning("cached tokens cannot be moved to other positions: %s", reason)
        return None

    def copy(self, source: int, target: int, length: int) -> bool:
        """Gives the empty `target` the first `length` positions of `source`, all if states are not divisible. False,
        with `target` empty, if some are gone or the library refuses the copy."""
        self._known(source, target)
        if not self.divisible:
            length = self.length(source)
        if not length:
            return True
        if self.unified:
            self._share(source, target, 0, length if self.divisible else -1)
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
                state = self._format.join([Part(state, 0, length)], self.streams, target)
            except UnknownLayout:
                return False
        return self.set_state(target, state)

    def _share(self, source: int, target: int, start: int, end: int) -> None:
        """Adds cells of `source` to `target`. The only call that would end the process with per-slot KV."""
        if not self.unified:
            raise NativeFault("cells of one slot cannot be shared with another")
        native.llama_memory_seq_cp(self._memory, source, target, start, end)

    def cut(self, seq: int, length: int) -> bool:
        """Drops positions from `length` on. False, with nothing changed, if the model can only drop all."""
        self._known(seq)
        return self.drop(seq, length or -1)

    def intact(self, seq: int, length: int) -> bool:
        """True if `seq` has `length` positions, and of these all that a row after them may attend to."""
        if self.length(seq) != length:
            return False
        if not length or not self.partial:  # recurrent state has only its last position
            return True
        first = self.first(seq)
        return 0 <= first <= max(0, length - self.window) if self.window else first == 0

    def length(self, seq: int) -> int:
        """Positions of `seq`."""
        self._known(seq)
        return self.last(seq) + 1

    def save(self, seq: int) -> Snapshot | None:
        """What `seq` holds; None if it is empty or the library cannot save it."""
        length = self.length(seq)
        if not length:
            return None
        if self.divisible and self._format is None:
            return SpareSnapshot(self, seq)
        state = self.get_state(seq)
        if state is None:
            return None
        return WholeSnapshot(state, length) if self._format is None else self._blocks(self._format, state)

    def _blocks(self, form: StateFormat, state: State) -> Snapshot | None:
        try:
            return BlockSnapshot(form, form.cells(state))
        except UnknownLayout as reason:
            log.warning("a state cannot be saved: %s", reason)
            return None

    def state_of(self, seq: int, start: int, end: int) -> State | None:
        """The state of these positions, which pass through the spare sequence; None if some are gone.

        The library leaves out what no row after the last could see through a sliding window: longer ones are refused.
        """
        self._known(seq)
        if self.window and end - start > self.window:
            return None
        self._share(seq, self._spare, start, end)
        try:
            whole = (self.first(self._spare), self.last(self._spare)) == (start, end - 1)
            return self.get_state(self._spare) if whole else None
        finally:
            self.drop(self._spare)

    def load(self, seq: int, parts: Sequence[Part]) -> bool:
        """Appends `parts` to `seq`. False, with nothing changed, if there are too few cells or a state does not fit.

        Raises NativeFault if a load failed and what the sequence had could not be loaded again: it is empty then.
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
        except UnknownLayout as reason:
            log.debug("a state is not loaded: %s", reason)
            return False

    def _load_joined(self, form: StateFormat, seq: int, length: int, parts: Sequence[Part]) -> bool:
        """Loads blocks as one state. Raises UnknownLayout, with nothing changed."""
        if self.unified:
            return self._load_spare(seq, form.join(parts), parts[0].start, parts[-1].end)
        before = self.get_state(seq) if length else None
        if before is None:
            return not length and self.set_state(seq, form.join(parts, self.streams, seq))
        state = form.join([Part(before, 0, length), *parts], self.streams, seq)
        if self.set_state(seq, state):
            return True
        if not self.set_state(seq, before):
            raise NativeFault(f"sequence {seq} lost its {length} positions when more could not be loaded")
        return False

    def _load_each(self, seq: int, length: int, parts: Sequence[Part]) -> bool:
        """Loads states that the library cut, one after the other."""
        for part in parts:
            if not self._load_spare(seq, part.state, part.start, part.end):
                self.drop(seq, length or -1)
                return False
        return True

    def _load_spare(self, seq: int, state: State, start: int, end: int) -> bool:
        """Loads a state into the spare sequence and gives `seq` its cells from `start` up to `end`."""
        if not self.set_state(self._spare, state):
            return False
        if fits := self.first(self._spare) <= start and self.last(self._spare) >= end - 1:
            self._share(self._spare, seq, start, end)
        self.drop(self._spare)
        return fits

    def _load_whole(self, seq: int, parts: Sequence[Part]) -> bool:
        """Loads one state that cannot be cut into an empty sequence."""
        state, start, end = parts[0]
        if len(parts) > 1 or start or not self.set_state(seq, state):
            return False
        if self.intact(seq, end):
            return True
        self.drop(seq)
        return False

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """The block of positions from `start + by` up to `end + by`; None if it cannot be made. Raises Aborted."""
        return self._shifter.shift(state, start, end, by) if self._shifter is not None else None

    def _known(self, *sequences: int) -> None:
        if not all(0 <= seq < self.sequences for seq in sequences):
            raise NativeFault(f"a sequence id outside 0..{self.sequences - 1} in {sequences}")

    def close(self) -> None:
        """Frees the context, which is not used again."""
        if self._shifter is not None:
            self._shifter.close()
        super().close()
