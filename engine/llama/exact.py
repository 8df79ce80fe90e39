"""The deterministic profile: settings under which the logits of a row do not depend on the other rows of a decode.

By default the other rows change the last bits of the logits, and sometimes a token. The profile avoids each cause in
the library's CPU kernels (llama.cpp 0c1e57098):

- Products with repacked K-quants take rows in fours, so weights are not repacked. Products with plain K-quants are
  tiled from 8 rows on, so tiling is disabled by an environment variable that the library evaluates once. Products
  with F16, BF16, F32 and IQ4_NL weights have another kernel for a single row, so such models are refused.
- Flash attention over keys and values that are both F16 is split, summed in F16 or tiled, by the number of rows. With
  keys and values of different types, or quantised ones, there is one kernel, which sums in F32 row by row.
- Attention sums over the cells of a sequence in the order in which they lie. With unified KV the order depends on the
  other sequences; with per-slot KV it is always the order of positions. So the profile has per-slot KV.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from llama_cpp import llama_cpp as native
from msgspec import structs

from engine.config import ModelConfig

# Types of keys and values for which attention has one kernel; the first is the default.
EXACT_CACHE_TYPES = (("f16", "bf16"), ("q8_0", "q8_0"), ("f16", "q8_0"))

# Types of weights whose product with a single row has another kernel.
REFUSED_WEIGHT_TYPES = ("f32", "f16", "bf16", "iq4_nl")

TILING_VARIABLE = "GGML_CPU_TILED_MM"

# True once this process has opened a model for which the library may have enabled tiling.
_tiling_possible = False


class NotExact(Exception):
    """A model or a setting excludes the profile; the message is one line, with the correct setting if there is one."""


def exact_config(config: ModelConfig, gpu: str) -> ModelConfig:
    """Returns `config` with the settings of the profile. Raises NotExact for a setting that contradicts the profile."""
    if config.kv_unified:
        raise NotExact("with --kv-unified the order of a sequence's cells depends on the other sequences; leave it out")
    if gpu:
        raise NotExact(f"the kernels of {gpu} are chosen by the number of rows; use -ngl 0")
    if config.flash_attention == "off":
        raise NotExact("attention depends on the number of rows without -fa on")
    types = (config.cache_type_k, config.cache_type_v)
    if types == ("f16", "f16"):
        types = ("f16", "bf16")
    if types not in EXACT_CACHE_TYPES:
        valid = ", ".join(f"-ctk {k} -ctv {v}" for k, v in EXACT_CACHE_TYPES)
        raise NotExact(
            f"attention over {types[0]} keys and {types[1]} values depends on the number of rows; use {valid}"
        )
    return structs.replace(config, kv_unified=False, flash_attention="on", cache_type_k=types[0], cache_type_v=types[1])


def prepare(path: Path, *, exact: bool) -> None:
    """Disables tiling for an exact model. Must be called before each model is loaded, exact or not.

    Raises NotExact if the weights, or a model that this process opened before, exclude the profile.
    """
    global _tiling_possible
    if not exact:
        _tiling_possible = True
        return
    kinds = multiplied_weights(path)
    for name, kind in kinds.items():
        if kind in REFUSED_WEIGHT_TYPES:
            raise NotExact(f"its weights {name} are {kind}, whose product with a single row has another kernel")
    tiled = any("_K" in kind or "iq" in kind for kind in kinds.values())
    if tiled and _tiling_possible and os.environ.get(TILING_VARIABLE) != "0":
        raise NotExact("this process has opened a model without --deterministic before; start another process")
    os.environ[TILING_VARIABLE] = "0"


def multiplied_weights(path: Path) -> dict[str, str]:
    """Returns the types of a GGUF's weights that rows are multiplied with, by name."""
    found = tensor_types(path)
    if "output.weight" in found:
        found.pop("token_embd.weight", None)  # a lookup, not a product
    return {name: kind for name, kind in found.items() if "norm" not in name and name.endswith(".weight")}


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def tensor_types(path: Path) -> dict[str, str]:
    """Returns the types of all tensors of a GGUF by name; empty if the library cannot open the file."""
    lib = native._lib
    lib.gguf_init_from_file.restype, lib.gguf_init_from_file.argtypes = ctypes.c_void_p, [ctypes.c_char_p, _InitParams]
    lib.gguf_get_n_tensors.restype, lib.gguf_get_n_tensors.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    lib.gguf_get_tensor_name.restype = lib.ggml_type_name.restype = ctypes.c_char_p
    lib.gguf_get_tensor_name.argtypes = lib.gguf_get_tensor_type.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    file = lib.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if not file:
        return {}
    try:
        return {
            lib.gguf_get_tensor_name(file, i).decode(): lib.ggml_type_name(lib.gguf_get_tensor_type(file, i)).decode()
            for i in range(lib.gguf_get_n_tensors(file))
        }
    finally:
        lib.gguf_free(file)
