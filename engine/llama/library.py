"""The native library as a whole: its log, its flag to stop, its types."""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable
from functools import cache
from math import inf
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

SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
"""`enum llama_split_mode`."""

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


GPU = 1
"""`GGML_BACKEND_DEVICE_TYPE_GPU`."""


@cache
def _lib() -> Any:
    """The library, with the types of its functions about devices, which the binding does not know."""
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
    """The GPUs that the library can use."""
    lib = _lib()
    known = [lib.ggml_backend_dev_get(number) for number in range(lib.ggml_backend_dev_count())]
    return [device for device in known if lib.ggml_backend_dev_type(device) == GPU]


def _name(device: int) -> str:
    name: bytes = _lib().ggml_backend_dev_name(device)
    return name.decode("utf-8", "replace")


def devices(names: str) -> Any:
    """The devices of these names, separated by commas, as the library takes them; None for no names.

    Raises ValueError, which lists the names there are, for one that there is not.
    """
    if not names:
        return None
    lib = _lib()
    wanted = [name.strip() for name in names.split(",")]
    found = [lib.ggml_backend_dev_by_name(name.encode()) for name in wanted]
    if None in found:
        listed = ", ".join(_name(lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count()))
        raise ValueError(f"there is no device {wanted[found.index(None)]!r}; there are: {listed}")
    return (ctypes.c_void_p * (len(found) + 1))(*found, None)


def split(proportions: str) -> Any:
    """How much of the model each device gets, from numbers with commas between them, as the library takes it; None for
    an empty text. Raises ValueError, which says what would be right."""
    if not proportions:
        return None
    most: int = native.llama_max_devices()
    try:
        shares = [float(share) for share in proportions.split(",")]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or not 0 < sum(shares) < inf or len(shares) > most:
        raise ValueError(f"{proportions!r} is no split: give up to {most} numbers from 0 on, as in 3,1, not only 0")
    return (ctypes.c_float * most)(*shares)


def free_memory() -> dict[str, int]:
    """The bytes that are free on each GPU, by its name."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    found = {}
    for device in _gpus():
        _lib().ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found[_name(device)] = free.value
    return found


def accelerator() -> str:
    """The name of the first GPU that the library can use; empty if it was built without or finds none."""
    if not native.llama_supports_gpu_offload() or not (found := _gpus()):
        return ""
    described: bytes = _lib().ggml_backend_dev_description(found[0])
    return described.decode("utf-8", "replace")
