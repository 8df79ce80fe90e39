"""The embedding thread: computes embeddings beside the engine thread, many inputs in one decode.

On a CPU both threads compete for the same cores. The embedding thread, and so the library's threads for its decodes,
have a lower priority: a step of the engine preempts them, so embeddings use the time that streams leave.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from engine.backend import Aborted, Backend, Embedding, EmbeddingBackend, EmbeddingInfo, Vocab
from engine.config import EngineConfig
from engine.contract import ENGINE_FAILED, Draining, EngineError, EngineFault, ModelError
from engine.embedding_queue import EmbeddingJob, EmbeddingQueue, PackedInput
from engine.stats import EmbeddingStats
from engine.watchdog import EMBEDDING_THREAD, WorkClock, await_end
from engine.worker_pool import call_soon

log = logging.getLogger("paceline.engine")

# Niceness of the thread above that of the process, on systems where each thread has its own, and the maximum.
THREAD_NICENESS, MAX_NICENESS = 10, 19
# Maximum rows of a decode of several inputs; a longer input is decoded alone.
PACKED_ROWS = 512

# Opens the model for embeddings on the embedding thread, given the configuration, the target model, and a function that
# returns False once the load must be cancelled. Raises ModelError.
EmbeddingOpener = Callable[[EngineConfig, Backend, Callable[[], bool]], EmbeddingBackend]


def open_embedding_model(config: EngineConfig, target: Backend, keep_loading: Callable[[], bool]) -> EmbeddingBackend:
    """Opens the model of `config.embedding` with llama.cpp. Raises ModelError."""
    if config.sim.on:
        raise ModelError("the simulated model computes no embeddings; leave --embeddings out")
    from engine.llama import open_embedding

    return open_embedding(config, target, keep_loading)


class EmbeddingModel(NamedTuple):
    """The model that computes embeddings."""

    info: EmbeddingInfo
    vocab: Vocab


class EmbeddingThread:
    """The embedding thread. Its public methods are for the event loop on which it was created."""

    def __init__(
        self,
        config: EngineConfig,
        opener: EmbeddingOpener = open_embedding_model,
        on_fault: Callable[[EngineFault], None] = lambda fault: None,
    ) -> None:
        """`on_fault` is called on the event loop with the fault that ends the thread."""
        self._config = config
        self._opener = opener
        self._on_fault = on_fault
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[EmbeddingBackend] = self._loop.create_future()
        self._jobs = EmbeddingQueue()
        self._running: set[EmbeddingJob] = set()
        self._changed = threading.Condition()  # guards `_jobs`, `_decoding` and `_closing`
        self._decoding: list[PackedInput] = []  # the inputs of the running decode
        self._closing = False
        self._stats = EmbeddingStats()
        self._thread: threading.Thread | None = None
        self._work = WorkClock()
        self._backend: EmbeddingBackend | None = None

    # ── on the event loop ──

    async def open(self, target: Backend) -> EmbeddingModel:
        """Starts the thread and returns the opened model. Raises ModelError."""
        self._thread = threading.Thread(target=self._serve, args=(target,), name=EMBEDDING_THREAD, daemon=True)
        self._thread.start()
        self._backend = await asyncio.shield(self._opened)
        return EmbeddingModel(self._backend.info, self._backend.vocab)

    @property
    def stats(self) -> EmbeddingStats:
        """The counters since the start."""
        return self._stats

    async def embed(self, inputs: Sequence[Sequence[int]], owner: str = "", weight: float = 1.0) -> list[Embedding]:
        """Returns the vectors of each input. Every input must fit `EmbeddingInfo.limit`. The owners of requests take
        turns, by their weights.

        Cancelling this coroutine aborts the running decode if it has inputs of cancelled requests only. Raises
        EngineFault if a decode fails, Draining if the thread closes.
        """
        job = EmbeddingJob(inputs, self._loop.create_future(), owner, weight)
        with self._changed:
            if self._closing:
                raise Draining
            self._jobs.add(job)
            self._changed.notify()
        self._running.add(job)
        try:
            return await job.future
        finally:
            self._cancel(job)
            self._running.discard(job)

    def _cancel(self, job: EmbeddingJob) -> None:
        """Drops the inputs of a job that are not computed yet. No effect on a complete job."""
        job.cancelled = True
        with self._changed:
            if self._backend and self._decoding and all(each.job.cancelled for each in self._decoding):
                self._backend.abort()

    async def close(self) -> None:
        """Ends all requests, frees the model, and waits for the end of the thread, unless it hangs. May be called
        twice."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._opened.cancel()
        if self._backend is not None:
            self._backend.abort()
        if self._thread is not None:
            await await_end(self._thread, self._work)
        for job in self._running:
            _fail(job, Draining())

    def _fail_all(self, fault: EngineFault) -> None:
        for job in self._running:
            _fail(job, EngineFault(str(fault), fatal=True))
        self._on_fault(fault)

    # ── on the embedding thread ──

    def _serve(self, target: Backend) -> None:
        with suppress(AttributeError, OSError):
            thread = threading.get_native_id()
            niceness = os.getpriority(os.PRIO_PROCESS, thread) + THREAD_NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, min(niceness, MAX_NICENESS))
        try:
            backend = self._opener(self._config, target, lambda: not self._closing)
        except Exception as error:
            call_soon(self._loop, _refuse, self._opened, error)
            return
        call_soon(self._loop, _open, self._opened, backend)
        try:
            while packed := self._next(backend):
                self._compute(backend, packed)
        except BaseException:  # a panic of a Rust library is not an `Exception`
            log.exception("the embedding thread has failed")
            call_soon(self._loop, self._fail_all, EngineFault(ENGINE_FAILED, fatal=True))
            # The event loop still tokenizes, so the model stays open until the engine is closed.
            with self._changed:
                while not self._closing:
                    self._changed.wait()
        finally:
            backend.close()

    def _next(self, backend: EmbeddingBackend) -> list[PackedInput]:
        """Blocks until there are inputs, and returns those of the next decode; none once the thread must end."""
        self._work.end()
        with self._changed:
            self._decoding = []
            while not self._closing:
                if packed := self._jobs.take(min(PACKED_ROWS, backend.info.limit), backend.sequences):
                    backend.resume()
                    self._decoding = packed
                    return packed
                self._changed.wait()
        return []

    def _compute(self, backend: EmbeddingBackend, packed: list[PackedInput]) -> None:
        self._work.begin()
        try:
            vectors = backend.embed([each.tokens for each in packed])
        except Aborted:
            return  # the jobs are cancelled, or `close` fails them
        except Exception:
            log.exception("embeddings have failed")
            for each in packed:
                call_soon(self._loop, _fail, each.job, EngineFault("The embedding has failed; the log has the reason."))
            return
        done = self._stats
        tokens = done.tokens + sum(len(each.tokens) for each in packed)
        self._stats = EmbeddingStats(done.inputs + len(packed), tokens, done.decodes + 1)
        call_soon(self._loop, _deliver, packed, vectors)


def _open(opened: asyncio.Future[EmbeddingBackend], backend: EmbeddingBackend) -> None:
    if not opened.done():
        opened.set_result(backend)


def _refuse(opened: asyncio.Future[EmbeddingBackend], error: Exception) -> None:
    if not opened.done():
        opened.set_exception(error)


def _deliver(packed: list[PackedInput], vectors: list[Embedding]) -> None:
    for (job, number), embedding in zip(packed, vectors, strict=True):
        job.results[number] = embedding
        if len(job.results) == len(job.inputs) and not job.future.done():
            job.future.set_result([job.results[each] for each in range(len(job.inputs))])


def _fail(job: EmbeddingJob, error: EngineError) -> None:
    job.cancelled = True
    if not job.future.done():
        job.future.set_exception(error)
