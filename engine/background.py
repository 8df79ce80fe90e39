"""The priority and the CPUs of threads that run concurrently with the engine thread."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

_MAX_NICENESS = 19


def run_in_background(niceness: int = 0) -> None:
    """Gives the calling thread the CPUs of the process, and a niceness that is `niceness` above that of the process.

    A thread that the engine thread starts inherits --cpu-mask and --prio until this call. No effect on systems without
    CPUs and niceness of single threads.
    """
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
        process_niceness = os.getpriority(os.PRIO_PROCESS, os.getpid())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(process_niceness + niceness, _MAX_NICENESS))
