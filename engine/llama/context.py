"""Cells and decodes. Everything that would end the process inside the library is refused before the call.

Of the library's conditions (llama.cpp 0c1e57098) these abort rather than answer: more rows than `n_batch`, more
outputs than `n_outputs_max`, a sequence id outside 0..255 in a memory operation, a partial copy between separate
streams of cells (there is one stream here), and logits read of a row that has none.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as native
from msgspec import structs

from engine.backend import Aborted, Logits, Meanwhile, NativeFault, NoFreeCells, State, nothing
from engine.batch import Batch
from engine.config import BatchConfig, ModelConfig
from engine.llama.library import CACHE_TYPES, FLASH_ATTENTION, StopFlag

OUTPUTS, OUTPUTS_PER_SLOT = 128, 8
"""Rows of logits of one step: enough for two long drafts, and for each slot's next token and seven drafted ones."""


def native_batch(batch: Batch) -> tuple[Any, Any]:
    """A `llama_batch` over the arrays of `batch`, and what must be kept alive with it.

    Each row belongs to one sequence, so `seq_id[i]` points at element i of one array.
    """

    def pointer(array: np.ndarray[Any, Any], kind: Any) -> Any:
        return array.ctypes.data_as(ctypes.POINTER(kind))

    counts = np.ones(batch.capacity, np.int32)
    addresses = (batch.seq.ctypes.data + 4 * np.arange(batch.capacity)).astype(np.uint64)
    struct = native.llama_batch(
        n_tokens=0,
        token=pointer(batch.token, native.llama_token),
        embd=None,
        pos=pointer(batch.pos, native.llama_pos),
        n_seq_id=pointer(counts, ctypes.c_int32),
        seq_id=pointer(addresses, ctypes.POINTER(native.llama_seq_id)),
        logits=pointer(batch.output, ctypes.c_int8),
    )
    return struct, (counts, addresses)


SCORES = 2**30
"""Bytes of attention scores that may be kept at once for doing without flash attention."""

MANY = 32
"""Slots from which on a CPU attends with flash attention, for want of another wish."""


def settled(model: ModelConfig, slots: int, gpu: bool, scores: int) -> ModelConfig:
    """`model` with what `auto` means for flash attention; `scores` are the bytes of a pass's scores without it.

    On a GPU it stays the library's own choice. On a CPU few slots do without, if that needs no more than `SCORES`
    bytes: the CPU's kernel for fewer than 64 rows visits cells one by one and takes 2.5 to 4 times as long beside 2,000
    of them (`python -m bench.step_cost -fa on`). But it passes over those of other sequences, which every row visits
    otherwise: 32 rows with 150 cells each take 0.4 to 0.8 of the time (`--streams 32 -fa on -ctv bf16`), least with
    BF16 values, as F16 ones are summed in F16. Quantised values need it.
    """
    plain = model.cache_type_v in ("f32", "f16", "bf16")
    if model.flash_attention != "auto" or gpu or not plain:
        return model
    if slots >= MANY:
        values = "bf16" if (model.cache_type_k, model.cache_type_v) == ("f16", "f16") else model.cache_type_v
        return structs.replace(model, cache_type_v=values)
    return structs.replace(model, flash_attention="off") if scores <= SCORES else model


def context_params(model: ModelConfig, batch: BatchConfig, cells: int, threads: int, heads: int, gpu: bool) -> Any:
    """Parameters of a context with one unified stream of `cells` cells, rounded up to the library's 256."""
    params = native.llama_context_default_params()
    params.n_ctx = -(-cells // 256) * 256
    params.n_batch = max(batch.rows, sequences_for(batch.slots))
    params.n_ubatch = min(batch.ubatch, params.n_batch)
    params.n_seq_max = sequences_for(batch.slots)
    outputs = batch.outputs or max(OUTPUTS, OUTPUTS_PER_SLOT * batch.slots)
    params.n_outputs_max = min(params.n_batch, max(params.n_seq_max, outputs))
    params.n_threads = threads
    params.n_threads_batch = model.threads_batch if model.threads_batch > 0 else threads
    model = settled(model, batch.slots, gpu, 4 * heads * params.n_ubatch * params.n_ctx)
    params.flash_attn_type = FLASH_ATTENTION[model.flash_attention]
    params.type_k = CACHE_TYPES[model.cache_type_k]
    params.type_v = CACHE_TYPES[model.cache_type_v]
    params.kv_unified = True
    params.no_perf = True
    return params


SEQUENCES = 256
"""Sequence ids of the library; one more than slots is needed for prefixes, and one for states."""


def sequences_for(slots: int) -> int:
    """Sequence ids for so many slots: as many again for idle prefixes, and some more."""
    return min(SEQUENCES, 2 * slots + 17)


class LlamaContext:
    """A context of one model, with one unified stream of cells. Belongs to the thread that made it."""

    def __init__(self, model: Any, params: Any, *, partial: bool, window: int) -> None:
        self._handle = native.llama_init_from_model(model, params)
        if not self._handle:
            raise NativeFault("the context could not be created")
        self._memory = native.llama_get_memory(self._handle)
        if not self._memory:  # a decode would then be an encode, which aborts with more rows than outputs
            native.llama_free(self._handle)
            raise NativeFault("the model keeps no context: it computes embeddings, not text")
        self._stop = StopFlag()
        self._stop.install(self._handle)
        self._vocabulary: int = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
        self.window = window
        self.partial = partial
        self.shifts = partial and not window and bool(native.llama_memory_can_shift(self._memory))
        self.ordered, self.wasted = False, 0
        self.cells: int = native.llama_n_ctx(self._handle)
        self._spare: int = native.llama_n_seq_max(self._handle) - 1  # states pass through it
        self.sequences = self._spare
        self.ubatch: int = native.llama_n_ubatch(self._handle)
        self.batch = Batch(native.llama_n_batch(self._handle))
        self.outputs: int = min(params.n_outputs_max, self.batch.capacity)
        self._native, self._alive = native_batch(self.batch)
        self._rows: Logits = np.empty((0, self._vocabulary), np.float32)
        self._address = 0

    def decode(self, meanwhile: Meanwhile = nothing) -> Logits:
        """The logits of the batch's rows that asked for them, valid until the next decode.

        A GPU still computes when the library's call returns: `meanwhile` is called then, and waited for afterwards.
        Raises NoFreeCells with the cells unchanged; after Aborted or NativeFault part of the batch may be in them.
        """
        self._guard()
        self._native.n_tokens = self.batch.rows
        match native.llama_decode(self._handle, self._native):
            case 0:
                meanwhile()
                return self._logits()
            case 1:
                raise NoFreeCells
            case 2:
                raise Aborted
            case code:
                raise NativeFault(f"llama_decode returned {code}")

    def _guard(self) -> None:
        batch = self.batch
        if not 0 < batch.rows <= batch.capacity:
            raise NativeFault(f"a batch of {batch.rows} rows; from 1 to {batch.capacity} are possible")
        if batch.outputs > self.outputs:
            raise NativeFault(f"{batch.outputs} rows of logits; {self.outputs} are possible")
        if not 0 <= batch.token[: batch.rows].min() <= batch.token[: batch.rows].max() < self._vocabulary:
            raise NativeFault("a token id outside the vocabulary")

    def _logits(self) -> Logits:
        outputs = self.batch.outputs
        if not outputs:
            native.llama_synchronize(self._handle)  # as reading logits would: a decode takes as long as it takes
            return self._rows[:0]
        pointer = native.llama_get_logits(self._handle)
        address = ctypes.cast(pointer, ctypes.c_void_p).value or 0
        if address != self._address or outputs > len(self._rows):
            # One view over all rows that may come: the library moves the buffer only to enlarge it.
            self._rows = np.ctypeslib.as_array(pointer, (outputs, self._vocabulary))
            self._address = address
        return self._rows[:outputs]

    def copy(self, source: int, target: int, length: int) -> bool:
        """Lets the empty `target` share the first `length` cells of `source`; False if some are gone."""
        self._known(source, target)
        native.llama_memory_seq_cp(self._memory, source, target, 0, length)
        if self.intact(target, length):
            return True
        native.llama_memory_seq_rm(self._memory, target, -1, -1)
        return False

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """Lets `target` hold the cells of these positions too."""
        self._known(source, target)
        native.llama_memory_seq_cp(self._memory, source, target, start, end)

    def intact(self, seq: int, length: int) -> bool:
        """Whether `seq` has what a row at position `length` may look at; a sliding window forgets its start."""
        if self.length(seq) != length:
            return False
        if not self.partial:  # one state for all of it
            return True
        first = self._first(seq)
        return 0 <= first <= max(0, length - self.window) if self.window else first == 0

    def cut(self, seq: int, length: int) -> bool:
        """Drops positions from `length` on; False, with nothing changed, if the model can only drop all."""
        self._known(seq)
        start = length if length else -1
        return bool(native.llama_memory_seq_rm(self._memory, seq, start, -1))

    def save(self, seq: int, start: int, end: int) -> State | None:
        """The state of these positions, which pass through a sequence that is otherwise empty; None if some are gone.

        The library leaves out what no row after the last could see through a sliding window: longer ones are refused.
        """
        self._known(seq)
        if not self.partial:
            return self._state(seq) if (start, end) == (0, self.length(seq)) else None
        if self.window and end - start > self.window:
            return None
        native.llama_memory_seq_cp(self._memory, seq, self._spare, start, end)
        try:
            whole = self._first(self._spare) == start and self._last(self._spare) == end - 1
            return self._state(self._spare) if whole else None
        finally:
            native.llama_memory_seq_rm(self._memory, self._spare, -1, -1)

    def _state(self, seq: int) -> State | None:
        size: int = native.llama_state_seq_get_size(self._handle, seq)
        state: State = np.empty(size, np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return state if native.llama_state_seq_get_data(self._handle, pointer, size, seq) == size else None

    def load(self, seq: int, state: State, start: int, end: int, shift: int = 0) -> bool:
        """Appends positions of `state` to `seq`; False, with nothing changed, if they find no cells."""
        self._known(seq)
        target = self._spare if self.partial else seq
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        loaded = bool(native.llama_state_seq_set_data(self._handle, pointer, state.nbytes, target) == state.nbytes)
        if not self.partial:
            return loaded
        if shift:
            native.llama_memory_seq_add(self._memory, target, -1, -1, shift)
        if loaded := loaded and self._first(target) <= start and self._last(target) >= end - 1:
            native.llama_memory_seq_cp(self._memory, target, seq, start, end)
        native.llama_memory_seq_rm(self._memory, target, -1, -1)
        return loaded

    def _first(self, seq: int) -> int:
        return int(native.llama_memory_seq_pos_min(self._memory, seq))

    def _last(self, seq: int) -> int:
        return int(native.llama_memory_seq_pos_max(self._memory, seq))

    def length(self, seq: int) -> int:
        """Positions of `seq`."""
        self._known(seq)
        return self._last(seq) + 1

    def clear(self) -> None:
        """Frees every cell."""
        native.llama_memory_clear(self._memory, False)

    def _known(self, *sequences: int) -> None:
        if not all(0 <= seq < self.sequences for seq in sequences):
            raise NativeFault(f"a sequence id outside 0..{self.sequences - 1} in {sequences}")

    def abort(self) -> None:
        """Makes the running decode and all later ones raise Aborted. Any thread may call it."""
        self._stop.set()

    def close(self) -> None:
        """Frees the context; it is not used again."""
        native.llama_free(self._handle)
