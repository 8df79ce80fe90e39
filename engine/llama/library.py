"""Parts of the native library that are independent of a model: log, stop flag, enumerations and devices."""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable
from functools import cache
from math import inf
from typing import Any

from llama_cpp import llama_cpp as native

native_log = logging.getLogger("paceline.native")

# Values of `enum ggml_type` for the types of K and V.
CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}

# `enum llama_split_mode`.
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}

# `enum llama_flash_attn_type`.
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}

# `GGML_LOG_LEVEL_ERROR`. The library's errors are logged on the debug level, as callers get exceptions.
_ERROR_LEVEL = 4
# `GGML_BACKEND_DEVICE_TYPE_GPU`.
_GPU_TYPE = 1

_errors: deque[str] = deque(maxlen=20)


def _record(level: int, text: bytes, user_data: object) -> None:
    line = text.decode("utf-8", "replace").strip()
    if not line:
        return
    if level == _ERROR_LEVEL:
        _errors.append(line)
    native_log.debug("%s", line)


# The library keeps the pointer, so the object must live as long as the process.
_callback = native.llama_log_callback(_record)


def initialize() -> None:
    """Initializes the library and redirects its log to `native_log`. May be called repeatedly."""
    native.llama_log_set(_callback, ctypes.c_void_p(0))
    native.llama_backend_init()
    clear_errors()


def clear_errors() -> None:
    """Drops the recorded errors, so that `first_error` returns only later ones."""
    _errors.clear()


def built_with_amx() -> bool:
    """Returns True if the library was compiled for AMX. Weights must then not be repacked for AMX, as on some machines
    its kernels end the process at the first step (ggml-org/llama.cpp issue 20824)."""
    return b"AMX_INT8 = 1" in native.llama_print_system_info()


def build_info() -> str:
    """Returns the library's version, commit and CPU features."""
    lib = native._lib
    lib.ggml_version.restype = lib.ggml_commit.restype = ctypes.c_char_p
    features: bytes = native.llama_print_system_info()
    return f"ggml {lib.ggml_version().decode()} {lib.ggml_commit().decode()} {features.decode('utf-8', 'replace')}"


def first_error() -> str:
    """Returns the first error line in the library's log since `clear_errors`; empty if there is none."""
    return next(iter(_errors), "")


def read_string(call: Callable[[Any, int], int]) -> str:
    """Returns the string that `call(buffer, size)` writes; empty if `call` returns a negative number.

    `call` returns the length of the string, without its terminator.
    """
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = call(buffer, size)
        if needed < size:
            return buffer.value.decode("utf-8", "replace") if needed >= 0 else ""
        size = needed + 1


class StopFlag:
    """Aborts the decodes of the contexts in which it is installed. Any thread may set it.

    The library calls a C function after every node of the graph and stops if the result is not 0. That function is
    `strlen` on a buffer, which needs no GIL: the result is 0 while the buffer is empty and 1 once it contains a byte.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self._callback = ctypes.cast(ctypes.CDLL(None).strlen, native.ggml_abort_callback)

    def install(self, context: Any) -> None:
        """Installs the flag in `context`, which must be freed before the flag."""
        native.llama_set_abort_callback(context, self._callback, ctypes.cast(self._buffer, ctypes.c_void_p))

    def set(self) -> None:
        """Aborts the running decode and every later one."""
        self._buffer[0] = b"\x01"


@cache
def _device_library() -> Any:
    """Returns the library with the signatures of its device functions, which the binding lacks."""
    lib, size = native._lib, ctypes.POINTER(ctypes.c_size_t)
    for name, result, arguments in (
        ("count", ctypes.c_size_t, ()),
        ("get", ctypes.c_void_p, (ctypes.c_size_t,)),
        ("by_name", ctypes.c_void_p, (ctypes.c_char_p,)),
        ("name", ctypes.c_char_p, (ctypes.c_void_p,)),
        ("description", ctypes.c_char_p, (ctypes.c_void_p,)),
        ("type", ctypes.c_int, (ctypes.c_void_p,)),
        ("memory", None, (ctypes.c_void_p, size, size)),
    ):
        function = getattr(lib, f"ggml_backend_dev_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


def _gpus() -> list[int]:
    """Returns the native handles of all GPUs that the library can use."""
    lib = _device_library()
    all_devices = [lib.ggml_backend_dev_get(number) for number in range(lib.ggml_backend_dev_count())]
    return [device for device in all_devices if lib.ggml_backend_dev_type(device) == _GPU_TYPE]


def _device_name(device: int) -> str:
    name: bytes = _device_library().ggml_backend_dev_name(device)
    return name.decode("utf-8", "replace")


def parse_devices(names: str) -> Any:
    """Returns `llama_model_params.devices` for names separated by commas; None for an empty string.

    Raises ValueError for an unknown name. The message lists the known names.
    """
    if not names:
        return None
    lib = _device_library()
    given = [name.strip() for name in names.split(",")]
    found = [lib.ggml_backend_dev_by_name(name.encode()) for name in given]
    if None in found:
        listed = ", ".join(_device_name(lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count()))
        raise ValueError(f"there is no device {given[found.index(None)]!r}; the devices are: {listed}")
    return (ctypes.c_void_p * (len(found) + 1))(*found, None)


def parse_tensor_split(proportions: str) -> Any:
    """Returns `llama_model_params.tensor_split` for numbers separated by commas; None for an empty string.

    Raises ValueError for other strings. The message contains a valid example.
    """
    if not proportions:
        return None
    limit: int = native.llama_max_devices()
    try:
        shares = [float(share) for share in proportions.split(",")]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or not 0 < sum(shares) < inf or len(shares) > limit:
        raise ValueError(
            f"{proportions!r} is not a tensor split: use up to {limit} numbers of 0 or more, not all 0, such as 3,1"
        )
    return (ctypes.c_float * limit)(*shares)


def free_memory() -> dict[str, int]:
    """Returns the free bytes of each GPU, keyed by the GPU's name."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    found = {}
    for device in _gpus():
        _device_library().ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found[_device_name(device)] = free.value
    return found


def gpu_name() -> str:
    """Returns the description of the first GPU that the library can use; empty if there is none."""
    if not native.llama_supports_gpu_offload() or not (found := _gpus()):
        return ""
    described: bytes = _device_library().ggml_backend_dev_description(found[0])
    return described.decode("utf-8", "replace")
