"""Supervision of the engine thread: finds steps that do not end, and bounds the wait for the end of the thread."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import tempfile
import threading
import time
from types import TracebackType
from typing import Self

from engine.contract import EngineError
from engine.stats import Counters

log = logging.getLogger("paceline.engine")

ENGINE_THREAD, EMBEDDING_THREAD = "paceline-engine", "paceline-embedding"

# Time between two checks, and the share of the limit to which it is reduced.
CHECK_SECONDS, CHECK_SHARE = 1.0, 0.25
# Minimum limit, as a multiple of the mean step.
STALLED_STEPS = 20
# Maximum time for the engine thread to fail the requests that remain after the grace period.
FAIL_SECONDS = 5.0
# A thread hangs if one step or command has not ended this long after the request to close.
HANG_SECONDS = 5.0
# Maximum time for a thread to end. It includes writes to disk.
CLOSE_SECONDS = 60.0


class EngineStalled(EngineError):
    """A step or command of the engine thread has not ended in time: 503."""

    def __init__(self, seconds: float, *, is_silent: bool = False) -> None:
        """`is_silent` is True if the engine's process sends nothing, so that it cannot be examined."""
        super().__init__(
            f"The engine's process has sent nothing for {seconds:.0f} s (--stall-timeout)."
            if is_silent
            else f"The engine has not finished a step for {seconds:.0f} s (--stall-timeout); its log has the stacks of "
            "all threads."
        )


class WorkClock:
    """The work of the engine thread, which calls `begin` and `end`. Any thread may read the attributes."""

    def __init__(self) -> None:
        self.number = 0
        """Number of steps and commands that have begun."""
        self.working = False
        """True while a step or command runs."""

    def begin(self) -> None:
        """Begins a step or command, and ends the one before."""
        self.number += 1
        self.working = True

    def end(self) -> None:
        """Ends the work. The thread is idle, or waits for a command."""
        self.working = False


class Watchdog:
    """Checks, on the event loop inside of its `with` block, that each step of the engine thread ends.

    The stall time is counted in checks, so that neither a stopped process nor a blocked event loop counts as a stall.
    """

    def __init__(self, clock: WorkClock, stall_seconds: float, counters: Counters) -> None:
        """A step stalls after `stall_seconds` (0: never), or `STALLED_STEPS` mean steps if that is longer."""
        self._clock = clock
        self._stall_seconds = stall_seconds
        self._counters = counters
        self._number = 0
        self._seconds = 0.0  # time for which the current work was seen to run
        self._stalled = False
        self._task: asyncio.Task[None] | None = None

    @property
    def stall(self) -> EngineStalled | None:
        """The error of all requests while a step has stalled. None while steps end."""
        return EngineStalled(self._seconds) if self._stalled else None

    def check(self, seconds: float) -> None:
        """Counts `seconds` for the running work. Logs an error with all stacks once it has stalled."""
        if not self._clock.working or self._clock.number != self._number:
            if self._stalled:
                log.warning("the engine has finished the step that took about %.0f s", self._seconds)
            self._number, self._seconds, self._stalled = self._clock.number, 0.0, False
            return
        self._seconds += seconds
        mean_step = self._counters.busy_seconds / max(1, self._counters.steps)
        if not self._stalled and self._seconds >= max(self._stall_seconds, STALLED_STEPS * mean_step):
            self._stalled = True
            log.error("the engine has not finished a step for %.0f s\n%s", self._seconds, thread_stacks())

    async def _run(self) -> None:
        interval = min(CHECK_SECONDS, CHECK_SHARE * self._stall_seconds)
        while True:
            await asyncio.sleep(interval)
            self.check(interval)

    def __enter__(self) -> Self:
        if self._stall_seconds:
            self._task = asyncio.create_task(self._run())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._task is not None:
            self._task.cancel()


def thread_stacks() -> str:
    """Returns the Python stacks of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def hanging_threads() -> list[str]:
    """Returns the names of the threads that keep the models of closed engines. They end with the process only."""
    return [thread.name for thread in threading.enumerate() if thread.name in (ENGINE_THREAD, EMBEDDING_THREAD)]


async def await_end(thread: threading.Thread, clock: WorkClock) -> None:
    """Waits for the end of `thread`. Abandons a thread that hangs: the same work runs for `HANG_SECONDS`, or the end
    takes `CLOSE_SECONDS` in all."""
    deadline = time.monotonic() + CLOSE_SECONDS
    while True:
        number = clock.number
        await asyncio.shield(asyncio.to_thread(thread.join, HANG_SECONDS))
        if not thread.is_alive():
            return
        if (clock.working and clock.number == number) or time.monotonic() > deadline:
            log.error("the thread %s does not end\n%s", thread.name, thread_stacks())
            return
