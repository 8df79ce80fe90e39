"""The engine core in this process: its threads, compiled grammars and the watchdog, opened and closed together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

from msgspec import structs

from engine.backend import Embedding, Vocab
from engine.config import EngineConfig
from engine.contract import Draining, GrammarTimeout, RequestRefused
from engine.core_client import CoreFacts, RequestCommand
from engine.embedding import EmbeddingModel, EmbeddingThread
from engine.grammar import CompilerClosed, CompileTimeout, Grammar, GrammarCompiler, GrammarError, GrammarSpec
from engine.kv.changes import ChangeSink
from engine.media import MediaReader
from engine.slotfiles import SlotFiles, SlotTransfer
from engine.speculate import ProposerFactory
from engine.stats import Stats, memory_info
from engine.step import EngineCore
from engine.thread import EngineThread, Listener, LoadedEngine, Opener, Result, request_limit
from engine.watchdog import EngineStalled, Watchdog


class LocalCore:
    """Implements `CoreClient` with threads of this process."""

    facts: CoreFacts
    _opened: LoadedEngine
    _grammars: GrammarCompiler
    _watchdog: Watchdog
    _slot_files: SlotFiles

    def __init__(
        self, config: EngineConfig, opener: Opener, proposer_factory: ProposerFactory | None, listener: Listener
    ) -> None:
        self._config = config
        self._thread = EngineThread(config, opener, proposer_factory, listener)
        self._embedding = EmbeddingThread(config, on_fault=listener.on_fault)
        self.embeddings: EmbeddingModel | None = None
        self.process_id = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: EngineConfig, opener: Opener, proposer_factory: ProposerFactory | None, listener: Listener
    ) -> AsyncIterator[LocalCore]:
        """Returns a context manager that loads the models. Leaving it ends all requests. Entering raises ModelError."""
        core = cls(config, opener, proposer_factory, listener)
        try:
            await core._open()
            with closing(core._grammars), core._watchdog:
                if config.model.warmup and core.facts.info.generates:
                    await core._grammars.warm_up()
                yield core
        finally:
            await core._embedding.close()
            await core._thread.close()

    async def _open(self) -> None:
        config, opened = self._config, await self._thread.open()
        self._opened, info, context = opened, opened.backend.info, opened.backend.context
        if config.embedding.enabled or not info.generates:
            self.embeddings = await self._embedding.open(opened.backend)
        limit, slots = request_limit(context, info, config.batch.slot_context), config.batch.num_slots
        self.facts = CoreFacts(
            info,
            memory_info(context, config.memory, info.kv_reason, opened.core.kv.reuse),
            limit,
            slots if not context.unified and slots > 1 and context.sequence_cells == limit else 0,
        )
        self._grammars = GrammarCompiler(self.vocab)
        self._watchdog = Watchdog(self._thread.work, config.batch.stall_timeout, opened.core.counters)
        self._slot_files = SlotFiles(self._thread, info.layout)

    @property
    def vocab(self) -> Vocab:
        """See `CoreClient`."""
        return self._opened.backend.vocab

    @property
    def media(self) -> MediaReader | None:
        """See `CoreClient`."""
        return self._opened.media

    @property
    def stall(self) -> EngineStalled | None:
        """See `CoreClient`."""
        return self._watchdog.stall

    @property
    def unavailable_proposers(self) -> Mapping[str, str]:
        """See `CoreClient`."""
        return {**self._opened.unavailable_proposers, **self._opened.core.speculative_decoding.faults}

    def stats(self) -> Stats:
        """Returns the current counts."""
        counts = self._opened.core.counters.snapshot()
        return structs.replace(counts, embeddings=self._embedding.stats, grammar=self._grammars.seconds)

    def put(self, command: RequestCommand) -> None:
        """See `CoreClient`."""
        self._thread.inbox.put(command)

    async def query(self, function: Callable[[EngineCore], Result]) -> Result:
        """See `CoreClient`."""
        return await self._thread.query(function)

    # ── grammars and embeddings ──

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """See `CoreClient`."""
        try:
            return await self._grammars.compile(spec)
        except CompileTimeout as error:
            raise GrammarTimeout(str(error)) from None
        except GrammarError as error:
            raise RequestRefused(str(error), field=error.pointer) from None
        except CompilerClosed:
            raise Draining from None

    def stop_compiling(self) -> None:
        """See `CoreClient`."""
        self._grammars.close()

    async def embed(self, inputs: Sequence[Sequence[int]], owner: str, weight: float) -> list[Embedding]:
        """See `CoreClient`."""
        return await self._embedding.embed(inputs, owner, weight)

    async def stop_embedding(self) -> None:
        """See `CoreClient`."""
        await self._embedding.close()

    # ── the KV cache ──

    async def report_kv_changes(self, sink: ChangeSink) -> None:
        """See `CoreClient`. `sink` is called on the engine thread."""
        await self.query(lambda core: core.kv.report_changes(sink))

    async def save_slot(self, number: int, path: Path) -> SlotTransfer:
        """See `SlotFiles.save`."""
        return await self._slot_files.save(number, path)

    async def restore_slot(self, number: int, path: Path) -> SlotTransfer:
        """See `SlotFiles.restore`."""
        return await self._slot_files.restore(number, path)

    async def erase_slot(self, number: int) -> int:
        """See `SlotFiles.erase`."""
        return await self._slot_files.erase(number)
