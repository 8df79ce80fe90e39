"""Two ways to do several things at once and end cleanly. Errors come out as themselves, not in groups."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio
from starlette.types import Receive

Job = Callable[[], Coroutine[Any, Any, None]]


async def together(jobs: Sequence[Job]) -> None:
    """Does all jobs at once; the first that fails ends the others, and its error is raised."""
    if len(jobs) == 1:
        await jobs[0]()
        return
    failures: list[Exception] = []
    async with anyio.create_task_group() as tasks:

        async def run(job: Job) -> None:
            try:
                await job()
            except Exception as error:
                failures.append(error)
                tasks.cancel_scope.cancel()

        for job in jobs:
            tasks.start_soon(run, job)
    if failures:
        raise failures[0]


async def unless_gone(receive: Receive, job: Job, *beside: Job) -> bool:
    """Does `job` unless the client hangs up first: then `job` is cancelled and False is returned.

    The jobs `beside` it, which must not fail, run until it ends. The request's body must have been read.
    """
    done = False
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:

        async def hang_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        for other in (hang_up, *beside):
            tasks.start_soon(other)
        try:
            await job()
            done = True
        except Exception as error:  # raised outside the group, so that nobody has to unwrap it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return done
