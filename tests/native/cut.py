"""Smaller or slightly different copies of a GGUF: draft models that are poor or do not fit the target, and a model
with a real vocabulary and chat template for servers whose texts do not matter."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

from engine.llama.gguf_file import gguf_library

_TOKENS = b"tokenizer.ggml.tokens"


class _FileParams(ctypes.Structure):
    """`struct gguf_init_params`, whose `ctx` receives the tensors."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


def cut(source: Path, target: Path, layers: int, respelled: Mapping[int, str] | None = None) -> Path:
    """Writes the first `layers` layers of a llama model to `target`, with the texts of some tokens replaced."""
    lib, tensors = gguf_library(), ctypes.c_void_p()
    opened = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, _FileParams)(("gguf_init_from_file", lib))
    lib.gguf_init_empty.restype = lib.ggml_get_tensor.restype = ctypes.c_void_p
    read = ctypes.c_void_p(opened(str(source).encode(), _FileParams(False, ctypes.pointer(tensors))))
    written = ctypes.c_void_p(lib.gguf_init_empty())
    lib.gguf_set_kv(written, read)
    lib.gguf_set_val_u32(written, b"llama.block_count", layers)
    if respelled:
        key = lib.gguf_find_key(read, _TOKENS)
        texts = [lib.gguf_get_arr_str(read, key, token) for token in range(lib.gguf_get_arr_n(read, key))]
        for token, text in respelled.items():
            texts[token] = text.encode()
        lib.gguf_set_arr_str(written, _TOKENS, (ctypes.c_char_p * len(texts))(*texts), ctypes.c_size_t(len(texts)))
    for number in range(lib.gguf_get_n_tensors(read)):
        name: bytes = lib.gguf_get_tensor_name(read, number)
        if not name.startswith(b"blk.") or int(name.split(b".")[1]) < layers:
            lib.gguf_add_tensor(written, ctypes.c_void_p(lib.ggml_get_tensor(tensors, name)))
    lib.gguf_write_to_file.restype = ctypes.c_bool
    assert lib.gguf_write_to_file(written, str(target).encode(), ctypes.c_bool(False))
    lib.gguf_free(written)
    lib.gguf_free(read)
    lib.ggml_free(tensors)
    return target
