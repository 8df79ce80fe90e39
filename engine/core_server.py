"""The process of an engine core: a `LocalCore` for the client at the other end of a socket."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvloop
from msgspec import structs

from engine.commands import Cancel, FailAll, Submit
from engine.config import EngineConfig
from engine.contract import ENGINE_FAILED, REQUEST_FAILED, EngineError, EngineFault, Failed, ShutDown
from engine.core_messages import (
    Abandon,
    Answer,
    Call,
    Close,
    CoreState,
    KVChanges,
    LoadedShare,
    OpenedCore,
    OpenFailed,
    StopCompiling,
)
from engine.local_core import LocalCore
from engine.message_link import MessageLink, MessageSender
from engine.outbox import StepOutput
from engine.speculate import ProposerFactory
from engine.thread import Listener, Opener
from engine.watchdog import hanging_threads

log = logging.getLogger("paceline.engine")

# Time between two `CoreState`s, so that the client's is at most that old, and the maximum if nothing changes.
STATE_SECONDS, HEARTBEAT_SECONDS = 0.1, 1.0
# Signals that the client handles: it drains the engine at the first one.
CLIENT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve_core(
    end: socket.socket,
    config: EngineConfig,
    opener: Opener,
    proposer_factory: ProposerFactory | None,
    configure: Callable[[], None],
) -> None:
    """Serves an engine core until its client closes it or has ended. The main function of the process, which calls
    `configure` first and ignores `CLIENT_SIGNALS`."""
    for number in CLIENT_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CLIENT_SIGNALS)
    configure()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_CoreServer(end).serve(config, opener, proposer_factory))
        if hanging_threads():
            logging.shutdown()
            os._exit(1)


class _CoreServer:
    """Executes the client's messages, and sends outputs, answers, faults and states."""

    _core: LocalCore

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sender = MessageSender(end)
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._compiling: dict[int, asyncio.Task[None]] = {}  # submitted requests without their grammar, by key
        self._opening: asyncio.Task[Any] | None = None  # opens the core
        self._fails_all = False  # True after `FailAll`
        self._publishing: asyncio.Task[None] | None = None  # until the end of the process
        self._closing = asyncio.Event()

    async def serve(self, config: EngineConfig, opener: Opener, proposer_factory: ProposerFactory | None) -> None:
        """Serves until the client closes the core. Ends the process at once if the client has ended."""
        receiving, send = await MessageLink.connect(self._end, self._receive, self._on_end), self._sender.send
        listener = Listener(lambda share: send(LoadedShare(share)), self._deliver, send)
        self._opening = asyncio.current_task()
        try:
            async with LocalCore.open(config, opener, proposer_factory, listener) as self._core:
                self._opening = None
                gc.collect()
                gc.freeze()  # later collections of garbage, which stop all threads, leave out what exists now
                send(OpenedCore.of(self._core))
                self._publishing = asyncio.create_task(self._publish_states())
                await self._closing.wait()
        except EngineError as error:
            send(OpenFailed(error))
        except asyncio.CancelledError:  # closed before it was opened
            pass
        except Exception:
            log.exception("the engine has failed")
            send(OpenFailed(EngineFault(ENGINE_FAILED, fatal=True)))
        self._opening = None
        self._closing.set()
        receiving.close()

    def _on_end(self) -> None:
        if not self._closing.is_set():
            os._exit(1)

    async def _publish_states(self) -> None:
        last, sent_at, clock = None, 0.0, asyncio.get_running_loop().time
        while True:
            try:
                if (state := CoreState.of(self._core)) != last or clock() - sent_at >= HEARTBEAT_SECONDS:
                    self._sender.send(state)
                    last, sent_at = state, clock()
            except Exception:
                log.exception("the state of the engine cannot be sent")
            await asyncio.sleep(STATE_SECONDS)

    def _receive(self, message: Any) -> None:
        match message:
            case Submit(key, request) if request.grammar is not None:
                self._compiling[key] = compiling = asyncio.create_task(self._submit(message))
                compiling.add_done_callback(lambda _: self._compiling.pop(key))
            case Cancel(key) if key in self._compiling:
                self._compiling[key].add_done_callback(lambda _: self._core.put(message))
            case FailAll():
                self._fails_all = True
                for key, compiling in self._compiling.items():
                    compiling.cancel()
                    self._fail(key, ShutDown())
                self._core.put(message)
            case Submit() | Cancel():
                self._core.put(message)
            case Call(number):
                self._calls[number] = call = asyncio.create_task(self._answer(message))
                call.add_done_callback(lambda _: self._calls.pop(number))
            case Abandon(number):
                if number in self._calls:
                    self._calls[number].cancel()
            case StopCompiling():
                self._core.stop_compiling()
            case Close():
                self._closing.set()
                if self._opening is not None:
                    self._opening.cancel()

    async def _submit(self, command: Submit) -> None:
        """Submits a request with the native grammar, from the cache of compiled ones in most cases."""
        key, request = command.key, command.request
        assert request.grammar is not None
        try:
            grammar = await self._core.compile(request.grammar.spec)
            if self._fails_all:  # a library may have swallowed the cancellation
                return
            self._core.put(structs.replace(command, request=structs.replace(request, grammar=grammar)))
        except EngineError as error:
            self._fail(key, error)
        except Exception:
            log.exception("a request cannot start")
            self._fail(key, EngineFault(REQUEST_FAILED))

    def _deliver(self, outputs: list[StepOutput]) -> None:
        self._sender.send(tuple(zip(*outputs, strict=True)))  # columns, as they are pickled in a sixth of the time

    def _fail(self, key: int, error: EngineError) -> None:
        self._deliver([StepOutput(key, (), (), Failed(error))])

    async def _answer(self, call: Call) -> None:
        try:
            self._sender.send(Answer(call.number, await self._result(call)))
        except EngineError as error:
            self._sender.send(Answer(call.number, None, error))
        except Exception:  # such as a result that cannot be pickled
            log.exception("the call of %s has failed", call.method)
            self._sender.send(Answer(call.number, None, EngineFault(REQUEST_FAILED)))

    async def _result(self, call: Call) -> Any:
        match call.method:
            case "query":
                return await self._core.query(pickle.loads(*call.arguments))
            case "report_kv_changes":
                return await self._core.report_kv_changes(lambda changes: self._sender.send(KVChanges(changes)))
            case method:
                return await getattr(self._core, method)(*call.arguments)
