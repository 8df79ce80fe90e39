"""The embedding thread with a backend whose decodes end on demand: cancelled requests and counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from engine.backend import Aborted, Embedding, EmbeddingInfo, RerankMarks
from engine.config import EngineConfig, ModelConfig
from engine.embedding import EmbeddingThread
from engine.embedding_queue import EmbeddingJob, EmbeddingQueue
from engine.stats import EmbeddingStats

INFO = EmbeddingInfo("m", "m.gguf", "mean", 3, 64, "", RerankMarks((), (), ()))

CONFIG = EngineConfig(model=ModelConfig(path="x"))


class BlockingBackend:
    """Decodes of the token 0 run until they are aborted."""

    info, vocab, sequences = INFO, None, 4

    def __init__(self) -> None:
        self.started = threading.Event()
        self.aborted = threading.Event()

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[Embedding]:
        self.started.set()
        if [0] in inputs:
            self.aborted.wait(10)
        if self.aborted.is_set():
            raise Aborted
        return [np.zeros((1, 3), np.float32) for _ in inputs]

    def abort(self) -> None:
        self.aborted.set()

    def resume(self) -> None:
        self.aborted.clear()

    def close(self) -> None:
        """Has nothing to free."""


async def test_cancelled_requests_end_the_decode() -> None:
    backend = BlockingBackend()
    thread = EmbeddingThread(CONFIG, lambda config, target, keep: cast("Any", backend))
    await thread.open(cast("Any", None))
    try:
        endless = asyncio.create_task(thread.embed([[0], [1]]))
        await asyncio.to_thread(backend.started.wait)
        endless.cancel()
        assert len(await asyncio.wait_for(thread.embed([[1, 2], [3]]), 10)) == 2
        assert thread.stats == EmbeddingStats(inputs=2, tokens=3, decodes=1)
    finally:
        await thread.close()


async def test_a_decode_that_another_request_needs_goes_on() -> None:
    backend = BlockingBackend()
    thread = EmbeddingThread(CONFIG, lambda config, target, keep: cast("Any", backend))
    gate = asyncio.create_task(_opened_with_two(thread))
    await asyncio.to_thread(backend.started.wait)
    cancelled, kept = await gate
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert not backend.aborted.is_set()
    kept.cancel()
    await asyncio.wait([kept])
    assert backend.aborted.is_set()
    await thread.close()


async def _opened_with_two(thread: EmbeddingThread) -> list[asyncio.Task[list[Embedding]]]:
    """Returns two requests of which the thread computes inputs in one decode, as both came before it started."""
    tasks = [asyncio.create_task(thread.embed([[0]])) for _ in range(2)]
    await asyncio.sleep(0)
    await thread.open(cast("Any", None))
    return tasks


async def test_owners_take_turns_by_their_weights() -> None:
    queue, loop = EmbeddingQueue(), asyncio.get_running_loop()

    def add(owner: str, inputs: int, tokens: int, weight: float = 1.0) -> EmbeddingJob:
        job = EmbeddingJob([[1] * tokens] * inputs, loop.create_future(), owner, weight)
        queue.add(job)
        return job

    flood = [add("flood", 100, 10) for _ in range(50)]
    assert len(queue.take(1000, 64)) == 64
    assert {job.taken for job in flood} == {1, 2}, "the requests of an owner take turns"
    other, heavy = add("other", 6, 20), add("heavy", 18, 20, 3.0)
    first = queue.take(480, 64)
    assert sum(each.job is other for each in first) in (4, 5)
    assert sum(each.job is heavy for each in first) in (13, 14, 15)
    for job in flood:
        job.cancelled = True
    rest = queue.take(10**6, 10**6)
    assert {each.job for each in rest} == {other, heavy}
    assert other.taken + heavy.taken == 24
    assert queue.take(10, 10) == []
