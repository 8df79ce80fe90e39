"""The messages between an engine core in a process of its own and its client.

Commands and `EngineFault` are messages too. The outputs of a step are a tuple of the columns of their `StepOutput`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

from engine.backend import EmbeddingInfo
from engine.contract import EngineError
from engine.core_client import CoreFacts
from engine.kv.changes import BlockChange
from engine.local_core import LocalCore
from engine.stats import Stats
from engine.watchdog import EngineStalled

Method = Literal[
    "query", "compile", "embed", "stop_embedding", "save_slot", "restore_slot", "erase_slot", "report_kv_changes"
]


class Call(Struct, frozen=True):
    """Calls a method of `CoreClient`. An `Answer` with the same number follows. The argument of `query` is pickled."""

    number: int
    method: Method
    arguments: tuple[Any, ...]


class Abandon(Struct, frozen=True):
    """Cancels a call. No effect after its answer."""

    number: int


class StopCompiling(Struct, frozen=True):
    """Calls `CoreClient.stop_compiling`."""


class Close(Struct, frozen=True):
    """Closes the core and ends the process."""


class Answer(Struct, frozen=True):
    """The result of a call, or its error."""

    number: int
    result: Any
    error: EngineError | None = None


class CoreState(Struct, frozen=True):
    """The properties of a core that change while it runs. See `CoreClient` for the attributes."""

    stats: Stats
    stall: EngineStalled | None
    unavailable_proposers: Mapping[str, str]

    @classmethod
    def of(cls, core: LocalCore) -> CoreState:
        """Returns the current state."""
        return cls(core.stats(), core.stall, core.unavailable_proposers)


class OpenedCore(Struct, frozen=True):
    """The first message of an opened core."""

    facts: CoreFacts
    embeddings: EmbeddingInfo | None
    state: CoreState

    @classmethod
    def of(cls, core: LocalCore) -> OpenedCore:
        """Returns the message about `core`."""
        return cls(core.facts, core.embeddings.info if core.embeddings else None, CoreState.of(core))


class LoadedShare(Struct, frozen=True):
    """The share of the model that is loaded, 0 to 1."""

    share: float


class OpenFailed(Struct, frozen=True):
    """The only message, besides `LoadedShare`, of a core that cannot be opened."""

    error: EngineError


class KVChanges(Struct, frozen=True):
    """Blocks that entered or left cells, RAM or disk."""

    changes: list[BlockChange]
