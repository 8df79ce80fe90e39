"""The context of a model with MTP layers (llama.cpp: NextN): further contexts over the same weights have the layers'
cells, which follow the model's.

A layer computes a token at position p, given the last hidden state of position p - 1, and predicts the token at p + 1.
So each row of the model gives a row of each layer, once the next token is known. Rows are computed in batches, before a
draft, a copy or a saved state needs their cells.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from llama_cpp import llama_cpp as native
from llama_cpp import llama_cpp_ext as staged

from engine.adapters import AdapterSet
from engine.backend import Aborted, HostWork, Logits, NativeFault, Snapshot, StatePart, no_host_work
from engine.llama.context import LlamaContext
from engine.llama.library import native_log
from engine.llama.mtp_layer import Hidden, MtpLayer
from engine.llama.mtp_layers import JointSnapshot, MtpLayers, split_parts
from engine.llama.row_positions import Coordinates
from engine.llama.threads import ThreadPools
from engine.llama.top_k_chains import TopKChains

# Maximum rows of all sequences together that the layers have not computed.
MAX_LAG_ROWS = 256


class _Lag:
    """The rows of one sequence that the layers have not computed: positions from `start` up to `end`."""

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
    """The drafted rows of one sequence: their tokens, and the hidden states of the positions before each of them and
    before the next one."""

    tokens: list[int]
    hidden: Hidden


class MtpContext(LlamaContext):
    """The context of a model with MTP layers, whose cells follow those of the model. A `DraftHead`.

    One layer drafts any number of tokens. Of several, each drafts one: it computes the whole draft so far, which no
    other layer has computed in its cells, with the hidden states that the layers before predicted. Layers that read the
    model's cells need only its last hidden state, so that rows are not computed, and states have no parts of layers.

    The hidden state before the first row that a sequence computes is unknown if its cells were loaded, or copied from a
    part of a sequence. Zeros replace it, which only makes drafts worse.
    """

    def __init__(
        self, model: Any, head: Any, params: Any, chains: TopKChains | None = None, *, partial: bool, window: int
    ) -> None:
        """See `LlamaContext`. `head` is the model with the MTP layers, which may be `model`. Raises NativeFault, with
        nothing left in memory."""
        self._layers: MtpLayers | None = None
        self._parts = 1  # of a saved state; unchanged after a fault has closed the layers
        self._recorded = True
        self._lags: dict[int, _Lag] = {}
        self._drafted: dict[int, _Drafted] = {}
        self._width: int = native.llama_model_n_embd_out(model)
        super().__init__(model, params, chains, partial=partial, window=window)
        staged.llama_set_embeddings_nextn(self._handle, True, False)
        try:
            self._layers = MtpLayers(head, params, self._handle, window=window)
        except BaseException:
            super().close()
            raise
        for layer in self._layers.contexts:
            self.stop.install(layer._handle)
        self._parts += len(self._layers)
        self._own = head == model
        self.max_draft = len(self._layers) if len(self._layers) > 1 else None

    # ── drafts ──

    def draft(self, tokens: Sequence[tuple[int, int]]) -> Logits:
        """See `engine.draft_head.DraftHead.draft`."""
        if self._layers is None or not self._try_catch_up([seq for seq, _ in tokens]):
            raise NativeFault("the MTP layers were closed after a failed decode")
        drafted = [self._drafted.setdefault(seq, _Drafted([], self._lag(seq).hidden[-1:])) for seq, _ in tokens]
        place = len(drafted[0].tokens)
        if self.max_draft is not None and place >= self.max_draft:
            raise NativeFault(f"{self.max_draft} MTP layers draft at most {self.max_draft} tokens")
        first, layer = (place, 0) if self.max_draft is None else (0, place)
        offset = first if len(self._layers) else 0  # layers without cells compute all rows at the same position
        return self._draft(self._layers.contexts[layer], tokens, drafted, first, offset)

    def _draft(
        self, layer: MtpLayer, tokens: Sequence[tuple[int, int]], drafted: list[_Drafted], first: int, offset: int
    ) -> Logits:
        """Computes `tokens` after the rows from `first` on of `drafted`, at positions from `offset` on after the
        model's last one."""
        layer.batch.clear()
        for (seq, token), rows in zip(tokens, drafted, strict=True):
            rows.tokens.append(token)
            layer.add(seq, self._lag(seq).end + offset, rows.tokens[first:], rows.hidden[first:], 1)
        logits = layer.decode()
        states = layer.output_states()
        for i, ((seq, _), rows) in enumerate(zip(tokens, drafted, strict=True)):
            self._drafted[seq] = _Drafted(rows.tokens, np.concatenate((rows.hidden, states[i : i + 1])))
        return logits

    def rewind(self) -> None:
        """Drops the rows of all calls of `draft`."""
        for seq in self._drafted:
            if self._layers is not None:
                self._layers.cut(seq, self._lag(seq).end)
        self._drafted.clear()

    # ── rows ──

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """See `Decoder.decode`. Records the hidden states of all rows."""

        def recording_work() -> None:
            self._recorded = self._layers is None
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
        states = self._hidden_states(rows)
        firsts = [0, *(np.flatnonzero(np.diff(batch.seq[:rows])) + 1).tolist(), rows]
        for first, end in pairwise(firsts):
            lag = self._lag(int(batch.seq[first]), int(batch.pos[first]))
            lag.append(array("i", batch.token[first:end].tolist()), states[first:end])
        self._bound_lag()

    def decode_embeddings(
        self, seq: int, start: int, rows: Hidden, *, causal: bool, positions: Coordinates | None = None
    ) -> None:
        """See `Decoder.decode_embeddings`. The layers have no input for embeddings and get token 0."""
        super().decode_embeddings(seq, start, rows, causal=causal, positions=positions)
        if self._layers is not None:
            self._lag(seq, start).append(array("i", bytes(4 * len(rows))), self._hidden_states(len(rows)))
            self._bound_lag()

    def _hidden_states(self, rows: int) -> Hidden:
        """Returns the last hidden states of the last decode, which had `rows` rows."""
        return np.ctypeslib.as_array(staged.llama_get_embeddings_nextn(self._handle), (rows, self._width))

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
        """Computes all rows of `sequences` that the layers lack."""
        assert self._layers is not None, "callers know that the layers are open"
        layers = self._layers
        layers.clear_batch()
        for seq in sorted(sequences):
            lag = self._lags.get(seq)
            while lag is not None and lag.tokens:
                if not layers.room:
                    layers.decode()
                rows = min(len(lag.tokens), layers.room)
                layers.add(seq, lag.start, lag.tokens[:rows], lag.hidden[:rows])
                lag.start, lag.tokens, lag.hidden = lag.start + rows, lag.tokens[rows:], lag.hidden[rows:].copy()
        layers.decode()

    def _try_catch_up(self, sequences: Sequence[int]) -> bool:
        """Computes all rows of `sequences` that the layers lack. Returns False if that fails, which closes the layers:
        their cells do not follow those of the model any more."""
        try:
            self._catch_up(sequences)
        except Exception as error:
            # An engine that is closed aborts them.
            level = logging.DEBUG if isinstance(error, Aborted) else logging.WARNING
            native_log.log(level, "the MTP layers draft no more: %r", error)
            self._close_layers()
        return self._layers is not None

    # ── sequences ──

    def copy(self, source: int, target: int, length: int) -> bool:
        """See `engine.backend.Context.copy`."""
        if not super().copy(source, target, length):
            return False
        if self._layers is None:
            return True
        self._lags.pop(target, None)
        lag = self._lags.get(source)
        if lag is not None and length > lag.start and not self._try_catch_up([source]):
            return True
        if not self._layers.copy(source, target, length):
            super().cut(target, 0)
            return False
        if lag is not None and lag.end == length:
            self._lags[target] = _Lag(length, lag.hidden[-1:])
        return True

    def cut(self, seq: int, length: int) -> bool:
        """See `engine.backend.Context.cut`."""
        if not super().cut(seq, length):
            return False
        if self._layers is not None:
            self._cut_layers(self._layers, seq, length)
        return True

    def _cut_layers(self, layers: MtpLayers, seq: int, length: int) -> None:
        lag = self._lags.get(seq)
        if lag is not None and lag.start <= length < lag.end:
            lag.cut(length)
        elif lag is None or length < lag.start:
            layers.cut(seq, length)
            self._lags.pop(seq, None)

    def save(self, seq: int) -> Snapshot | None:
        """See `engine.backend.Context.save`."""
        self._record()
        if self._parts == 1:
            return super().save(seq)
        if self._layers is None or not self._try_catch_up([seq]):
            return None
        saved, layers = super().save(seq), self._layers.save(seq)
        return None if saved is None or layers is None else JointSnapshot((saved, *layers))

    def load(self, seq: int, parts: Sequence[StatePart]) -> bool:
        """See `engine.backend.Context.load`."""
        if self._layers is not None:
            self._try_catch_up([seq])
        self._lags.pop(seq, None)
        if self._parts == 1:
            return super().load(seq, parts)
        length, layers = self.length(seq), self._layers
        own, *of_layers = split_parts(parts, self._parts)
        try:
            if not super().load(seq, own):
                return False
            if layers is None or layers.load(seq, of_layers):
                return True
        except NativeFault:
            self.cut(seq, 0)
            raise
        self.cut(seq, length)
        return False

    def clear(self) -> None:
        """Frees every cell."""
        super().clear()
        self._lags.clear()
        if self._layers is not None:
            self._layers.clear()

    # ── settings ──

    def set_adapters(self, adapters: AdapterSet) -> bool:
        """See `engine.backend.Context.set_adapters`."""
        if self._layers is not None and self._own:  # an adapter was loaded for the model's layers only
            self._layers.set_adapters(self.adapters, adapters)
        return super().set_adapters(adapters)

    def attach(self, pools: ThreadPools) -> None:
        """See `Decoder.attach`."""
        super().attach(pools)
        if self._layers is not None:
            self._layers.attach(pools)

    def _close_layers(self) -> None:
        if self._layers is not None:
            self._layers.close()
        self._layers = None
        self._lags.clear()
        self._drafted.clear()

    def close(self) -> None:
        """Frees the contexts, which must not be used again."""
        self._close_layers()
        super().close()
