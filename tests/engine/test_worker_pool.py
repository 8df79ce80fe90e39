"""Work on worker threads: results, errors, and cancellation between the parts of long work."""

from __future__ import annotations

import asyncio
import threading

import pytest

from engine.worker_pool import WorkerPool, checkpoint


@pytest.fixture
def pool() -> WorkerPool:
    return WorkerPool(1)


async def test_results_and_errors(pool: WorkerPool) -> None:
    def fail() -> None:
        raise ValueError("no luck")

    checkpoint()  # no effect on a thread of no pool
    assert await pool.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ValueError, match="no luck"):
        await pool.run(fail)
    assert (await pool.run(threading.current_thread)).daemon


async def test_abandoned_work_ends_at_a_checkpoint_or_is_not_started(pool: WorkerPool) -> None:
    started, go, steps = threading.Event(), threading.Event(), []

    def work() -> None:
        started.set()
        go.wait()
        steps.append("checkpoint")
        checkpoint()
        steps.append("after it")

    running, queued = (asyncio.create_task(pool.run(work)) for _ in range(2))
    await asyncio.to_thread(started.wait)
    for task in (running, queued):
        task.cancel()
    await asyncio.gather(running, queued, return_exceptions=True)
    go.set()
    assert await pool.run(len, "abc") == 3
    assert steps == ["checkpoint"]
