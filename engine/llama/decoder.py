"""One llama.cpp context: decodes, positions and states of its sequences.

Some wrong calls abort the process instead of returning an error. They raise NativeFault here before the library is
called. In llama.cpp 0c1e57098 they are: more rows than `n_batch`, more outputs than `n_outputs_max`, a sequence id out
of range in a memory operation, a partial copy between streams of cells, access to the logits of a row without logits,
and with snapshots of recurrent states an `n_ubatch` of at most their number plus one (`engine.llama.rollback`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as native
from numpy.typing import NDArray

from engine.adapters import AdapterSet
from engine.backend import Aborted, HostWork, Logits, NativeFault, NoFreeCells, State, no_host_work
from engine.backend_sampling import BackendSampling
from engine.batch import Batch
from engine.llama.library import StopFlag
from engine.llama.row_positions import Coordinates, PositionTable, text_coordinates
from engine.llama.threads import ThreadPools
from engine.llama.top_k_chains import TopKChains

# Types of rotations with several numbers of a position (M-RoPE).
_MROPE_TYPES = (native.LLAMA_ROPE_TYPE_MROPE, native.LLAMA_ROPE_TYPE_IMROPE)
_MROPE_SECTIONS = 4


# Returns the address of the logits of the last decode. The binding's function makes a pointer object at each call.
_get_logits = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(("llama_get_logits", native._lib))


class NoKVCells(NativeFault):
    """The model has no KV cells: it computes embeddings, not text."""


def native_batch(batch: Batch) -> tuple[Any, Any]:
    """Returns a `llama_batch` over the arrays of `batch`, and the additional arrays that must live as long as it.

    Each row has one sequence id, so `seq_id[i]` points to element i of `batch.seq`; `Branches` replaces the ids of some
    rows during a decode.
    """
    return _over_arrays(batch.seq, batch.pos, batch.output, token=_pointer(batch.token, native.llama_token))


def embedding_batch(rows: NDArray[np.float32], seq: int, positions: Coordinates) -> tuple[Any, Any]:
    """Returns a `llama_batch` of embeddings without logits, and the arrays that must live as long as it."""
    ids, outputs = np.full(len(rows), seq, np.int32), np.zeros(len(rows), np.int8)
    struct, arrays = _over_arrays(ids, positions, outputs, embd=_pointer(rows, ctypes.c_float))
    struct.n_tokens = len(rows)
    return struct, (positions, ids, outputs, arrays)


def _over_arrays(
    seq: NDArray[np.int32], pos: NDArray[np.int32], output: NDArray[np.int8], *, token: Any = None, embd: Any = None
) -> tuple[Any, Any]:
    """Returns a `llama_batch` without rows over these arrays, and the additional arrays that must live as long as
    it."""
    counts = np.ones(len(seq), np.int32)
    addresses = (seq.ctypes.data + 4 * np.arange(len(seq))).astype(np.uint64)
    struct = native.llama_batch(
        n_tokens=0,
        token=token,
        embd=embd,
        pos=_pointer(pos, native.llama_pos),
        n_seq_id=_pointer(counts, ctypes.c_int32),
        seq_id=_pointer(addresses, ctypes.POINTER(native.llama_seq_id)),
        logits=_pointer(output, ctypes.c_int8),
    )
    return struct, (counts, addresses)


class Decoder:
    """A native context of one model. Only the thread that created it may call its methods, except `abort`."""

    def __init__(self, model: Any, params: Any, stop: StopFlag | None = None, chains: TopKChains | None = None) -> None:
        """`stop` is a flag to share with another context; None creates a new flag. `chains` has the native context if
        it is open already. Raises NativeFault."""
        self._chains = chains
        self.backend_sampling: BackendSampling | None = None
        """The `chains`, once they are verified."""
        self._handle = native.llama_init_from_model(model, params) if chains is None else chains.handle
        if not self._handle:
            raise NativeFault("the context could not be created")
        self._memory = native.llama_get_memory(self._handle)
        if not self._memory:  # llama_decode is then llama_encode, which aborts with more rows than outputs
            self.close()
            raise NoKVCells("the model has no KV cells: it computes embeddings, not text")
        self.stop = stop or StopFlag()
        self.stop.install(self._handle)
        self.unified = bool(params.kv_unified)
        self.cells: int = native.llama_n_ctx(self._handle)
        self.sequence_cells: int = native.llama_n_ctx_seq(self._handle)
        self.streams: int = 1 if self.unified else native.llama_n_seq_max(self._handle)
        self.sequences: int = native.llama_n_seq_max(self._handle)
        self.positions = self.sequence_cells
        self.ubatch: int = native.llama_n_ubatch(self._handle)
        self.batch = Batch(native.llama_n_batch(self._handle))
        self.outputs: int = min(params.n_outputs_max, self.batch.capacity)
        self._vocabulary: int = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
        self._native_batch, self._batch_arrays = native_batch(self.batch)
        # View of the library's buffer of logits, its first rows as in the last decode, and the address of the buffer.
        self._logits_view: Logits = np.empty((0, self._vocabulary), np.float32)
        self._logits_rows = self._logits_view
        self._logits_address = 0
        self.snapshots: int = native.llama_n_rs_seq(self._handle)
        """Number of earlier recurrent states that the library keeps of each sequence, for rollbacks."""
        # Number of rows that a rollback of each sequence can drop. Later decodes move the states, not the snapshots.
        self._droppable = np.zeros(self.sequences, np.int64)
        self.rolled_back: set[int] = set()
        """Sequences whose state is that of a snapshot until their next decode."""
        self.row_positions = PositionTable(self.sequences)
        # Numbers of a position: several with M-RoPE, for which a batch of tokens still has one for each row.
        self._sections = _MROPE_SECTIONS if native.llama_model_rope_type(model) in _MROPE_TYPES else 1
        self.adapters: Sequence[Any] = ()
        """Native handles of the model's LoRA adapters, by number."""
        self._applied: AdapterSet = ()

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """Returns the logits of the batch's rows with `output`, valid until the next decode.

        `host_work` is called when the library's call returns, which on a GPU is before the rows are computed. Raises
        NoFreeCells with the cells unchanged. After Aborted or NativeFault part of the batch may be in the cells.
        """
        self._check_batch()
        batch = self.batch
        self._native_batch.n_tokens = batch.rows
        if (gaps := self.row_positions.gaps(batch)) is None:
            code = native.llama_decode(self._handle, self._native_batch)
        else:
            batch.pos[: batch.rows] -= gaps
            code = native.llama_decode(self._handle, self._native_batch)
            batch.pos[: batch.rows] += gaps
        self._raise_for(code)
        if self.snapshots:
            self._end_rollbacks()
        host_work()
        return self._logits()

    @staticmethod
    def _raise_for(code: int) -> None:
        """Raises the exception of a code that `llama_decode` returned. No effect for 0."""
        match code:
            case 0:
                return
            case 1:
                raise NoFreeCells
            case 2:
                raise Aborted
        raise NativeFault(f"llama_decode returned {code}")

    def _check_batch(self) -> None:
        batch, rows = self.batch, self.batch.rows
        if not 0 < rows <= batch.capacity:
            raise NativeFault(f"a batch has {rows} rows; 1 to {batch.capacity} are possible")
        if batch.outputs > self.outputs:
            raise NativeFault(f"a batch has {batch.outputs} rows of logits; at most {self.outputs} are possible")
        token, pos, seq = batch.highest
        if token >= self._vocabulary:
            raise NativeFault("a batch has a token id outside the vocabulary")
        if seq >= self.sequences:
            raise NativeFault(f"a batch has a sequence id outside 0..{self.sequences - 1}")
        if pos >= self.positions:
            raise NoFreeCells

    def _end_rollbacks(self) -> None:
        counts = np.bincount(self.batch.seq[: self.batch.rows], minlength=self.sequences)
        self._droppable = np.clip(counts - 1, 0, self.snapshots)
        self.rolled_back.difference_update(np.flatnonzero(counts).tolist())

    def _logits(self) -> Logits:
        outputs = self.batch.outputs
        if not outputs:
            # As `llama_get_logits` does, so that `decode` returns after the step.
            native.llama_synchronize(self._handle)
            return self._logits_view[:0]
        address = _get_logits(self._handle)
        if address != self._logits_address or outputs > len(self._logits_view):
            # The view is reused, as the library moves the buffer only when it enlarges it.
            pointer = native.llama_get_logits(self._handle)
            self._logits_view = np.ctypeslib.as_array(pointer, (outputs, self._vocabulary))
            self._logits_rows, self._logits_address = self._logits_view, address
        if outputs != len(self._logits_rows):
            self._logits_rows = self._logits_view[:outputs]
        return self._logits_rows

    def decode_embeddings(
        self, seq: int, start: int, rows: NDArray[np.float32], *, causal: bool, positions: Coordinates | None = None
    ) -> None:
        """Appends cells of `rows`, [rows, width of the model], to `seq`, which has `start` rows; without `causal` each
        row attends to all of `rows`. Raises as `decode` does.

        `positions` are those of the rows; None for consecutive ones.
        """
        count = len(rows)
        if not 0 < count <= min(self.batch.capacity, self.batch.capacity if causal else self.ubatch):
            limit = f"-b {self.batch.capacity}" if causal else f"-ub {self.ubatch}"
            raise NativeFault(f"{count} embeddings do not fit {limit}")
        if rows.shape[1] != native.llama_model_n_embd_inp(native.llama_get_model(self._handle)):
            raise NativeFault("the embeddings have another width than the model's")
        self._check_ids(seq)
        if start + count > self.positions:
            raise NoFreeCells
        numbers = np.ascontiguousarray(rows, np.float32)
        before = self.row_positions[seq]
        if positions is None:
            positions = text_coordinates(before.at(start), count, self._sections)
        batch, arrays = embedding_batch(numbers, seq, np.ascontiguousarray(positions, np.int32))
        if not causal:
            native.llama_set_causal_attn(self._handle, False)
        try:
            code = native.llama_decode(self._handle, batch)
            native.llama_synchronize(self._handle)  # the library may read `numbers` and `arrays` until then
        finally:
            if not causal:
                native.llama_set_causal_attn(self._handle, True)
        del arrays
        self._raise_for(code)
        self.row_positions[seq] = before.extended(start, positions)
        self._droppable[:] = 0
        self.rolled_back.discard(seq)

    def set_adapters(self, adapters: AdapterSet) -> bool:
        """Applies `adapters`, and no others, to later decodes. Returns True if the set has changed."""
        if adapters == self._applied:
            return False
        count, scales = len(adapters), [each.scale for each in adapters]
        handles = (native.llama_adapter_lora_p_ctypes * count)(*(self.adapters[each.id] for each in adapters))
        native.llama_set_adapters_lora(self._handle, handles, count, (ctypes.c_float * count)(*scales))
        self._applied = adapters
        return True

    def add_control_vector(self, directions: NDArray[np.float32], start: int, end: int) -> None:
        """Adds `directions`, [layers from 1 on, width], to the outputs of the layers from `start` to `end` in all later
        decodes. Raises NativeFault."""
        numbers = np.ascontiguousarray(directions, np.float32)
        pointer = _pointer(numbers, ctypes.c_float)
        if native.llama_set_adapter_cvec(self._handle, pointer, numbers.size, numbers.shape[1], start, end):
            raise NativeFault("the control vector does not fit the model")

    def get_state(self, seq: int, flags: int = 0) -> State | None:
        """Returns the native state of a sequence; None if the library cannot save it. `flags` are llama.cpp's
        `llama_state_seq_flags`, by default for the whole state."""
        size: int = native.llama_state_seq_get_size_ext(self._handle, seq, flags)
        state: State = np.empty(size, np.uint8)
        read_bytes: int = native.llama_state_seq_get_data_ext(self._handle, _bytes(state), size, seq, flags)
        return state if read_bytes == size else None

    def set_state(self, seq: int, state: State, flags: int = 0) -> bool:
        """Replaces the content of a sequence, or the part that `flags` select. Returns False, with the sequence empty,
        if `state` is refused."""
        read_bytes: int = native.llama_state_seq_set_data_ext(self._handle, _bytes(state), state.nbytes, seq, flags)
        if read_bytes == state.nbytes:
            return True
        self.drop(seq)  # a truncated state can leave cells without content
        return False

    def drop(self, seq: int, start: int = -1) -> bool:
        """Drops the positions of a sequence from `start` on, by default all. Returns False, with nothing changed, if
        the model can drop whole sequences and the last rows only, and these are others."""
        if start <= 0:
            self.row_positions.drop(seq)
        if start <= 0 or not self.snapshots:
            self.rolled_back.discard(seq)
        elif start <= (last := self.last_position(seq)):
            # The library does not check that there is a snapshot of the state.
            if last - start >= self._droppable[seq]:
                return False
            self._droppable[seq] = 0
            self.rolled_back.add(seq)
        return bool(native.llama_memory_seq_rm(self._memory, seq, start, -1))

    def copy_snapshot(self, source: int, target: int) -> bool:
        """Completes a copy with unified KV, for which the library shares the recurrent state of `source` from before a
        rollback. Returns False, with `target` empty, if the library refuses the state."""
        if source not in self.rolled_back:
            return True
        state = self.get_state(source, native.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        if state is None:
            self.drop(target)
            return False
        return self.set_state(target, state, native.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

    def first_position(self, seq: int) -> int:
        """Returns the first position of a sequence; -1 if it is empty."""
        return int(native.llama_memory_seq_pos_min(self._memory, seq))

    def last_position(self, seq: int) -> int:
        """Returns the last position of a sequence; -1 if it is empty."""
        return int(native.llama_memory_seq_pos_max(self._memory, seq))

    def length(self, seq: int) -> int:
        """Returns the number of rows of `seq`."""
        self._check_ids(seq)
        return self.row_positions[seq].count(self.last_position(seq))

    def _check_ids(self, *sequences: int) -> None:
        if not all(0 <= seq < self.sequences for seq in sequences):
            raise NativeFault(f"a sequence id outside 0..{self.sequences - 1} in {sequences}")

    def clear(self) -> None:
        """Frees every cell."""
        self.row_positions.clear()
        self.rolled_back.clear()
        native.llama_memory_clear(self._memory, False)

    def abort(self) -> None:
        """Makes the running decode and every later one raise Aborted. Any thread may call it."""
        self.stop.set()

    def attach(self, pools: ThreadPools) -> None:
        """Makes later decodes use the threads of `pools`, which must be closed after the context."""
        pools.attach(self._handle)

    def close(self) -> None:
        """Frees the context, which must not be used again."""
        native.llama_free(self._handle)
        if self._chains is not None:
            self._chains.close()


def _bytes(state: State) -> Any:
    return _pointer(state, ctypes.c_uint8)


def _pointer(array: np.ndarray[Any, Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
