"""Parameters of a model's load: devices, buffers of tensors, load mode and overrides of the metadata."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from llama_cpp import llama_cpp as native

from engine.config import LoadConfig, ModelConfig
from engine.llama import library

# Names of tensors, as in llama.cpp's `common.h`.
EXPERT_TENSORS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
DENSE_TENSORS = r"\.ffn_(up|down|gate)\."

# `enum llama_load_mode` and `enum llama_lazy_mode`.
LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "dio": 4}
LAZY_MODES = {"off": 0, "auto": 1, "on": 2}

# `enum llama_model_kv_override_type`, and the size of a key and of a text with its final zero byte.
_INT, _FLOAT, _BOOL, _STR = range(4)
_TEXT_BYTES = 128


class _BufferOverride(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def set_placement(model: ModelConfig, load: LoadConfig, params: Any) -> tuple[Any, ...]:
    """Sets all `params` of a load except the callback. Returns the arrays that must live until the model is loaded.
    Raises ValueError for invalid settings."""
    library.add_rpc_servers(load.rpc)
    params.n_gpu_layers = model.gpu_layers
    chosen, shares = library.parse_devices(model.device), library.parse_tensor_split(model.tensor_split)
    if chosen is not None:
        params.devices = ctypes.cast(chosen, ctypes.c_void_p)
    if shares is not None:
        params.tensor_split = shares
    params.split_mode, params.main_gpu = library.SPLIT_MODES[model.split_mode], model.main_gpu
    params.load_mode, params.lazy_mode = LOAD_MODES[load.mode], LAZY_MODES[load.lazy_mode]
    params.check_tensors, params.no_host = load.check_tensors, load.no_host
    params.use_extra_bufts = load.repack and not (library.built_with_amx() or model.deterministic)
    buffers, metadata = _buffer_overrides(load), parse_overrides(load.override_kv)
    if buffers is not None:
        params.tensor_buft_overrides = ctypes.cast(buffers, ctypes.c_void_p)
    if metadata is not None:
        params.kv_overrides = metadata
    return chosen, shares, buffers, metadata


def buffer_patterns(load: LoadConfig) -> list[tuple[str, str]]:
    """Returns regular expressions for names of tensors, each with the name of a buffer type, in the order in which they
    are tried. Raises ValueError."""
    patterns = []
    for override in load.override_tensor:
        pattern, equals, buffer = override.rpartition("=")
        if not (pattern and equals and buffer):
            raise ValueError(f"--override-tensor {override} is not PATTERN=BUFFER, such as exps=CPU")
        patterns.append((pattern, buffer))
    patterns += [(rf"blk\.{layer}{EXPERT_TENSORS}", "CPU") for layer in range(load.n_cpu_moe)]
    patterns += [(rf"blk\.{layer}{DENSE_TENSORS}", "CPU") for layer in range(load.n_cpu_ffn)]
    return [*patterns, (EXPERT_TENSORS, "CPU")] if load.cpu_moe else patterns


def _buffer_overrides(load: LoadConfig) -> Any:
    """Returns `llama_model_params.tensor_buft_overrides`; None without overrides. Raises ValueError for an unknown
    buffer type."""
    patterns = buffer_patterns(load)
    if not patterns:
        return None
    types = library.buffer_types()
    if unknown := next((buffer for _, buffer in patterns if buffer not in types), None):
        raise ValueError(f"--override-tensor: there is no buffer {unknown!r}; the buffers are: {', '.join(types)}")
    found = [_BufferOverride(pattern.encode(), types[buffer]) for pattern, buffer in patterns]
    return (_BufferOverride * (len(found) + 1))(*found)


def parse_overrides(overrides: Sequence[str]) -> Any:
    """Returns `llama_model_params.kv_overrides`, an array that ends with an empty key; None without overrides. Raises
    ValueError for a text that is not KEY=TYPE:VALUE."""
    if not overrides:
        return None
    return (native.llama_model_kv_override * (len(overrides) + 1))(*map(_override, overrides))


def _override(text: str) -> Any:
    key, _, typed = text.partition("=")
    kind, colon, value = typed.partition(":")
    parsed = native.llama_model_kv_override()
    try:
        if not 0 < len(key.encode()) < _TEXT_BYTES or not colon:
            raise ValueError
        parsed.key = key.encode()
        match kind:
            case "int":
                parsed.tag, parsed.value.val_i64 = _INT, int(value)
            case "float":
                parsed.tag, parsed.value.val_f64 = _FLOAT, float(value)
            case "bool" if value in ("true", "false"):
                parsed.tag, parsed.value.val_bool = _BOOL, value == "true"
            case "str" if len(value.encode()) < _TEXT_BYTES:
                parsed.tag, parsed.value.val_str = _STR, value.encode()
            case _:
                raise ValueError
    except ValueError:
        raise ValueError(
            f"--override-kv {text} is not KEY=TYPE:VALUE with the type int, float, bool (true or false) or str (up to "
            f"{_TEXT_BYTES - 1} bytes), such as tokenizer.ggml.add_bos_token=bool:false"
        ) from None
    return parsed
