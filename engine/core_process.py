"""The engine core in a process of its own, so that its steps share no interpreter lock with the event loop, and a fault
of the native library ends that process only."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from msgspec import structs

from engine.backend import Embedding, EmbeddingInfo, Vocab
from engine.commands import Submit
from engine.config import EngineConfig
from engine.contract import ENGINE_FAILED, EngineFault, ModelError, ShutDown
from engine.core_client import CoreFacts, RequestCommand
from engine.core_server import (
    HEARTBEAT_SECONDS,
    Abandon,
    Answer,
    Call,
    Close,
    CoreState,
    KVChanges,
    LoadedShare,
    Method,
    OpenedCore,
    OpenFailed,
    StopCompiling,
    serve_core,
)
from engine.embedding import EmbeddingModel
from engine.grammar import Grammar, GrammarSpec
from engine.kv.changes import ChangeSink
from engine.media import MediaReader
from engine.message_link import MessageLink
from engine.outbox import StepOutput
from engine.sim.vocab import SimVocab
from engine.slotfiles import SlotTransfer
from engine.speculate import ProposerFactory
from engine.stats import Stats
from engine.step import EngineCore
from engine.thread import Listener, Opener
from engine.watchdog import CLOSE_SECONDS, HANG_SECONDS, EngineStalled

log = logging.getLogger("paceline.engine")

_Result = TypeVar("_Result")

# Minimum number of missed heartbeats of a process that stalls.
_MISSED_HEARTBEATS = 5
# Maximum time between the end of the socket and that of the process.
_EXIT_SECONDS = 5.0


def open_vocabulary(path: Path) -> AbstractContextManager[Vocab]:
    """Returns a context manager of the vocabulary of a GGUF, without its weights. Entering raises ModelError."""
    from engine.llama import open_vocabulary

    return open_vocabulary(path)


def end_of_process(exit_code: int) -> str:
    """Returns a sentence about a process that ended without a result."""
    if exit_code == -signal.SIGKILL:
        return "it was killed (SIGKILL), by a user or for lack of memory"
    if exit_code != -signal.SIGILL:
        name = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
        return f"the native library ended the process ({name})"
    return (
        "the native library was built for another processor (SIGILL); build it on this machine: "
        "pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python"
    )


class ProcessCore:
    """Implements `CoreClient` with a process that runs `serve_core`. The vocabulary is loaded here too.

    Requests of a core whose process has ended are failed by `Listener.on_fault`.
    """

    facts: CoreFacts
    vocab: Vocab
    media: MediaReader | None = None
    _link: MessageLink
    _process: multiprocessing.process.BaseProcess
    _state: CoreState

    def __init__(self, listener: Listener, stall_seconds: float) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._stall_seconds = max(stall_seconds, HEARTBEAT_SECONDS * _MISSED_HEARTBEATS) if stall_seconds else 0.0
        self._heard_at = 0.0
        self.embeddings: EmbeddingModel | None = None
        self._opened: asyncio.Future[OpenedCore] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count()
        self._kv_sink: ChangeSink | None = None
        self._closing = False
        self._failing: asyncio.Task[None] | None = None
        self._ended = ""  # why the core takes no calls; empty while it does

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: EngineConfig,
        opener: Opener,
        proposer_factory: ProposerFactory | None,
        listener: Listener,
        configure: Callable[[], None],
    ) -> AsyncIterator[ProcessCore]:
        """Returns a context manager that starts the process and loads the models. Leaving it ends all requests and the
        process. Entering raises ModelError. `configure` is called first in the process; it, `opener` and
        `proposer_factory` must be picklable."""
        if config.media.path:
            raise ModelError("--engine-process reads no images or sounds yet; leave --mmproj or --engine-process out")
        core = cls(listener, config.batch.stall_timeout)
        await core._start(config, opener, proposer_factory, configure)
        with ExitStack() as stack:
            try:
                opened = await asyncio.shield(core._opened)
                core.facts = opened.facts
                await asyncio.to_thread(core._open_vocabularies, config, opened.embeddings, stack)
                yield core
            finally:
                await core._close()

    async def _start(self, config: EngineConfig, *arguments: Any) -> None:
        own, other = socket.socketpair()
        self._link = await MessageLink.connect(own, self._receive, self._on_end)
        with other:
            self._process = multiprocessing.get_context("spawn").Process(
                target=serve_core, args=(other, config, *arguments), name="paceline-engine"
            )
            self._process.start()

    def _open_vocabularies(self, config: EngineConfig, embeddings: EmbeddingInfo | None, stack: ExitStack) -> None:
        def enter(path: str) -> Vocab:
            if config.sim.on:
                return SimVocab(config.sim.vocabulary)
            return stack.enter_context(open_vocabulary(Path(path)))

        self.vocab = enter(self.facts.info.path)
        if embeddings is not None:
            vocab = self.vocab if embeddings.path == self.facts.info.path else enter(embeddings.path)
            self.embeddings = EmbeddingModel(embeddings, vocab)

    async def _close(self) -> None:
        self._closing = True
        self._opened.cancel()
        self._link.send(Close())
        await asyncio.to_thread(self._process.join, CLOSE_SECONDS + HANG_SECONDS)
        if self._process.is_alive():
            log.error("the process of the engine does not end and is killed")
            self._process.kill()
        self._link.close()
        self._fail_calls(str(ShutDown()))
        if self._failing is not None:
            await self._failing

    @property
    def process_id(self) -> int | None:
        """The process of the core."""
        return self._process.pid

    # ── messages ──

    def _receive(self, message: Any) -> None:
        self._heard_at = self._loop.time()
        match message:
            case tuple():  # the columns of step outputs
                self._listener.on_outputs([*map(StepOutput._make, zip(*message, strict=True))])
            case Answer(number, result, error):
                if (answer := self._answers.pop(number, None)) is not None and not answer.done():
                    answer.set_result(result) if error is None else answer.set_exception(error)
            case CoreState():
                self._state = message
            case KVChanges(changes):
                assert self._kv_sink is not None
                self._kv_sink(changes)
            case LoadedShare(share):
                self._listener.on_progress(share)
            case OpenedCore():
                self._state = message.state
                _settle(self._opened, message)
            case OpenFailed(error):
                self._closing = True
                _settle(self._opened, error)
            case EngineFault():
                self._fail(message)

    def _on_end(self) -> None:
        if not self._closing:
            self._failing = self._loop.create_task(self._fail_at_end())

    async def _fail_at_end(self) -> None:
        await asyncio.to_thread(self._process.join, _EXIT_SECONDS)
        reason = end_of_process(self._process.exitcode or 0)
        if not self._opened.done():
            self._opened.set_exception(ModelError(f"the process of the engine has ended: {reason}"))
        elif not self._ended:
            log.error("the process of the engine has ended: %s", reason)
            self._fail(EngineFault(ENGINE_FAILED, fatal=True))

    def _fail(self, fault: EngineFault) -> None:
        self._fail_calls(str(fault))
        self._listener.on_fault(fault)

    def _fail_calls(self, reason: str) -> None:
        self._ended = self._ended or reason
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineFault(reason, fatal=True))

    async def _call(self, method: Method, *arguments: Any) -> Any:
        if self._ended:
            raise EngineFault(self._ended, fatal=True)
        number = next(self._numbers)
        self._link.send(Call(number, method, arguments))
        answer = self._answers[number] = self._loop.create_future()
        try:
            return await answer
        except asyncio.CancelledError:
            self._link.send(Abandon(number))
            raise
        finally:
            self._answers.pop(number, None)

    # ── CoreClient ──

    @property
    def stall(self) -> EngineStalled | None:
        """See `CoreClient`. Also the error of a process that is silent for so long, as it was stopped or holds its
        interpreter lock."""
        silent = self._loop.time() - self._heard_at
        return EngineStalled(silent) if 0.0 < self._stall_seconds < silent else self._state.stall

    @property
    def unavailable_proposers(self) -> Mapping[str, str]:
        """See `CoreClient`."""
        return self._state.unavailable_proposers

    def stats(self) -> Stats:
        """Returns the counts of at most `STATE_SECONDS` ago."""
        return self._state.stats

    def put(self, command: RequestCommand) -> None:
        """See `CoreClient`."""
        if isinstance(command, Submit):  # stop strings are found here
            command = structs.replace(command, request=structs.replace(command.request, stop_scope=None))
        self._link.send(command)

    async def query(self, function: Callable[[EngineCore], _Result]) -> _Result:
        """See `CoreClient`."""
        result: _Result = await self._call("query", function)
        return result

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """See `CoreClient`. Only the core's process has the native grammar."""
        grammar: Grammar = await self._call("compile", spec)
        return grammar

    def stop_compiling(self) -> None:
        """See `CoreClient`."""
        self._link.send(StopCompiling())

    async def embed(self, inputs: Sequence[Sequence[int]], owner: str, weight: float) -> list[Embedding]:
        """See `CoreClient`."""
        vectors: list[Embedding] = await self._call("embed", inputs, owner, weight)
        return vectors

    async def stop_embedding(self) -> None:
        """See `CoreClient`."""
        await self._call("stop_embedding")

    async def report_kv_changes(self, sink: ChangeSink) -> None:
        """See `CoreClient`. `sink` is called on the event loop."""
        self._kv_sink = sink
        await self._call("report_kv_changes")

    async def save_slot(self, number: int, path: Path) -> SlotTransfer:
        """See `SlotFiles.save`."""
        saved: SlotTransfer = await self._call("save_slot", number, path)
        return saved

    async def restore_slot(self, number: int, path: Path) -> SlotTransfer:
        """See `SlotFiles.restore`."""
        restored: SlotTransfer = await self._call("restore_slot", number, path)
        return restored

    async def erase_slot(self, number: int) -> int:
        """See `SlotFiles.erase`."""
        erased: int = await self._call("erase_slot", number)
        return erased


def _settle(opened: asyncio.Future[OpenedCore], result: OpenedCore | Exception) -> None:
    if opened.done():
        return
    if isinstance(result, Exception):
        opened.set_exception(result)
    else:
        opened.set_result(result)
