"""Work for the event loop on threads of its own: little at once, and what takes too long is given up."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

AT_ONCE = 2
"""Threads that work, those not counted that have done so for long."""
LONG = 2.0
"""Seconds after which others may begin beside them."""
THREADS = 8
"""Threads at most. One ends only with its work, so no more than this can be given up."""
NICE = 10
"""Of these threads: how far they step back where threads have priorities of their own."""
STACK = 2**29
"""Bytes, reserved and not used: grammars are read recursively, a rule inside of another, and a chain of as many as fit
a form needs more than 64 MiB."""

Made = TypeVar("Made")


class Late(Exception):
    """The work takes too long."""


class Closed(Exception):
    """The work is not done any more."""


class Job(Generic[Made]):
    """Some work, until its end."""

    def __init__(self, key: bytes, work: Callable[[], Made]) -> None:
        self.key = key
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.made: asyncio.Future[Made] = self.loop.create_future()
        self.wanted = 0
        """Those who wait for it."""
        self.timer: asyncio.TimerHandle | None = None
        self.long = False
        """Whether others may begin beside it."""
        self.late = False
        """Whether it was given up."""


class Jobs(Generic[Made]):
    """Does work that is asked for by a key, equal keys once. Everything but the work is on the event loop."""

    def __init__(self, name: str, seconds: float) -> None:
        """`name` is the threads'; `seconds` are the most that work may take, the time in the queue included."""
        self._name = name
        self._seconds = seconds
        self._jobs: dict[bytes, Job[Made]] = {}
        self._queue: deque[Job[Made]] = deque()
        self._working = 0
        self._threads = 0
        self._closed = False

    async def run(self, key: bytes, work: Callable[[], Made]) -> Made:
        """What `work` makes, or what it raises, on a thread that steps back for others.

        Raises Late if it takes too long, and at once while the same work, which was given up, still runs; Closed once
        this is closed.
        """
        if self._closed:
            raise Closed
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = Job(key, work)
            self._queue.append(job)
        if job.late:
            raise Late
        job.wanted += 1
        try:
            self._begin()
            return await asyncio.wait_for(asyncio.shield(job.made), self._seconds)
        except TimeoutError:
            raise Late from None
        finally:
            job.wanted -= 1

    def close(self) -> None:
        """Begins nothing any more, and tells those who wait. What runs goes on, and nobody waits for its end."""
        self._closed = True
        for job in self._jobs.values():
            self._settle(job, partial(job.made.set_exception, Closed()))

    def _begin(self) -> None:
        """Begins what there are threads for. What nobody waits for any more is left out."""
        while self._queue and self._working < AT_ONCE and self._threads < THREADS and not self._closed:
            job = self._queue.popleft()
            if not job.wanted:
                del self._jobs[job.key]
                continue
            try:
                thread = self._thread(job)
            except RuntimeError as error:  # there are too many threads: others may have better luck
                del self._jobs[job.key]
                self._settle(job, partial(job.made.set_exception, error))
                continue
            self._working += 1
            self._threads += 1
            job.timer = job.loop.call_later(min(LONG, self._seconds), self._pass_on, job, thread)

    def _thread(self, job: Job[Made]) -> threading.Thread:
        """The thread that does it. A process may end without it."""
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=self._work, args=(job,), name=self._name, daemon=True)
            thread.start()
            return thread
        finally:
            threading.stack_size(before)

    def _pass_on(self, job: Job[Made], thread: threading.Thread) -> None:
        """Gives others the place of work that still runs."""
        job.long = True
        self._working -= 1
        job.timer = job.loop.call_later(self._seconds - LONG, self._give_up, job, thread)
        self._begin()

    def _give_up(self, job: Job[Made], thread: threading.Thread) -> None:
        """Leaves work that still runs only what nobody else wants."""
        job.late = True
        with suppress(AttributeError, OSError):
            os.sched_setscheduler(thread.native_id or 0, os.SCHED_IDLE, os.sched_param(0))

    def _end(self, job: Job[Made], tell: Callable[[], None]) -> None:
        assert job.timer is not None, "it was begun"
        job.timer.cancel()
        del self._jobs[job.key]
        self._threads -= 1
        self._working -= not job.long
        self._settle(job, tell)
        self._begin()

    def _settle(self, job: Job[Made], tell: Callable[[], None]) -> None:
        if job.wanted and not job.made.done():
            tell()

    # ── on the thread ──

    def _work(self, job: Job[Made]) -> None:
        with suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            tell = partial(job.made.set_result, job.work())
        except BaseException as error:  # a panic of a library in Rust is no Exception
            tell = partial(job.made.set_exception, error)
        with suppress(RuntimeError):  # the loop has ended
            job.loop.call_soon_threadsafe(self._end, job, tell)
