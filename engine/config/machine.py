"""The processor and the memory of this machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """Returns the model name of the processor; its architecture if the model name is unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def physical_cores() -> int:
    """Returns the number of physical cores that this process may use, at least 1."""
    cores: set[str] = set()
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for cpu in available:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return max(1, len(cores))


def cache_folder() -> Path:
    """Returns the folder of cached files: `$XDG_CACHE_HOME/paceline`, or else `~/.cache/paceline`. Raises RuntimeError
    if there is no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"


def memory_bytes() -> int:
    """Returns the size of the physical memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
