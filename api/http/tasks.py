"""Runs coroutines concurrently with cancellation. Errors are raised directly, not in exception groups."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio
from starlette.types import Receive

CoroutineFunction = Callable[[], Coroutine[Any, Any, None]]


async def run_concurrently(functions: Sequence[CoroutineFunction]) -> None:
    """Runs all `functions` until they return. The first error cancels the others and is raised."""
    if len(functions) == 1:
        await functions[0]()
        return
    errors: list[Exception] = []
    async with anyio.create_task_group() as tasks:

        async def run(function: CoroutineFunction) -> None:
            try:
                await function()
            except Exception as error:
                errors.append(error)
                tasks.cancel_scope.cancel()

        for function in functions:
            tasks.start_soon(run, function)
    if errors:
        raise errors[0]


async def run_until_disconnect(receive: Receive, function: CoroutineFunction, *background: CoroutineFunction) -> bool:
    """Runs `function` and returns True. If the client disconnects first, cancels `function` and returns False.

    The `background` functions run until `function` ends and must not raise. The request's body must have been received.
    """
    done = False
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:

        async def cancel_on_disconnect() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        for other in (cancel_on_disconnect, *background):
            tasks.start_soon(other)
        try:
            await function()
            done = True
        except Exception as error:  # raised below: the task group would wrap the error in an exception group
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return done
