"""The deterministic profile: settings under which the logits of a row do not depend on the other rows of a decode.

By default the logits depend on them in their last bits, and now and then a token with them. The profile avoids each
cause in the library's CPU kernels (llama.cpp 0c1e57098):

- Products with repacked K-quants take rows in fours, so weights are not repacked. Products with plain K-quants are
  tiled from 8 rows on, so tiling is switched off by an environment variable that the library reads once. Products with
  F16, BF16, F32 and IQ4_NL weights have another kernel for a single row, so such models are refused.
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
CACHE_TYPES = (("f16", "bf16"), ("q8_0", "q8_0"), ("f16", "q8_0"))

# Types of weights whose product with a single row is another kernel.
UNEVEN = ("f32", "f16", "bf16", "iq4_nl")

TILED = "GGML_CPU_TILED_MM"

# True once a model was opened in this process for which the library may have decided to tile.
_tiled = False


class NotExact(Exception):
    """A model or a setting excludes the profile; the message is one line and says what would be right."""


def exact_config(config: ModelConfig, gpu: str) -> ModelConfig:
    """`config` with the settings of the profile. Raises NotExact for a setting that contradicts it."""
    if config.kv_unified:
        raise NotExact("with --kv-unified the order of a sequence's cells depends on the other sequences; leave it out")
    if gpu:
        raise NotExact(f"the kernels of {gpu} are chosen by the number of rows; use -ngl 0")
    if config.flash_attention == "off":
        raise NotExact("attention depends on the number of rows without -fa on")
    types = (config.cache_type_k, config.cache_type_v)
    if types == ("f16", "f16"):
        types = ("f16", "bf16")
    if types not in CACHE_TYPES:
        known = ", ".join(f"-ctk {k} -ctv {v}" for k, v in CACHE_TYPES)
        raise NotExact(
            f"attention over {types[0]} keys and {types[1]} values depends on the number of rows; use {known}"
        )
    return structs.replace(config, kv_unified=False, flash_attention="on", cache_type_k=types[0], cache_type_v=types[1])


def begin(path: Path, *, exact: bool) -> None:
    """Switches tiling off for an exact model; to be called before each model is loaded. Raises NotExact if the weights,
    or a model that this process opened before, exclude the profile."""
    global _tiled
    if not exact:
        _tiled = True
        return
    kinds = products(path)
    for name, kind in kinds.items():
        if kind in UNEVEN:
            raise NotExact(f"its weights {name} are {kind}, whose product with a single row is another kernel")
    if _tiled and os.environ.get(TILED) != "0" and any("_K" in kind or "iq" in kind for kind in kinds.values()):
        raise NotExact("this process has opened another model without --deterministic before")
    os.environ[TILED] = "0"


def products(path: Path) -> dict[str, str]:
    """The types, by name, of the weights of a GGUF that rows are multiplied with."""
    found = types(path)
    if "output.weight" in found:
        found.pop("token_embd.weight", None)  # looked up, not multiplied
    return {name: kind for name, kind in found.items() if "norm" not in name and name.endswith(".weight")}


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def types(path: Path) -> dict[str, str]:
    """The types of all tensors of a GGUF by name; empty if the library cannot read it."""
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
