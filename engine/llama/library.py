"""The native library as a whole: its log, its flag to stop, its types."""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from llama_cpp import llama_cpp as native

log = logging.getLogger("paceline.native")

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
"""`enum ggml_type` of the types a cell may have."""

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
"""`enum llama_flash_attn_type`."""

ERROR = 4
"""The library's level of errors. They are logged as the rest is: failures reach the caller as exceptions."""

_complaints: deque[str] = deque(maxlen=20)


def _record(level: int, text: bytes, user_data: object) -> None:
    line = text.decode("utf-8", "replace").strip()
    if not line:
        return
    if level == ERROR:
        _complaints.append(line)
    log.debug("%s", line)


# The library keeps the pointer: the object must live as long as the process.
_callback = native.llama_log_callback(_record)


def start() -> None:
    """Makes the library ready and takes over its log. Harmless to repeat."""
    native.llama_log_set(_callback, ctypes.c_void_p(0))
    native.llama_backend_init()
    forget()


def forget() -> None:
    """Drops the errors so far, so that `complaint` is about what comes next."""
    _complaints.clear()


def amx() -> bool:
    """Whether the library was compiled to use AMX tiles, which end the process at the first step on some machines
    (ggml-org/llama.cpp issue 20824): weights must then not be laid out for them."""
    return b"AMX_INT8 = 1" in native.llama_print_system_info()


def build() -> str:
    """Which library computes: its version and commit, and what it was compiled to use of this machine."""
    lib = native._lib
    lib.ggml_version.restype = lib.ggml_commit.restype = ctypes.c_char_p
    features: bytes = native.llama_print_system_info()
    return f"ggml {lib.ggml_version().decode()} {lib.ggml_commit().decode()} {features.decode('utf-8', 'replace')}"


def complaint() -> str:
    """The library's own reason for a failure: its first error line since `forget`, else nothing."""
    return next(iter(_complaints), "")


def text_of(call: Callable[[Any, int], int]) -> str:
    """The string that `call(buffer, size)` writes; its result is the length that it needs, negative for none."""
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = call(buffer, size)
        if needed < size:
            return buffer.value.decode("utf-8", "replace") if needed >= 0 else ""
        size = needed + 1


class StopFlag:
    """Aborts the decodes of one context, from any thread, without taking the interpreter's lock.

    The library asks a C function, after every node of the graph, whether to stop. `strlen` of a buffer is such a
    function: 0 while the buffer is empty, 1 once a byte stands in it.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self._asked = ctypes.cast(ctypes.CDLL(None).strlen, native.ggml_abort_callback)

    def install(self, context: Any) -> None:
        """Lets `context` ask this flag. It must not outlive the flag."""
        native.llama_set_abort_callback(context, self._asked, ctypes.cast(self._buffer, ctypes.c_void_p))

    def set(self) -> None:
        """From now on decodes stop."""
        self._buffer[0] = b"\x01"


def devices(names: str) -> Any:
    """The devices of these names, separated by commas, as the library takes them; None for no names.

    Raises ValueError, which lists the names there are, for one that there is not.
    """
    if not names:
        return None
    lib = native._lib
    for function in (lib.ggml_backend_dev_by_name, lib.ggml_backend_dev_get):
        function.restype = ctypes.c_void_p
    lib.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_name.restype, lib.ggml_backend_dev_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    wanted = [name.strip() for name in names.split(",")]
    found = [lib.ggml_backend_dev_by_name(name.encode()) for name in wanted]
    if None in found:
        known = (lib.ggml_backend_dev_name(lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count()))
        listed = ", ".join(name.decode("utf-8", "replace") for name in known)
        raise ValueError(f"there is no device {wanted[found.index(None)]!r}; there are: {listed}")
    return (ctypes.c_void_p * (len(found) + 1))(*found, None)


def accelerator() -> str:
    """The name of the first GPU that the library can use; empty if it was built without or finds none."""
    if not native.llama_supports_gpu_offload():
        return ""
    by_type, describe = native._lib.ggml_backend_dev_by_type, native._lib.ggml_backend_dev_description
    by_type.restype, by_type.argtypes = ctypes.c_void_p, [ctypes.c_int]
    describe.restype, describe.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    device = by_type(1)  # GGML_BACKEND_DEVICE_TYPE_GPU
    return describe(device).decode("utf-8", "replace") if device else ""
