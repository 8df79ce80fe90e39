"""The protocol of an opened engine core, for the event loop: `LocalCore` has the core's threads in this process,
`ProcessCore` in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from engine.backend import Embedding, ModelInfo, Vocab
from engine.commands import Cancel, FailAll, Submit
from engine.embedding import EmbeddingModel
from engine.grammar import Grammar, GrammarSpec
from engine.kv.changes import ChangeSink
from engine.media import MediaReader
from engine.slotfiles import SlotTransfer
from engine.stats import MemoryInfo, Stats
from engine.step import EngineCore
from engine.thread import Result
from engine.watchdog import EngineStalled

# Commands that need no answer.
RequestCommand = Submit | Cancel | FailAll


class CoreFacts(Struct, frozen=True):
    """The properties of an opened core that do not change."""

    info: ModelInfo
    memory: MemoryInfo
    request_limit: int
    """Maximum number of tokens of one request, prompt and output together."""
    sharing_slots: int
    """Number of slots that share the context evenly; 0 if one request may use all of it."""


class CoreClient(Protocol):
    """An opened core. Its methods are called on the event loop that opened it, and raise EngineFault once the
    core has failed or closed. Each submitted request gets exactly one terminal update, unless the core fails."""

    @property
    def facts(self) -> CoreFacts:
        """The properties that do not change."""

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary; safe to use from any thread."""

    @property
    def embeddings(self) -> EmbeddingModel | None:
        """The model that computes embeddings. None if the configuration has none."""

    @property
    def media(self) -> MediaReader | None:
        """Reads prompts with images and sounds. None without a projector."""

    @property
    def process_id(self) -> int | None:
        """The id of the core's process. None if the core is in this process."""

    @property
    def stall(self) -> EngineStalled | None:
        """The error of all requests while a step exceeds the configured time. None while steps end."""

    @property
    def unavailable_proposers(self) -> Mapping[str, str]:
        """The reason for each type of proposer that no request can use."""

    def stats(self) -> Stats:
        """Returns a snapshot of the counters, at most a tenth of a second old, without `owners`."""

    def put(self, command: RequestCommand) -> None:
        """Adds a command for the engine thread, which executes them in order. No effect after the core's end."""

    async def query(self, function: Callable[[EngineCore], Result]) -> Result:
        """Returns the result of `function`, called on the engine thread between two steps, which delays all requests.
        Raises the EngineError of `function`. If the core is in another process, `function` and its result must be
        picklable."""

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """Returns the grammar of `spec`, compiled off the event loop or cached. Raises RequestRefused with the pointer
        of the wrong keyword as field, GrammarTimeout, or Draining after `stop_compiling`."""

    def stop_compiling(self) -> None:
        """Makes all running and later calls of `compile` raise Draining."""

    async def embed(self, inputs: Sequence[Sequence[int]], owner: str, weight: float) -> list[Embedding]:
        """Returns the vectors of each input. Raises EngineFault if a decode fails, Draining after `stop_embedding`."""

    async def stop_embedding(self) -> None:
        """Makes all running and later calls of `embed` raise Draining."""

    async def report_kv_changes(self, sink: ChangeSink) -> None:
        """Starts reporting blocks that enter and leave cells, RAM or disk (see `KVCache.report_changes`). `sink` is
        called on any thread."""

    async def save_slot(self, number: int, path: Path) -> SlotTransfer:
        """See `SlotFiles.save`."""

    async def restore_slot(self, number: int, path: Path) -> SlotTransfer:
        """See `SlotFiles.restore`."""

    async def erase_slot(self, number: int) -> int:
        """See `SlotFiles.erase`."""
