"""Parameters of a llama.cpp context: cells, batch sizes and flash attention. Size of a cell in bytes."""

from __future__ import annotations

import ctypes
import re
from typing import Any

from llama_cpp import llama_cpp as native
from msgspec import structs

from engine.branching import MAX_ALTERNATIVES
from engine.config import BatchConfig, ModelConfig, RopeConfig
from engine.llama.layout import PAD_CELLS, KvLayout
from engine.llama.library import CACHE_TYPES, FLASH_ATTENTION, NO_DEVICE, gpu_name, read_string

# Default maximum rows of logits of one step: for two long drafts, and for seven draft tokens and a next token per slot.
MIN_OUTPUTS, OUTPUTS_PER_SLOT = 128, 8
# Maximum size of the attention scores of one pass for which flash attention is off by default on a CPU.
MAX_SCORES_BYTES = 2**30
# The library's `LLAMA_MAX_SEQ`.
MAX_SEQUENCES = 256
# Number of slots from which flash attention is on by default on a CPU with unified KV.
FLASH_SLOTS = 32
# `enum llama_rope_scaling_type`.
ROPE_SCALINGS = {"auto": -1, "none": 0, "linear": 1, "yarn": 2}


def resolve_flash_attention(
    model: ModelConfig, slots: int, gpu: bool, scores_bytes: int, *, unified: bool
) -> ModelConfig:
    """Returns `model` with `auto` flash attention resolved for a CPU. `scores_bytes` is the size of the attention
    scores of one pass without flash attention.

    `auto` stays, so that the library chooses, on a GPU, with quantised values, which require flash attention, and if
    the scores exceed `MAX_SCORES_BYTES`. It also stays with unified KV and `FLASH_SLOTS` slots or more, where flash
    attention skips the cells of other sequences; BF16 values then replace F16 values, which the kernel would sum in
    F16. In all other cases flash attention is off: the CPU's flash kernel visits cells one by one and takes 1.4 times
    as long per prefill row (`python -m bench.step_cost -fa on`).
    """
    plain = model.cache_type_v in ("f32", "f16", "bf16")
    if model.flash_attention != "auto" or gpu or not plain:
        return model
    if unified and slots >= FLASH_SLOTS:
        values = "bf16" if (model.cache_type_k, model.cache_type_v) == ("f16", "f16") else model.cache_type_v
        return structs.replace(model, cache_type_v=values)
    return structs.replace(model, flash_attention="off") if scores_bytes <= MAX_SCORES_BYTES else model


def serving_gpu(model: ModelConfig) -> str:
    """Returns the description of the first GPU that computes the model; empty if the CPU does."""
    return gpu_name() if model.gpu_layers and model.device != NO_DEVICE else ""


def set_rope(rope: RopeConfig, params: Any) -> None:
    """Sets the rotary position embeddings of a context. Raises ValueError if a factor is set twice."""
    params.rope_scaling_type = ROPE_SCALINGS[rope.scaling]
    params.rope_freq_base, params.rope_freq_scale = rope.freq_base, rope.frequency_factor
    params.yarn_orig_ctx = rope.yarn_context
    params.yarn_ext_factor, params.yarn_attn_factor = rope.yarn_ext_factor, rope.yarn_attn_factor
    params.yarn_beta_slow, params.yarn_beta_fast = rope.yarn_beta_slow, rope.yarn_beta_fast


def trained_tokens(rope: RopeConfig, model: Any) -> int:
    """Returns the tokens of the training context, after the scaling of `rope`. Called before a context is opened, as
    the library adjusts its own number for YaRN."""
    tokens: int = native.llama_model_n_ctx_train(model)
    return rope.scaled_context(round(tokens * (native.llama_model_rope_freq_scale_train(model) or 1.0)), tokens)


def sequences_for(slots: int, unified: bool, *, recurrent: bool = False) -> int:
    """Returns the number of native sequence ids for a number of slots.

    With per-slot KV each slot has one id, as each id has its own cells. With unified KV an id costs nothing, so each
    slot has a second id for an idle prefix, and there are 25 more. The last one is the spare id for loading and cutting
    states, and those before it are of branches (`alternatives_for`). Only 2 more are there for a `recurrent` model,
    where each id takes the memory of a state.
    """
    return min(MAX_SEQUENCES, 2 * slots + (2 if recurrent else 17 + MAX_ALTERNATIVES)) if unified else slots


def alternatives_for(slots: int, params: Any, *, partial: bool, window: int) -> int:
    """Returns the maximum number of alternatives in a batch, each of which needs an id of a branch. 0 with per-slot KV,
    where a branch would need cells of its own for the whole sequence, with recurrent states, with sliding windows, and
    if so many slots leave no ids."""
    if not params.kv_unified or not partial or window:
        return 0
    ids: int = params.n_seq_max
    return max(0, min(MAX_ALTERNATIVES, ids - 2 * slots - 2))


def context_params(
    model: ModelConfig,
    batch: BatchConfig,
    layout: KvLayout,
    threads: int,
    heads: int,
    gpu: bool,
    *,
    recurrent: bool = False,
) -> Any:
    """Returns the parameters of a context with the cells of `layout`, rounded up to a multiple of `PAD_CELLS`. `heads`
    is the number of attention heads, `gpu` is True if a GPU computes the model, `recurrent` if layers have states."""
    params = native.llama_context_default_params()
    params.n_ctx = -(-layout.cells // PAD_CELLS) * PAD_CELLS
    params.kv_unified = layout.unified
    params.n_seq_max = sequences_for(batch.num_slots, layout.unified, recurrent=recurrent)
    params.n_batch = max(batch.rows, params.n_seq_max)
    params.n_ubatch = min(batch.ubatch, params.n_batch)
    outputs = batch.outputs or max(MIN_OUTPUTS, OUTPUTS_PER_SLOT * batch.num_slots)
    params.n_outputs_max = min(params.n_batch, max(params.n_seq_max, outputs))
    params.n_threads = threads
    params.n_threads_batch = model.threads_batch if model.threads_batch > 0 else threads
    attended_cells = params.n_ctx if layout.unified else params.n_ctx // batch.num_slots
    scores_bytes = 4 * heads * params.n_ubatch * attended_cells
    model = resolve_flash_attention(model, batch.num_slots, gpu, scores_bytes, unified=layout.unified)
    params.flash_attn_type = FLASH_ATTENTION[model.flash_attention]
    params.type_k = CACHE_TYPES[model.cache_type_k]
    params.type_v = CACHE_TYPES[model.cache_type_v]
    params.offload_kqv, params.op_offload, params.swa_full = model.kv_offload, model.op_offload, model.swa_full
    params.no_perf = True
    return params


def metadata(model: Any, key: str) -> str:
    """Returns the value of `key` in the GGUF's metadata as text; empty if the file lacks the key."""
    return read_string(lambda buffer, size: native.llama_model_meta_val_str(model, key.encode(), buffer, size))


def cell_bytes(config: ModelConfig, model: Any) -> int:
    """Returns the bytes of one cell in all layers together, computed from the metadata. The result is an upper bound,
    as the library stores fewer cells in some layers, such as those with a sliding window."""
    family = metadata(model, "general.architecture")
    layers: int = native.llama_model_n_layer(model)
    heads = [int(word) for word in re.findall(r"\d+", metadata(model, f"{family}.attention.head_count_kv"))]
    if len(heads) < layers:
        heads = [native.llama_model_n_head_kv(model)] * layers
    width = native.llama_model_n_embd(model) // max(1, native.llama_model_n_head(model))
    size = 0.0
    for name, kind in (("key", config.cache_type_k), ("value", config.cache_type_v)):
        given = metadata(model, f"{family}.attention.{name}_length")
        size += _element_bytes(kind) * (int(given) if given.isdigit() else width)
    return max(1, round(sum(heads[:layers]) * size))  # the list also has the MTP layers


def _element_bytes(kind: str) -> float:
    """Returns the mean bytes of one element of a cache type."""
    lib = native._lib
    lib.ggml_type_size.restype, lib.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    return float(lib.ggml_type_size(CACHE_TYPES[kind]) / lib.ggml_blck_size(CACHE_TYPES[kind]))
