"""The commands that the engine thread executes between steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from engine.contract import FinishReason, Request
from engine.step import EngineCore


class Submit(Struct, frozen=True):
    """Adds a new request to the queue of requests."""

    key: int
    request: Request
    seed: int


class Cancel(Struct, frozen=True):
    """Ends a running or waiting request. No effect on a request that has ended."""

    key: int
    reason: FinishReason


class FailAll(Struct, frozen=True):
    """Ends every request with ShutDown."""


class Wake(Struct, frozen=True):
    """Runs a step, which opens the disk tier, as the model's files are hashed."""


class Query(Struct, frozen=True):
    """Calls `function` between two steps, and sets `future` to the result on the event loop."""

    function: Callable[[EngineCore], Any]
    future: asyncio.Future[Any]


Command = Submit | Cancel | FailAll | Wake | Query
