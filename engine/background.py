"""The priority and the CPUs of threads that work beside the engine thread."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

_MAX_NICENESS = 19


def run_in_background(niceness: int = 0) -> None:
    """Gives the calling thread the CPUs of the process and a niceness of `niceness` above that of the process. A thread
    that the engine thread has started would otherwise have its --cpu-mask and --prio. No effect on systems where
    threads have neither."""
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
        of_process = os.getpriority(os.PRIO_PROCESS, os.getpid())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(of_process + niceness, _MAX_NICENESS))
