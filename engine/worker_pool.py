"""A process-wide pool of threads for work that would hold the event loop, such as tokenizing a long text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

_Result = TypeVar("_Result")

# Threads tokenize with llama.cpp, whose regular expression for some models recurses once per character
# (ggml-org/llama.cpp issue 27783). Only touched pages of the stack take memory.
WORKER_STACK_BYTES = 64 * 2**20

_WORKERS = 4

_current = threading.local()


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Schedules a call on an event loop, from any thread. No effect after the end of the loop."""
    with suppress(RuntimeError):  # the event loop has ended
        loop.call_soon_threadsafe(function, *arguments)


class WorkAbandoned(BaseException):
    """The result of this thread's work is no longer awaited. Not an `Exception`, so that no handler treats it as a
    failure of the work."""


class _Work:
    """A function to call on a worker thread, and the future of its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self.loop.create_future()
        self.abandoned = False

    def settle(self, set_result: Callable[[Any], None], value: Any) -> None:
        """Sets the result from the worker thread."""
        call_soon(self.loop, lambda: None if self.result.done() else set_result(value))


class WorkerPool:
    """Daemon threads that call functions for coroutines, in order of arrival.

    The process can end while a function runs. A function whose coroutine was cancelled is not started, or ends at its
    next `checkpoint`.
    """

    def __init__(self, threads: int) -> None:
        self._missing = threads
        self._queue: SimpleQueue[_Work] = SimpleQueue()

    def start(self) -> None:
        """Starts the threads. No effect at later calls."""
        before = threading.stack_size(WORKER_STACK_BYTES)
        try:
            while self._missing:
                self._missing -= 1
                threading.Thread(target=self._serve, name="paceline-worker", daemon=True).start()
        finally:
            threading.stack_size(before)

    async def run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Returns `function(*arguments)`, or raises its exception. Cancelling this coroutine abandons the work."""
        work = _Work(lambda: function(*arguments))
        if self._missing:
            self.start()
        self._queue.put(work)
        try:
            result: _Result = await work.result
            return result
        finally:
            work.abandoned = True

    def _serve(self) -> None:
        while True:
            work = self._queue.get()
            if work.abandoned:
                continue
            _current.work = work
            try:
                result = work.function()
            except BaseException as error:  # `WorkAbandoned`, or the panic of a Rust library
                work.settle(work.result.set_exception, error)
            else:
                work.settle(work.result.set_result, result)
            _current.work = work = result = None  # type: ignore[assignment]  # frees the text and the result


WORKERS = WorkerPool(_WORKERS)


def checkpoint() -> None:
    """Raises WorkAbandoned on a worker thread whose result is no longer awaited. Called between parts of long work."""
    work: _Work | None = getattr(_current, "work", None)
    if work is not None and work.abandoned:
        raise WorkAbandoned
