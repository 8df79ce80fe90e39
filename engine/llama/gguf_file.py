"""The metadata and the tensors that a GGUF lists, read by the library, and the digest of its content."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as native

# Number of samples of a large model's file that enter its digest, and the bytes of each sample.
DIGEST_SAMPLES, SAMPLE_BYTES = 64, 2**20


# `GGUF_TYPE_STRING`.
_STRING = 8


class _InitParams(ctypes.Structure):
    """`struct gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@contextmanager
def opened_gguf(path: Path) -> Iterator[Any]:
    """Yields the library's handle of a GGUF. None means that the library cannot read the file."""
    lib = gguf_library()
    gguf = lib.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    try:
        yield gguf
    finally:
        if gguf:
            lib.gguf_free(gguf)


def tensor_types(path: Path) -> dict[str, str]:
    """Returns the types of all tensors in a GGUF, keyed by the tensors' names; empty if the library cannot open the
    file."""
    lib = gguf_library()
    with opened_gguf(path) as gguf:
        return {
            lib.gguf_get_tensor_name(gguf, i).decode(): lib.ggml_type_name(lib.gguf_get_tensor_type(gguf, i)).decode()
            for i in range(lib.gguf_get_n_tensors(gguf) if gguf else 0)
        }


def data_end(path: Path) -> int:
    """Returns the least size in bytes of a GGUF with all the data of its tensors; 0 if the library cannot open it."""
    lib = gguf_library()
    with opened_gguf(path) as gguf:
        tensors = range(lib.gguf_get_n_tensors(gguf) if gguf else 0)
        ends = [lib.gguf_get_tensor_offset(gguf, i) + lib.gguf_get_tensor_size(gguf, i) for i in tensors]
        return int(lib.gguf_get_data_offset(gguf)) + max(ends) if ends else 0


def read_text(path: Path, key: str) -> str:
    """Returns a text of the metadata of a GGUF; empty if there is no such text."""
    lib = gguf_library()
    with opened_gguf(path) as gguf:
        at = lib.gguf_find_key(gguf, key.encode()) if gguf else -1
        if at < 0 or lib.gguf_get_kv_type(gguf, at) != _STRING:
            return ""
        text: bytes = lib.gguf_get_val_str(gguf, at)
        return text.decode("utf-8", "replace")


@cache
def gguf_library() -> Any:
    """Returns the library with the signatures of its GGUF functions, which the binding does not declare."""
    lib = native._lib
    pointer, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    results: dict[str, Any] = {
        "gguf_init_from_file": pointer,
        "gguf_get_n_kv": number,
        "gguf_find_key": number,
        "gguf_get_key": text,
        "gguf_get_val_str": text,
        "gguf_get_kv_type": ctypes.c_int,
        "gguf_get_val_u32": ctypes.c_uint32,
        "gguf_get_val_f32": ctypes.c_float,
        "gguf_get_arr_type": ctypes.c_int,
        "gguf_get_arr_n": ctypes.c_size_t,
        "gguf_get_arr_str": text,
        "gguf_get_n_tensors": number,
        "gguf_get_tensor_name": text,
        "gguf_get_tensor_type": ctypes.c_int,
        "gguf_get_data_offset": ctypes.c_size_t,
        "gguf_get_tensor_offset": ctypes.c_size_t,
        "gguf_get_tensor_size": ctypes.c_size_t,
        "gguf_free": None,
        "ggml_type_name": text,
    }
    arguments: dict[str, tuple[Any, ...]] = {
        "gguf_init_from_file": (text, _InitParams),
        "gguf_get_n_kv": (pointer,),
        "gguf_find_key": (pointer, text),
        "gguf_free": (pointer,),
        "gguf_get_arr_str": (pointer, number, ctypes.c_size_t),
        "gguf_get_n_tensors": (pointer,),
        "gguf_get_data_offset": (pointer,),
        "ggml_type_name": (ctypes.c_int,),
    }
    for name, result in results.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments.get(name, (pointer, number))
    return lib


def digest(path: Path) -> str:
    """Returns a BLAKE2b digest of a file's size and content. Of a file larger than all samples together, only evenly
    spaced samples are read."""
    size = path.stat().st_size
    hashed = blake2b(str(size).encode(), digest_size=16)
    step = max(SAMPLE_BYTES, (size - SAMPLE_BYTES) // (DIGEST_SAMPLES - 1))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            hashed.update(file.read(SAMPLE_BYTES))
    return hashed.hexdigest()
