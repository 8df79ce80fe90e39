"""The engine core in a process of its own, so that steps and event loop share no GIL, and a crash of the native library
ends that process only."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import pickle
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from functools import partial
from itertools import count
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from msgspec import structs

from engine.backend import Embedding, EmbeddingInfo, Vocab
from engine.commands import Submit
from engine.config import EngineConfig
from engine.contract import ENGINE_FAILED, EngineFault, ModelError, ShutDown
from engine.core_client import CoreFacts, RequestCommand
from engine.core_messages import (
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
)
from engine.core_server import CLIENT_SIGNALS, HEARTBEAT_SECONDS, serve_core
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
from engine.thread import Listener, Opener, Result
from engine.watchdog import CLOSE_SECONDS, HANG_SECONDS, EngineStalled

log = logging.getLogger("paceline.engine")

# Minimum number of missed heartbeats of a process that stalls.
_MISSED_HEARTBEATS = 5
# Maximum time between the end of the socket and the end of the process.
_EXIT_SECONDS = 5.0
# Maximum time for the embedding thread to end, and between two messages of a process that is to end.
_STOP_SECONDS = 2 * HANG_SECONDS


def open_vocabulary(path: Path, override_kv: Sequence[str] = ()) -> AbstractContextManager[Vocab]:
    """Returns a context manager of the vocabulary of a GGUF, without its weights. `override_kv` is that of
    `LoadConfig`. Entering raises ModelError."""
    from engine.llama import open_vocabulary

    return open_vocabulary(path, override_kv)


def end_of_process(exit_code: int) -> str:
    """Returns a sentence about a process that ended without a result."""
    if exit_code == -signal.SIGKILL:
        return "SIGKILL ended the process, sent by a user or for lack of memory"
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
        self._heard_at = 0.0  # time of the last message
        self.embeddings: EmbeddingModel | None = None
        self._opened: asyncio.Future[OpenedCore] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count()
        self._kv_sink: ChangeSink | None = None
        self._is_open = False
        self._closing = False
        self._disconnected = asyncio.Event()
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
        process. Entering raises ModelError. The process calls `configure` first. `configure`, `opener` and
        `proposer_factory` must be picklable."""
        if config.media.path:
            raise ModelError("--engine-process supports no images or sounds; leave --mmproj or --engine-process out")
        core = cls(listener, config.batch.stall_timeout)
        await core._start(config, opener, proposer_factory, configure)
        with ExitStack() as stack:
            try:
                opened = await asyncio.shield(core._opened)
                core.facts, core._is_open = opened.facts, True
                vocabularies = partial(core._open_vocabularies, config, opened.embeddings, stack)
                opening = asyncio.create_task(asyncio.to_thread(vocabularies))
                try:
                    await asyncio.shield(opening)
                finally:
                    await asyncio.wait({opening})  # `stack` closes them, also after a cancellation
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
            resource_tracker.ensure_running()  # unblocks signals when it starts
            # The process ignores these signals once its imports are done. Until then it has the mask of this thread.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, CLIENT_SIGNALS)
            try:
                self._process.start()
            except BaseException:
                self._closing = True
                self._link.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _open_vocabularies(self, config: EngineConfig, embeddings: EmbeddingInfo | None, stack: ExitStack) -> None:
        if config.sim.on:
            self.vocab = SimVocab(config.sim.vocabulary)
        else:
            self.vocab = stack.enter_context(open_vocabulary(Path(self.facts.info.path), config.load.override_kv))
        if embeddings is not None:
            own = config.embedding.path  # overrides apply to the target model only
            vocab = stack.enter_context(open_vocabulary(Path(own))) if own else self.vocab
            self.embeddings = EmbeddingModel(embeddings, vocab)

    async def _close(self) -> None:
        self._closing = True
        self._opened.cancel()
        self._link.send(Close())
        self._heard_at = now = self._loop.time()  # heartbeats go on until the end
        while self._process.is_alive() and self._loop.time() < min(now + CLOSE_SECONDS, self._heard_at + _STOP_SECONDS):
            await asyncio.to_thread(self._process.join, HEARTBEAT_SECONDS)
        if self._process.is_alive():
            log.error("the process of the engine does not end and is killed")
            self._process.kill()
            await asyncio.to_thread(self._process.join, _EXIT_SECONDS)
        with suppress(TimeoutError):  # the last outputs are received before the end of the socket
            await asyncio.wait_for(self._disconnected.wait(), _EXIT_SECONDS)
        self._link.close()
        if self._failing is not None:
            await self._failing
        if self._is_open and self._process.exitcode and not self._ended:
            self._report_end()
        self._fail_calls(str(ShutDown()))

    @property
    def process_id(self) -> int | None:
        """See `CoreClient`."""
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
                self._loop.call_soon(self._listener.on_progress, share)  # whose exceptions must not close the socket
            case OpenedCore():
                self._state = message.state
                _settle(self._opened, message)
            case OpenFailed(error):
                self._closing = True
                _settle(self._opened, error)
            case EngineFault():
                self._loop.call_soon(self._fail, message)  # after the outputs that `on_outputs` has scheduled

    def _on_end(self) -> None:
        self._disconnected.set()
        if not self._closing:
            self._failing = self._loop.create_task(self._fail_at_end())

    async def _fail_at_end(self) -> None:
        await asyncio.to_thread(self._process.join, _EXIT_SECONDS)
        if not self._opened.done():
            reason = end_of_process(self._process.exitcode or 0)
            self._opened.set_exception(ModelError(f"the process of the engine has ended: {reason}"))
        elif self._is_open and not self._ended:
            self._report_end()

    def _report_end(self) -> None:
        log.error("the process of the engine has ended: %s", end_of_process(self._process.exitcode or 0))
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
        finally:
            if self._answers.pop(number, None) is not None:  # without an answer, as after a cancellation
                self._link.send(Abandon(number))

    # ── CoreClient ──

    @property
    def stall(self) -> EngineStalled | None:
        """See `CoreClient`. Also the error while no message arrives for that time, because the process was stopped or
        its event loop is blocked. None after the end or a fatal fault of the core."""
        if self._ended:
            return None
        silent = self._loop.time() - self._heard_at
        return EngineStalled(silent, is_silent=True) if 0.0 < self._stall_seconds < silent else self._state.stall

    @property
    def unavailable_proposers(self) -> Mapping[str, str]:
        """See `CoreClient`."""
        return self._state.unavailable_proposers

    def stats(self) -> Stats:
        """Returns the counts of at most `STATE_SECONDS` ago."""
        return self._state.stats

    def put(self, command: RequestCommand) -> None:
        """See `CoreClient`."""
        if isinstance(command, Submit):  # the scope is used in this process only, and may not be picklable
            command = structs.replace(command, request=structs.replace(command.request, stop_scope=None))
        self._link.send(command)

    async def query(self, function: Callable[[EngineCore], Result]) -> Result:
        """See `CoreClient`."""
        # Pickled apart, so that a function that the process cannot import fails this call only.
        result: Result = await self._call("query", pickle.dumps(function))
        return result

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """See `CoreClient`. The returned copy has no native matcher, which is in the core's process."""
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
        """See `CoreClient`. Returns after `_STOP_SECONDS` at the latest, as the process may hang."""
        if self.embeddings is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._call("stop_embedding"), _STOP_SECONDS)

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
