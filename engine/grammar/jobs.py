"""Runs jobs of the event loop on a few worker threads, each job with a soft and a hard time limit."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

# Maximum number of busy threads, excluding those past the soft time limit.
BUSY_THREADS = 2
# Time after which a job no longer counts as busy, so that the next job in the queue can begin.
SOFT_LIMIT_SECONDS = 2.0
# Maximum number of threads. A thread cannot be stopped, so this also bounds the number of abandoned jobs.
MAX_THREADS = 8
# Niceness of the threads, on systems where each thread has its own niceness.
NICENESS = 10
# Stack size of a thread; only pages in use take memory. llguidance recurses into nested rules, and the longest chain of
# rules in `MAX_GRAMMAR_BYTES` needs more than 64 MiB.
STACK_BYTES = 2**29

_Result = TypeVar("_Result")


class JobTimeout(Exception):
    """A job exceeded the hard time limit."""


class CompilerClosed(Exception):
    """The queue was closed before the job finished, or before it was submitted."""


class _Job(Generic[_Result]):
    """One job, from its submission to its end."""

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
    """Runs jobs on threads. Calls with equal keys share one job. Its methods must be called on the event loop."""

    def __init__(self, name: str, seconds: float) -> None:
        """`name` is the name of the threads. `seconds` is the hard limit of a job, including its time in the queue."""
        self._name = name
        self._seconds = seconds
        self._jobs: dict[bytes, _Job[_Result]] = {}
        self._queue: deque[_Job[_Result]] = deque()
        self._busy = 0
        self._threads = 0
        self._closed = False

    async def run(self, key: bytes, work: Callable[[], _Result]) -> _Result:
        """Returns the result of `work`, or raises its exception.

        Raises JobTimeout at the hard limit, and at once if an abandoned job with this key still runs. Raises
        CompilerClosed if the queue is closed before the job has finished.
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
        """Makes all calls of `run` raise CompilerClosed, and starts no further job. Does not join running threads."""
        self._closed = True
        for job in self._jobs.values():
            self._resolve(job, partial(job.result.set_exception, CompilerClosed()))

    def _start_jobs(self) -> None:
        """Starts queued jobs while threads are available. Drops jobs without callers."""
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
        """Starts a thread for `job`: a daemon thread, so that the process can end before the job."""
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
        """Marks a job past the hard limit as abandoned. Its thread then runs only on idle CPUs."""
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
        except BaseException as error:  # a panic in the Rust library is not an `Exception`
            set_result = partial(job.result.set_exception, error)
        with suppress(RuntimeError):  # the event loop has ended
            job.loop.call_soon_threadsafe(self._finish, job, set_result)
