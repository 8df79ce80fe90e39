"""The context of one model with unified or per-slot KV: decodes, copies, cuts, saved states and shifts.

The length of a sequence is its number of rows, in all methods that are of `engine.backend.Context`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.backend import NativeFault, State, StatePart
from engine.llama.library import FLASH_ATTENTION, native_log
from engine.llama.rollback import verified_rollback
from engine.llama.saved_states import SavingDecoder
from engine.llama.shift import Shifter
from engine.llama.state import StateFormat, UnknownStateFormat
from engine.llama.top_k_chains import TopKChains

# Tokens that are decoded when a context is opened, and the number of positions by which their state is then shifted.
PROBE_TOKENS, PROBE_SHIFT = (1, 2, 3), 5


class LlamaContext(SavingDecoder):
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
        super().__init__(model, params, chains, partial=partial, window=window)
        self.max_rollback = None if partial else self.snapshots
        self.flash: bool = params.flash_attn_type != FLASH_ATTENTION["off"]
        # On a CPU without flash attention, llama.cpp uses a different kernel for a pass with a single row.
        self.prefill_rows = 1 if self.flash or not partial else 2
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
            state = self._format.numbered(state)
            blocks = [(self._format.join([StatePart(state, *span)]), *span) for span in ((0, middle), (middle, end))]
            self.drop(0)
            target = self.sequences - 1
            loaded = all(self.load(target, [StatePart(*block)]) for block in blocks)
            again = self._numbered_state(target)
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
        """Copies the first `length` rows of `source` to the empty `target`, all rows if states are not divisible.

        Returns False, with `target` empty, if a row is missing or the library refuses the state, and with unified KV
        also if the rows end within an image that has one position.
        """
        self._check_ids(source, target)
        if not self.divisible:
            length = self.length(source)
        if not length:
            return True
        positions = self.row_positions[source]
        if self.unified:
            if self._divides_image(source, length):
                return False
            self._share(source, target, 0, positions.at(length) if self.divisible else -1)
            if not self.copy_snapshot(source, target):
                return False
        elif not self._copy_state(source, target, length):
            return False
        self.row_positions[target] = positions.cut(length)
        if self.intact(target, length):
            return True
        self.drop(target)
        return False

    def _copy_state(self, source: int, target: int, length: int) -> bool:
        try:
            state = self._numbered_state(source)
            if state is not None and self._format is not None:
                state = self._format.join([StatePart(state, 0, length)], self.streams, target)
        except UnknownStateFormat:
            return False
        return state is not None and self.set_state(target, state)

    def cut(self, seq: int, length: int) -> bool:
        """Drops the rows of `seq` from `length` on. Returns False, with nothing changed, if the model can only drop
        whole sequences, and with an image dropped that has one position if its part before `length` cannot be kept."""
        self._check_ids(seq)
        if self._divides_image(seq, length):
            return self._cut_image(seq, length)
        positions = self.row_positions[seq]
        if not self.drop(seq, positions.at(length) if length else -1):
            return False
        if 0 < length < len(positions.listed):
            self.row_positions[seq] = positions.cut(length)
        return True

    def _divides_image(self, seq: int, length: int) -> bool:
        """Returns True if the row before `length` and the one at `length` have one position."""
        if seq not in self.row_positions or not 0 < length < self.length(seq):
            return False
        return self.row_positions[seq].image_start(length) < length

    def _cut_image(self, seq: int, length: int) -> bool:
        """Drops the image around `length`, as its cells have one position, and loads its rows before `length` again."""
        start = self.row_positions[seq].image_start(length)
        snapshot = self.save(seq) if self.divisible else None
        state = snapshot.cut(start, length) if snapshot is not None else None
        return self.cut(seq, start) and state is not None and self.load(seq, [StatePart(state, start, length)])

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
