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

from engine.devices import DeviceInfo

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

# `GGML_LOG_LEVEL_WARN` and `GGML_LOG_LEVEL_ERROR`. Errors are logged on the debug level, as callers get exceptions.
_WARNING_LEVEL, _ERROR_LEVEL = 3, 4
# The name in --device that stands for the CPU alone.
NO_DEVICE = "none"

# `GGML_BACKEND_DEVICE_TYPE_CPU` and `GGML_BACKEND_DEVICE_TYPE_GPU`.
_CPU_TYPE, _GPU_TYPE = 0, 1

# Parts of the library's warnings about a setting of the user that has no effect.
_IGNORED_SETTINGS = ("failed to mlock", "failed to VirtualLock", "Bad metadata override type")

_errors: deque[str] = deque(maxlen=20)


def _record(level: int, text: bytes, user_data: object) -> None:
    line = text.decode("utf-8", "replace").strip()
    if not line:
        return
    if level == _ERROR_LEVEL:
        _errors.append(line)
    is_ignored = level == _WARNING_LEVEL and any(words in line for words in _IGNORED_SETTINGS)
    native_log.log(logging.WARNING if is_ignored else logging.DEBUG, "%s", line)


# The library keeps the pointer, so the object must live as long as the process.
log_callback = native.llama_log_callback(_record)


def initialize() -> None:
    """Initializes the library and redirects its log to `native_log`. May be called repeatedly."""
    native.llama_log_set(log_callback, ctypes.c_void_p(0))
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

    def clear(self) -> None:
        """Lets later decodes run."""
        self._buffer[0] = b"\x00"


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
        ("by_type", ctypes.c_void_p, (ctypes.c_int,)),
        ("backend_reg", ctypes.c_void_p, (ctypes.c_void_p,)),
        ("buffer_type", ctypes.c_void_p, (ctypes.c_void_p,)),
    ):
        function = getattr(lib, f"ggml_backend_dev_{name}")
        function.restype, function.argtypes = result, arguments
    lib.ggml_backend_buft_name.restype, lib.ggml_backend_buft_name.argtypes = ctypes.c_char_p, (ctypes.c_void_p,)
    lib.ggml_backend_reg_get_proc_address.restype = lib.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    lib.ggml_backend_reg_get_proc_address.argtypes = ctypes.c_void_p, ctypes.c_char_p
    lib.ggml_backend_reg_by_name.argtypes = (ctypes.c_char_p,)
    lib.ggml_backend_register.restype, lib.ggml_backend_register.argtypes = None, (ctypes.c_void_p,)
    return lib


def _devices() -> list[int]:
    """Returns the native handles of all devices, the CPU included."""
    lib = _device_library()
    return [lib.ggml_backend_dev_get(number) for number in range(lib.ggml_backend_dev_count())]


def cpu_function(name: str) -> int:
    """Returns the address of a function of the CPU's backend by its name in C. The backend can be a library of its
    own."""
    lib = _device_library()
    backend = lib.ggml_backend_dev_backend_reg(lib.ggml_backend_dev_by_type(_CPU_TYPE))
    address: int = lib.ggml_backend_reg_get_proc_address(backend, name.encode())
    return address


def buffer_types() -> dict[str, int]:
    """Returns the native buffer type of each device, keyed by its name in --override-tensor."""
    lib = _device_library()
    found = [lib.ggml_backend_dev_buffer_type(device) for device in _devices()]
    return {lib.ggml_backend_buft_name(buffer).decode("utf-8", "replace"): buffer for buffer in found if buffer}


@cache
def add_rpc_servers(servers: tuple[str, ...]) -> None:
    """Adds the devices of RPC servers. Raises ValueError if the library was built without RPC."""
    if not servers:
        return
    lib = _device_library()
    backend = lib.ggml_backend_reg_by_name(b"RPC") if native.llama_supports_rpc() else None
    if not backend:
        raise ValueError("--rpc needs a llama-cpp-python that was built with -DGGML_RPC=on; leave --rpc out")
    address = lib.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_add_server")
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    for server in servers:
        if not (added := add_server(server.encode())):
            raise ValueError(f"--rpc: no server answers at {server}; start rpc-server there first")
        lib.ggml_backend_register(added)


def _gpus() -> list[int]:
    """Returns the native handles of all GPUs that the library can use."""
    return [device for device in _devices() if _device_library().ggml_backend_dev_type(device) == _GPU_TYPE]


def _device_name(device: int) -> str:
    name: bytes = _device_library().ggml_backend_dev_name(device)
    return name.decode("utf-8", "replace")


def parse_devices(names: str) -> Any:
    """Returns `llama_model_params.devices` for names separated by commas; None for an empty string. The name `none`
    alone means no device besides the CPU.

    Raises ValueError for an unknown name. The message lists the known names.
    """
    if not names:
        return None
    lib = _device_library()
    given = [] if names == NO_DEVICE else [name.strip() for name in names.split(",")]
    found = [lib.ggml_backend_dev_by_name(name.encode()) for name in given]
    if None in found:
        listed = ", ".join(map(_device_name, _devices()))
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


def free_gpu_memory() -> dict[str, int]:
    """Returns the free bytes of each GPU, keyed by the GPU's name."""
    return {info.name: info.free_bytes for info in map(_device_info, _gpus())}


def list_devices() -> list[DeviceInfo]:
    """Returns all devices besides the CPU."""
    type_of = _device_library().ggml_backend_dev_type
    return [_device_info(device) for device in _devices() if type_of(device) != _CPU_TYPE]


def _device_info(device: int) -> DeviceInfo:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _device_library().ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    described: bytes = _device_library().ggml_backend_dev_description(device)
    return DeviceInfo(_device_name(device), described.decode("utf-8", "replace"), total.value, free.value)


def gpu_name() -> str:
    """Returns the description of the first GPU that the library can use; empty if there is none."""
    if not native.llama_supports_gpu_offload() or not (found := _gpus()):
        return ""
    described: bytes = _device_library().ggml_backend_dev_description(found[0])
    return described.decode("utf-8", "replace")
