"""The context of a model with an MTP layer (llama.cpp: NextN): a second context over the same weights has the layer's
cells, which follow the model's.

The layer computes a token at position p, given the last hidden state of position p - 1, and predicts the token at
p + 1. So each row of the model gives a row of the layer, once the next token is known. Rows are computed in batches,
before a draft, a copy or a saved state needs their cells.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from llama_cpp import llama_cpp as native
from llama_cpp import llama_cpp_ext as staged

from engine.adapters import AdapterSet
from engine.backend import HostWork, Logits, NativeFault, Snapshot, State, StatePart, no_host_work
from engine.llama.context import LlamaContext
from engine.llama.library import native_log
from engine.llama.mtp_layer import Hidden, MtpLayer
from engine.llama.threads import ThreadPools

# Maximum rows of all sequences together that the layer has not computed.
MAX_LAG_ROWS = 256
# Bytes of the length of the model's part of a saved state, which precedes both parts.
_LENGTH_BYTES = 8


class _Lag:
    """The rows of one sequence that the layer has not computed: positions from `start` up to `end`."""

    __slots__ = ("hidden", "start", "tokens")

    def __init__(self, start: int, carry: Hidden) -> None:
        self.start = start
        self.tokens = array("i")
        self.hidden = carry
        """Last hidden states of the position before `start` and of the rows, [1 + rows, width]."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def append(self, tokens: array[int], hidden: Hidden) -> None:
        self.tokens.extend(tokens)
        self.hidden = np.concatenate((self.hidden, hidden))

    def cut(self, length: int) -> None:
        del self.tokens[length - self.start :]
        self.hidden = self.hidden[: len(self.tokens) + 1]


class _Drafted(NamedTuple):
    """The drafted rows of one sequence in the layer's cells: their number, and the state of the last one."""

    rows: int
    hidden: Hidden


class _BothSnapshots(NamedTuple):
    """Snapshots of one sequence in the model's cells and in those of the MTP layer."""

    model: Snapshot
    layer: Snapshot

    def cut(self, start: int, end: int) -> State | None:
        """Returns both states of positions from `start` up to `end` as one; None if one is missing."""
        model, layer = self.model.cut(start, end), self.layer.cut(start, end)
        if model is None or layer is None:
            return None
        return np.concatenate((np.array([model.nbytes], np.int64).view(np.uint8), model, layer))


def _split(part: StatePart) -> tuple[StatePart, StatePart]:
    length = int(part.state[:_LENGTH_BYTES].view(np.int64)[0])
    states = part.state[_LENGTH_BYTES : _LENGTH_BYTES + length], part.state[_LENGTH_BYTES + length :]
    return StatePart(states[0].copy(), part.start, part.end), StatePart(states[1].copy(), part.start, part.end)


class MtpContext(LlamaContext):
    """The context of a model with an MTP layer, whose cells follow those of the model. A `DraftHead`.

    The hidden state before the first row that a sequence computes is unknown if its cells were loaded, or copied from a
    part of a sequence. Zeros replace it, which only makes drafts worse.
    """

    def __init__(self, model: Any, params: Any, *, partial: bool, window: int) -> None:
        """See `LlamaContext`. Raises NativeFault, with nothing left in memory."""
        self._layer: MtpLayer | None = None
        self._has_layer = False  # stays True after a fault has closed the layer, as saved states have both parts
        self._recorded = True
        self._lags: dict[int, _Lag] = {}
        self._drafted: dict[int, _Drafted] = {}
        self._width: int = native.llama_model_n_embd_out(model)
        super().__init__(model, params, partial=partial, window=window)
        staged.llama_set_embeddings_nextn(self._handle, True, False)
        try:
            self._layer = MtpLayer(model, params, self._handle, window=window)
        except BaseException:
            super().close()
            raise
        self.stop.install(self._layer._handle)
        self._has_layer = True

    # ── drafts ──

    def draft(self, tokens: Sequence[tuple[int, int]]) -> Logits:
        """See `engine.draft_head.DraftHead.draft`."""
        if self._layer is None or not self._try_catch_up([seq for seq, _ in tokens]):
            raise NativeFault("the MTP layer was closed after a failed decode")
        layer = self._layer
        layer.batch.clear()
        for seq, token in tokens:
            lag = self._lag(seq)
            drafted = self._drafted.get(seq) or _Drafted(0, lag.hidden[-1:])
            layer.add(seq, lag.end + drafted.rows, [token], drafted.hidden, 1)
        logits = layer.decode()
        states = layer.output_states()
        for i, (seq, _) in enumerate(tokens):
            rows = self._drafted[seq].rows if seq in self._drafted else 0
            self._drafted[seq] = _Drafted(rows + 1, states[i : i + 1])
        return logits

    def rewind(self) -> None:
        """Drops the rows of all calls of `draft`."""
        for seq in self._drafted:
            if self._layer is not None:
                self._layer.cut(seq, self._lag(seq).end)
        self._drafted.clear()

    # ── rows ──

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """See `Decoder.decode`. Records the hidden states of all rows."""

        def recording_work() -> None:
            self._recorded = self._layer is None
            host_work()

        logits = super().decode(recording_work)
        self._record()
        return logits

    def _record(self) -> None:
        """Records the hidden states of the last decode, unless they are recorded already, as by host work that saves a
        sequence."""
        if self._recorded:
            return
        self._recorded = True
        batch, rows = self.batch, self.batch.rows
        states = np.ctypeslib.as_array(staged.llama_get_embeddings_nextn(self._handle), (rows, self._width))
        firsts = [0, *(np.flatnonzero(np.diff(batch.seq[:rows])) + 1).tolist(), rows]
        for first, end in pairwise(firsts):
            lag = self._lag(int(batch.seq[first]), int(batch.pos[first]))
            lag.append(array("i", batch.token[first:end].tolist()), states[first:end])
        self._bound_lag()

    def decode_embeddings(self, seq: int, start: int, rows: Hidden, *, causal: bool) -> None:
        """See `Decoder.decode_embeddings`. The layer gets rows of token 0 and of zeros, as no drafts follow images."""
        super().decode_embeddings(seq, start, rows, causal=causal)
        if self._layer is not None:
            count = len(rows)
            self._lag(seq, start).append(array("i", [0] * count), np.zeros((count, self._width), np.float32))
            self._bound_lag()

    def _bound_lag(self) -> None:
        if sum(len(lag.tokens) for lag in self._lags.values()) > MAX_LAG_ROWS:
            self._try_catch_up([*self._lags])

    def _lag(self, seq: int, start: int | None = None) -> _Lag:
        """Returns the uncomputed rows of `seq`, which has `start` positions; None stands for its length."""
        if seq not in self._lags:
            start = self.length(seq) if start is None else start
            self._lags[seq] = _Lag(start, np.zeros((1, self._width), np.float32))
        return self._lags[seq]

    def _catch_up(self, sequences: Sequence[int]) -> None:
        """Computes all rows of `sequences` that the layer lacks."""
        assert self._layer is not None, "callers know that the layer is open"
        layer = self._layer
        layer.batch.clear()
        for seq in sorted(sequences):
            lag = self._lags.get(seq)
            while lag is not None and lag.tokens:
                if layer.batch.rows == layer.batch.capacity:
                    layer.decode()
                    layer.batch.clear()
                rows = min(len(lag.tokens), layer.batch.capacity - layer.batch.rows)
                layer.add(seq, lag.start, lag.tokens[:rows], lag.hidden[:rows])
                lag.start, lag.tokens, lag.hidden = lag.start + rows, lag.tokens[rows:], lag.hidden[rows:].copy()
        if layer.batch.rows:
            layer.decode()

    def _try_catch_up(self, sequences: Sequence[int]) -> bool:
        """Computes all rows of `sequences` that the layer lacks. Returns False if that fails, which closes the layer:
        its cells do not follow those of the model any more."""
        try:
            self._catch_up(sequences)
        except Exception as error:
            native_log.warning("the MTP layer drafts no more: %r", error)
            self._close_layer()
        return self._layer is not None

    # ── sequences ──

    def copy(self, source: int, target: int, length: int) -> bool:
        """See `engine.backend.Context.copy`."""
        if not super().copy(source, target, length):
            return False
        if self._layer is None:
            return True
        self._lags.pop(target, None)
        lag = self._lags.get(source)
        if lag is not None and length > lag.start and not self._try_catch_up([source]):
            return True
        if not self._layer.copy(source, target, length):
            super().cut(target, 0)
            return False
        if lag is not None and lag.end == length:
            self._lags[target] = _Lag(length, lag.hidden[-1:])
        return True

    def cut(self, seq: int, length: int) -> bool:
        """See `engine.backend.Context.cut`."""
        if not super().cut(seq, length):
            return False
        if self._layer is not None:
            self._cut_layer(self._layer, seq, length)
        return True

    def _cut_layer(self, layer: MtpLayer, seq: int, length: int) -> None:
        lag = self._lags.get(seq)
        if lag is not None and lag.start <= length < lag.end:
            lag.cut(length)
        elif lag is None or length < lag.start:
            layer.cut(seq, length)
            self._lags.pop(seq, None)

    def save(self, seq: int) -> Snapshot | None:
        """See `engine.backend.Context.save`."""
        self._record()
        if self._layer is None or not self._try_catch_up([seq]):
            return None
        saved, layer = super().save(seq), self._layer.save(seq)
        return None if saved is None or layer is None else _BothSnapshots(saved, layer)

    def load(self, seq: int, parts: Sequence[StatePart]) -> bool:
        """See `engine.backend.Context.load`."""
        if not self._has_layer:
            return super().load(seq, parts)
        if self._layer is not None:
            self._try_catch_up([seq])
        length, split, layer = self.length(seq), [_split(part) for part in parts], self._layer
        self._lags.pop(seq, None)
        try:
            if not super().load(seq, [model for model, _ in split]):
                return False
            if layer is None or layer.load(seq, [own for _, own in split]):
                return True
        except NativeFault:
            if layer is not None:
                layer.cut(seq, 0)
            raise
        super().cut(seq, length)
        return False

    def clear(self) -> None:
        """Frees every cell."""
        super().clear()
        self._lags.clear()
        if self._layer is not None:
            self._layer.clear()

    # ── settings ──

    def set_adapters(self, adapters: AdapterSet) -> bool:
        """See `engine.backend.Context.set_adapters`."""
        if self._layer is not None:
            self._layer.adapters = self.adapters
            self._layer.set_adapters(adapters)
        return super().set_adapters(adapters)

    def attach(self, pools: ThreadPools) -> None:
        """See `Decoder.attach`."""
        super().attach(pools)
        if self._layer is not None:
            pools.attach(self._layer._handle)

    def _close_layer(self) -> None:
        if self._layer is not None:
            self._layer.close()
        self._layer = None
        self._lags.clear()
        self._drafted.clear()

    def close(self) -> None:
        """Frees the contexts, which must not be used again."""
        self._close_layer()
        super().close()
