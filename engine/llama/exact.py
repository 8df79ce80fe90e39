"""The deterministic profile: settings under which the logits of a row do not depend on the other rows of a decode.

By default the other rows change the last bits of the logits, and sometimes a token. The profile avoids each cause in
the library's CPU kernels (llama.cpp 0c1e57098):

- The kernels for repacked K-quants process four rows together, so weights are not repacked. The kernels for plain
  K-quants are tiled from 8 rows on, so tiling is disabled by an environment variable that the library reads once. F16,
  BF16, F32 and IQ4_NL weights have a different kernel for a single row, so models with such weights are refused.
- Flash attention with F16 keys and F16 values is split, summed in F16 or tiled, depending on the number of rows. For
  keys and values of different types, and for quantised ones, there is one kernel, which sums in F32 row by row.
- Attention sums over the cells of a sequence in their order in memory. With unified KV the order depends on the other
  sequences; with per-slot KV it is always the order of positions. So the profile uses per-slot KV.
"""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import structs

from engine.config import ModelConfig
from engine.llama.gguf_file import tensor_types

# Types of keys and values for which flash attention has a single kernel. The first pair is the profile's default.
EXACT_CACHE_TYPES = (("f16", "bf16"), ("q8_0", "q8_0"), ("f16", "q8_0"))

# Types of weights that have a different kernel for a single row.
REFUSED_WEIGHT_TYPES = ("f32", "f16", "bf16", "iq4_nl")

# Environment variable that disables tiling if it is 0.
TILING_VARIABLE = "GGML_CPU_TILED_MM"

# True once this process has opened a model for which the library may have enabled tiling.
_tiling_possible = False


class NotExact(Exception):
    """A model or a setting is incompatible with the profile. The message is one line and contains the setting that
    would be correct, if there is one."""


def exact_config(config: ModelConfig, gpu: str) -> ModelConfig:
    """Returns `config` with the settings of the profile. `gpu` is the name of the GPU in use; empty for none. Raises
    NotExact for a setting that contradicts the profile."""
    if config.kv_unified:
        raise NotExact(
            "with --kv-unified the order of a sequence's cells depends on the other sequences; leave --kv-unified out"
        )
    if gpu:
        raise NotExact(f"the choice of kernels on {gpu} depends on the number of rows; use -ngl 0")
    if config.flash_attention == "off":
        raise NotExact("attention without flash attention depends on the number of rows; use -fa on")
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
    """Disables tiling if `exact` is True. Must be called before each model is loaded, with or without the profile.

    Raises NotExact if the model's weights have a refused type, or if an earlier model has enabled tiling already.
    """
    global _tiling_possible
    if not exact:
        _tiling_possible = True
        return
    types = multiplied_weights(path)
    for name, type_name in types.items():
        if type_name in REFUSED_WEIGHT_TYPES:
            raise NotExact(f"its weights {name} are {type_name}, which has a different kernel for a single row")
    tiled = any("_K" in type_name or "iq" in type_name for type_name in types.values())
    if tiled and _tiling_possible and os.environ.get(TILING_VARIABLE) != "0":
        raise NotExact("this process has already opened a model without --deterministic; use a new process")
    os.environ[TILING_VARIABLE] = "0"


def multiplied_weights(path: Path) -> dict[str, str]:
    """Returns the types of the weights in a GGUF that rows are multiplied with, keyed by the weights' names."""
    types = tensor_types(path)
    if "output.weight" in types:
        types.pop("token_embd.weight", None)  # used for look-ups only, not multiplied
    return {name: kind for name, kind in types.items() if "norm" not in name and name.endswith(".weight")}
