"""The threads that compute on the CPU: their cores, their priority, and NUMA nodes."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

from llama_cpp import llama_cpp as native

from engine.config import CpuConfig, physical_cores
from engine.config.cpu import MAX_CPUS
from engine.llama import library
from engine.llama.library import native_log

# Niceness of each priority, added to that of the process, as llama.cpp's programs set it.
PRIORITY_NICENESS = {-1: 5, 0: 0, 1: -5, 2: -10, 3: -20}
# `enum ggml_numa_strategy`.
NUMA_STRATEGIES = {"off": 0, "distribute": 1, "isolate": 2, "numactl": 3}


class _PoolParams(ctypes.Structure):
    """`struct ggml_threadpool_params`."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * MAX_CPUS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


def thread_count(cpu: CpuConfig, threads: int) -> int:
    """Returns the number of threads: `threads` if it is positive, otherwise that of the physical cores, at most that of
    the chosen CPUs. Raises ValueError."""
    return threads if threads > 0 else min(physical_cores(), len(cpu.cpus) or MAX_CPUS)


def check_cpus(cpu: CpuConfig) -> None:
    """Raises ValueError for an invalid mask or range, and for one without any CPU that this process may use."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(MAX_CPUS))
    for cpus in (cpu.cpus, cpu.cpus_batch):
        if cpus and not cpus & usable:
            listed = ", ".join(map(str, sorted(usable)))
            raise ValueError(f"--cpu-mask and --cpu-range name no CPU that this process may use; it may use {listed}")


class ThreadPools:
    """The library's pools of threads for steps with one row and with several rows of one context."""

    def __init__(self, cpu: CpuConfig, threads: int, threads_batch: int) -> None:
        """Raises ValueError for an invalid mask or range."""
        strict_batch = cpu.strict if cpu.strict_batch is None else cpu.strict_batch
        poll_batch = cpu.poll if cpu.poll_batch is None else cpu.poll_batch
        single = _pool_params(cpu.cpus, threads, cpu.poll, strict=bool(cpu.strict))
        batch = _pool_params(cpu.cpus_batch, threads_batch, poll_batch, strict=bool(strict_batch))
        create, self._free = _pool_functions()
        self._pools = [create(ctypes.byref(batch))]
        if bytes(single) != bytes(batch):
            # The library resumes a paused pool at the first step that uses it.
            single.paused = True
            self._pools.append(create(ctypes.byref(single)))

    def attach(self, context: Any) -> None:
        """Makes `context` compute with the pools."""
        attach = native._lib.llama_attach_threadpool
        attach.restype, attach.argtypes = None, [ctypes.c_void_p] * 3
        attach(context, self._pools[-1], self._pools[0] if len(self._pools) > 1 else None)

    def close(self) -> None:
        """Frees the pools. The context must be freed before."""
        for pool in self._pools:
            self._free(pool)


def open_pools(cpu: CpuConfig, threads: int, threads_batch: int) -> ThreadPools | None:
    """Returns the pools that the configuration needs; None if the library's own threads suffice. Raises ValueError."""
    chosen = cpu.cpus or cpu.cpus_batch
    openmp = b"OPENMP = 1" in native.llama_print_system_info()
    if openmp and (cpu.poll is not None or cpu.poll_batch is not None):
        native_log.warning("--poll has no effect, as the library was built with OpenMP; set GOMP_SPINCOUNT instead")
    if not chosen and (openmp or (cpu.poll is None and cpu.poll_batch is None)):
        return None
    if openmp and chosen and threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpu.cpus or cpu.cpus_batch)  # the library pins only several threads
    return ThreadPools(cpu, threads, threads_batch)


def prepare_threads(cpu: CpuConfig) -> None:
    """Sets the priority of the calling thread, which the computing threads inherit, and initializes NUMA. Called once,
    on the thread that computes, before a model is loaded."""
    if cpu.numa != "off":
        _initialize_numa(NUMA_STRATEGIES[cpu.numa])
    if not cpu.priority:
        return
    try:
        niceness = os.getpriority(os.PRIO_PROCESS, os.getpid()) + PRIORITY_NICENESS[cpu.priority]
        os.setpriority(os.PRIO_PROCESS, 0, max(-20, min(19, niceness)))
    except OSError as error:
        native_log.warning("--prio %d has no effect: %s", cpu.priority, error.strerror)


@cache
def _initialize_numa(strategy: int) -> None:
    native.llama_numa_init(strategy)


def _pool_params(cpus: frozenset[int], threads: int, poll: int | None, *, strict: bool) -> _PoolParams:
    params = _PoolParams()
    init = native._lib.ggml_threadpool_params_init
    init.restype, init.argtypes = None, [ctypes.c_void_p, ctypes.c_int]
    init(ctypes.byref(params), threads)
    for number in cpus:
        params.cpumask[number] = True
    if poll is not None:
        params.poll = poll
    params.strict_cpu = strict
    return params


@cache
def _pool_functions() -> tuple[Any, Any]:
    """Returns `ggml_threadpool_new` and `ggml_threadpool_free`."""
    create, free = map(library.cpu_function, ("ggml_threadpool_new", "ggml_threadpool_free"))
    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(create), ctypes.CFUNCTYPE(None, ctypes.c_void_p)(free)
