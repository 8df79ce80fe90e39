"""Jobs of the event loop on worker threads: few at once, each with a soft and a hard time limit."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

# Busy threads at most, excluding those past the soft time limit.
BUSY_THREADS = 2
# After this time the next job in the queue may begin as well.
SOFT_LIMIT_SECONDS = 2.0
# Threads at most. A thread cannot be stopped, so no more jobs than this can be abandoned.
MAX_THREADS = 8
# Niceness of the threads, on systems where each thread has a niceness of its own.
NICENESS = 10
# Reserved, not used: llguidance recurses into a rule inside of another, and the longest chain of rules that fits
# `MAX_GRAMMAR_BYTES` needs more than 64 MiB.
STACK_BYTES = 2**29

_Result = TypeVar("_Result")


class JobTimeout(Exception):
    """A job passed the hard time limit."""


class CompilerClosed(Exception):
    """A job was not finished when its queue was closed, or was submitted later."""


class _Job(Generic[_Result]):
    """One job, from submission to its end."""

    def __init__(self, key: bytes, work: Callable[[], _Result]) -> None:
        self.key = key
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.result: asyncio.Future[_Result] = self.loop.create_future()
        self.callers = 0
        self.timer: asyncio.TimerHandle | None = None
        self.past_soft_limit = False
        self.abandoned = False


class JobQueue(Generic[_Result]):
    """Runs jobs on threads, jobs with equal keys once. Its methods run on the event loop."""

    def __init__(self, name: str, seconds: float) -> None:
        """`name` is the threads' name; `seconds` is the hard limit of a job, its time in the queue included."""
        self._name = name
        self._seconds = seconds
        self._jobs: dict[bytes, _Job[_Result]] = {}
        self._queue: deque[_Job[_Result]] = deque()
        self._busy = 0
        self._threads = 0
        self._closed = False

    async def run(self, key: bytes, work: Callable[[], _Result]) -> _Result:
        """Returns the result of `work`, or raises its exception.

        Raises JobTimeout at the hard limit, and at once while an abandoned job with this key still runs. Raises
        CompilerClosed if the queue is closed, also during the job.
        """
        if self._closed:
            raise CompilerClosed
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(key, work)
            self._queue.append(job)
        if job.abandoned:
            raise JobTimeout
        job.callers += 1
        try:
            self._start_jobs()
            return await asyncio.wait_for(asyncio.shield(job.result), self._seconds)
        except TimeoutError:
            raise JobTimeout from None
        finally:
            job.callers -= 1

    def close(self) -> None:
        """Raises CompilerClosed in all callers and starts no further job. Running threads are not joined."""
        self._closed = True
        for job in self._jobs.values():
            self._resolve(job, partial(job.result.set_exception, CompilerClosed()))

    def _start_jobs(self) -> None:
        """Starts jobs while threads are available. Jobs without callers are dropped."""
        while self._queue and self._busy < BUSY_THREADS and self._threads < MAX_THREADS and not self._closed:
            job = self._queue.popleft()
            if not job.callers:
                del self._jobs[job.key]
                continue
            try:
                thread = self._start_thread(job)
            except RuntimeError as error:  # the process has too many threads; a later job may succeed
                del self._jobs[job.key]
                self._resolve(job, partial(job.result.set_exception, error))
                continue
            self._busy += 1
            self._threads += 1
            limit = min(SOFT_LIMIT_SECONDS, self._seconds)
            job.timer = job.loop.call_later(limit, self._pass_soft_limit, job, thread)

    def _start_thread(self, job: _Job[_Result]) -> threading.Thread:
        """Starts a daemon thread, so that the process can end before the job."""
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=self._work, args=(job,), name=self._name, daemon=True)
            thread.start()
            return thread
        finally:
            threading.stack_size(before)

    def _pass_soft_limit(self, job: _Job[_Result], thread: threading.Thread) -> None:
        job.past_soft_limit = True
        self._busy -= 1
        job.timer = job.loop.call_later(self._seconds - SOFT_LIMIT_SECONDS, self._abandon, job, thread)
        self._start_jobs()

    def _abandon(self, job: _Job[_Result], thread: threading.Thread) -> None:
        """Leaves the thread of a job past the hard limit only idle CPU time."""
        job.abandoned = True
        with suppress(AttributeError, OSError):
            os.sched_setscheduler(thread.native_id or 0, os.SCHED_IDLE, os.sched_param(0))

    def _finish(self, job: _Job[_Result], set_result: Callable[[], None]) -> None:
        assert job.timer is not None, "a finished job was started"
        job.timer.cancel()
        del self._jobs[job.key]
        self._threads -= 1
        self._busy -= not job.past_soft_limit
        self._resolve(job, set_result)
        self._start_jobs()

    def _resolve(self, job: _Job[_Result], set_result: Callable[[], None]) -> None:
        if job.callers and not job.result.done():
            set_result()

    # ── on the thread ──

    def _work(self, job: _Job[_Result]) -> None:
        with suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            set_result = partial(job.result.set_result, job.work())
        except BaseException as error:  # a panic in a Rust library is no Exception
            set_result = partial(job.result.set_exception, error)
        with suppress(RuntimeError):  # the event loop has ended
            job.loop.call_soon_threadsafe(self._finish, job, set_result)
