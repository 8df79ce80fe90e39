"""Backend sampling with llama.cpp: a chain of top-k samplers for each sequence id.

Some wrong calls end the process (in llama.cpp 0c1e57098): attaching a chain twice, also to another context; selecting
more tokens than the vocabulary has; a decode after a change for which the device has too little memory. They are
avoided: each change makes new chains, counts are below the size of the vocabulary, and the context is opened with the
chains of all slots, where a lack of memory is an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as native

from engine.backend import NativeFault
from engine.backend_sampling import SelectedTokens
from engine.config import ModelConfig
from engine.contract import ModelError
from engine.llama.library import native_log
from engine.llama.params import serving_gpu

# Possible numbers of selected tokens: for the default top-k of 40 and for the highest top-k of 256, each with some more
# for ties at that rank and for tokens that may not be picked.
SELECTED_COUNTS = (64, 320)


class TopKChains:
    """Implements `engine.backend_sampling.BackendSampling`. Belongs to the thread of the context."""

    def __init__(self, model: Any, params: Any, sequences: int) -> None:
        """Opens a context of `model` with memory for chains of the first `sequences` ids. All counts are 0 afterwards.
        Raises NativeFault."""
        self._vocabulary: int = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
        self.counts: tuple[int, ...] = tuple(count for count in SELECTED_COUNTS if count < self._vocabulary)
        self.current: dict[int, int] = dict.fromkeys(range(sequences), self.counts[0]) if self.counts else {}
        """The count of each sequence id that has a chain."""
        self._chains = {seq: _top_k_chain(count) for seq, count in self.current.items()}
        self.handle = self._open(model, params)
        """The context."""
        if not self.handle:
            self.close()
            raise NativeFault("the context with backend sampling could not be created")
        self.change(dict.fromkeys(self.current, 0))

    def _open(self, model: Any, params: Any) -> Any:
        own = type(params).from_buffer_copy(params)
        own.n_outputs_max_per_seq = 0  # no limit; the default of 1 row is too few for drafts
        # The first graphs contain these chains, so that a lack of memory is an error here.
        configs = [native.llama_sampler_seq_config(seq, chain) for seq, chain in _addresses(self._chains).items()]
        array = (native.llama_sampler_seq_config * len(configs))(*configs)
        own.samplers, own.n_samplers = array, len(configs)
        return native.llama_init_from_model(model, own)

    def change(self, counts: Mapping[int, int]) -> None:
        """Gives each sequence id in `counts` a new chain, or none for 0, for later decodes. Raises NativeFault."""
        for seq, count in counts.items():
            assert not count or count in self.counts, "other counts can exceed the vocabulary"
            chain = _top_k_chain(count) if count else None
            if not native.llama_set_sampler(self.handle, seq, chain):
                native.llama_sampler_free(chain)
                raise NativeFault(f"llama_set_sampler refused a chain for sequence {seq}")
            if (old := self._chains.pop(seq, None)) is not None:
                native.llama_sampler_free(old)
            self.current.pop(seq, None)
            if chain is not None:
                self._chains[seq], self.current[seq] = chain, count

    def selected(self, rows: int) -> SelectedTokens:
        """See `BackendSampling.selected`. Waits until the last decode is computed."""
        width = max(self.current.values(), default=0)
        ids = native.llama_get_sampled_candidates_ith, native.llama_get_sampled_candidates_count_ith
        logits = native.llama_get_sampled_logits_ith, native.llama_get_sampled_logits_count_ith
        return SelectedTokens(*(self._view(*functions, rows, width) for functions in (ids, logits)))

    def _view(self, pointer_of: Any, count_of: Any, rows: int, width: int) -> Any:
        """Returns the first `width` columns of the library's buffer, which is a matrix, [rows of logits, vocabulary].
        Raises NativeFault if no row has selected tokens."""
        for row in range(rows):
            # A negative index counts from the end of the rows of logits.
            if 0 < count_of(self.handle, row - rows) < self._vocabulary:
                address = ctypes.addressof(pointer_of(self.handle, row - rows).contents)
                kind = ctypes.c_float if pointer_of is native.llama_get_sampled_logits_ith else ctypes.c_int32
                first = ctypes.cast(address - 4 * row * self._vocabulary, ctypes.POINTER(kind))
                return np.ctypeslib.as_array(first, (rows, self._vocabulary))[:, :width]
        raise NativeFault("the library has selected no tokens")

    def close(self) -> None:
        """Frees the chains, after the context."""
        for chain in self._chains.values():
            native.llama_sampler_free(chain)
        self._chains.clear()


def open_chains(config: ModelConfig, model: Any, params: Any, slots: int) -> TopKChains | None:
    """Opens a context with chains if `config.backend_sampling` asks for them, and returns the chains, else None. Raises
    NativeFault for `on` if the context cannot be opened."""
    is_last_offloaded = not 0 <= config.gpu_layers <= native.llama_model_n_layer(model)
    on = config.backend_sampling == "on"
    auto = config.backend_sampling == "auto" and serving_gpu(config) and is_last_offloaded
    try:
        return TopKChains(model, params, slots) if on or auto else None
    except NativeFault as fault:
        if on:
            raise
        native_log.warning("backend sampling is off: %s", fault)
        return None


def enable_selection(config: ModelConfig, context: Any, chains: TopKChains) -> None:
    """Sets `context.backend_sampling` to its `chains`, if these select the right tokens.

    Otherwise logs a warning if backend sampling is `auto`. If it is `on`, closes the context and raises ModelError.
    """
    if not (problem := selection_problem(context, chains)):
        context.backend_sampling = chains
        native_log.info("backend sampling is on")
        return
    if config.backend_sampling == "on":
        context.close()
        raise ModelError(f"--backend-sampling on is not possible: {problem}; use off")
    native_log.warning("backend sampling is off: %s", problem)


def selection_problem(context: Any, chains: TopKChains) -> str:
    """Returns the reason why the `chains` of `context` cannot be used; empty if the device selects the most likely
    tokens, and their logits are those without chains. The cells are empty and no id has a chain, before and after."""
    if not chains.counts:
        return "the vocabulary is too small"

    tokens = (1, 2, 3)

    def decode() -> Any:
        context.batch.clear()
        context.batch.add(0, 0, tokens, len(tokens))
        try:
            return context.decode()
        finally:
            context.clear()
            context.batch.clear()

    chains.change({0: chains.counts[-1]})
    try:
        decode()
        selected = [part.copy() for part in chains.selected(len(tokens))]
        chains.change({0: 0})
        logits = decode()
    except NativeFault as fault:
        chains.change({0: 0})
        return str(fault)
    for row, ids, values in zip(logits, *selected, strict=True):
        best = np.partition(row, -len(ids))[-len(ids) :]
        if len({*ids.tolist()}) < len(ids) or not np.array_equal(row[ids], values):
            return "the logits of selected tokens differ from those without the selection"
        if not np.array_equal(np.sort(best), np.sort(values)):
            return "the selected tokens are not the most likely ones"
    return ""


def _top_k_chain(count: int) -> Any:
    chain = native.llama_sampler_chain_init(native.llama_sampler_chain_default_params())
    # The second top-k only copies. The ids of a single one are an input of the logits' node, and ggml reuses the memory
    # of such inputs, also in a later graph of equal size in which the ids are an output.
    for _ in range(2):
        native.llama_sampler_chain_add(chain, native.llama_sampler_init_top_k(count))
    return chain


def _addresses(chains: Mapping[int, Any]) -> dict[int, int]:
    return {seq: ctypes.addressof(chain.contents) for seq, chain in chains.items()}
