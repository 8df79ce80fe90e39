"""The engine thread: opens the models, steps while there is anything to, carries out commands between steps.

It owns every native object and all scheduling state. In: a queue of commands. Out: one call on the event loop for
each step. Nothing else is shared, so there is no lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from msgspec import Struct

from engine.backend import Backend, Context, ModelInfo, Progress
from engine.config import EngineConfig, processor
from engine.contract import PROPOSER_TYPES, EngineError, EngineFault, FinishReason, Request
from engine.kv import Offload, open_offload
from engine.outbox import News, Outbox
from engine.pace import Layout, Measured, Pace, StepCost, calibrate, keep, kept, warm_up
from engine.runner import SHUTTING_DOWN, Runner
from engine.sequence import Sequence
from engine.sim import open_sim, proposers
from engine.speculate import Drafting, DraftModel, Shared, Speculate, difference

log = logging.getLogger("paceline.speculation")

Answer = TypeVar("Answer")


class Submit(Struct, frozen=True):
    """A new request."""

    key: int
    request: Request
    seed: int


class Cancel(Struct, frozen=True):
    """Ends a request, running or waiting; no effect on one that ended."""

    key: int
    reason: FinishReason


class FailAll(Struct, frozen=True):
    """Ends every request with an EngineFault."""

    message: str


class Query(Struct, frozen=True):
    """Runs `function` between two steps; `answer` gets its result on the event loop."""

    function: Callable[[Runner], Any]
    answer: asyncio.Future[Any]


Command = Submit | Cancel | FailAll | Query
Opener = Callable[[EngineConfig, Progress, Callable[[], bool]], Backend]
"""Opens a model on the engine thread, told of its progress and asked whether to go on; raises EngineError."""


def open_model(config: EngineConfig, progress: Progress, go_on: Callable[[], bool]) -> Backend:
    """Opens a GGUF with llama.cpp, or what stands for one. The native library is loaded here and not before."""
    if config.sim.on:
        return open_sim(config, progress, go_on)
    from engine.llama import open_gguf

    return open_gguf(config, progress, go_on)


def calibrated(config: EngineConfig, backend: Backend, *, anew: bool = False) -> Measured:
    """What the steps of `backend`, opened with `config`, cost: measured at an earlier start, or now, if need be or
    if it is to be done `anew`."""
    model, info = config.model, backend.info
    settings = f"{model.threads} {model.threads_batch} {config.batch.ubatch} {backend.context.outputs}"
    settings += f" {model.gpu_layers} {model.device} {model.split_mode} {model.tensor_split} {model.main_gpu}"
    layout = Layout.of(backend.context)
    key = f"{info.layout} {info.device} {settings} {layout} {backend.context.sequences} {processor()}"
    measured = None if anew else kept(key)
    if measured is None:
        keep(key, measured := calibrate(backend.context))
    return measured


def request_limit(context: Context, info: ModelInfo) -> int:
    """Tokens that one request may have, prompt and output together."""
    return min(context.sequence_cells, info.trained_context or 2**30)


class Listener(NamedTuple):
    """Receives what the thread reports, on the event loop."""

    progress: Progress
    deliver: Callable[[list[News]], None]
    """Takes the outputs of a step."""
    die: Callable[[EngineFault], None]
    """Takes the reason for which the thread serves nothing more."""


class Opened(NamedTuple):
    """What is served."""

    backend: Backend
    runner: Runner
    """For commands; any thread may read its counters and what it says of itself."""
    silent: Mapping[str, str]
    """Types of proposers that guess for nobody, each with the reason."""


class EngineThread:
    """The thread, as the event loop that made it sees it."""

    def __init__(self, config: EngineConfig, opener: Opener, speculate: Speculate | None, listener: Listener) -> None:
        self._config = config
        self._opener = opener
        self._speculate = speculate
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self.inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._opened: asyncio.Future[Opened] = self._loop.create_future()
        self._asked: set[asyncio.Future[Any]] = set()
        self._end = ""  # why nothing is answered any more
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="paceline-engine")
        self._backends: list[Backend] = []
        self._silent: dict[str, str] = {}
        if not config.draft.path:
            self._silent["draft"] = "there is no draft model, see --model-draft"

    # ── on the event loop ──

    async def open(self) -> Opened:
        """Starts the thread and waits until it serves. Raises ModelError if the model cannot be opened."""
        self._thread.start()
        return await asyncio.shield(self._opened)

    async def close(self) -> None:
        """Ends whatever still runs, and waits for the thread's end."""
        self._opened.cancel()
        self._closing.set()
        for backend in self._backends:
            backend.context.abort()
        self.inbox.put(None)
        await asyncio.shield(asyncio.to_thread(self._thread.join))
        self._answer_nobody(SHUTTING_DOWN)

    async def ask(self, function: Callable[[Runner], Answer]) -> Answer:
        """What `function` answers on the thread, between two steps.

        Raises the EngineError that it raises, and EngineFault if the thread ends before; with any other exception the
        thread dies.
        """
        if self._end:
            raise EngineFault(self._end, fatal=True)
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._asked.add(answer)
        self.inbox.put(Query(function, answer))
        try:
            return await answer
        finally:
            self._asked.discard(answer)

    def _answer_nobody(self, reason: str) -> None:
        self._end = reason
        for answer in self._asked:
            _settle(answer, None, EngineFault(reason, fatal=True))

    def _die(self, fault: EngineFault) -> None:
        self._answer_nobody(str(fault))
        self._listener.die(fault)

    # ── on the engine thread ──

    def _call_soon(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _carry_out(self, runner: Runner, command: Command) -> None:
        match command:
            case Submit(key, request, seed):
                try:
                    runner.submit(self._sequence(runner, key, request, seed))
                except Exception as error:  # of the library that follows grammars
                    runner.reject(key, EngineFault(f"the request cannot start: {error}"))
            case Cancel(key, reason):
                runner.end(key, reason)
            case FailAll(message):
                runner.fail_all(message)
            case Query(function, answer):
                self._answer(runner, function, answer)

    def _sequence(self, runner: Runner, key: int, request: Request, seed: int) -> Sequence:
        batch, info = self._config.batch, runner.backend.info
        limit = request_limit(runner.context, info)
        keep = batch.keep if batch.context_shift else None
        return Sequence(key, request, seed, runner.backend.vocab, limit, keep)

    def _answer(self, runner: Runner, function: Callable[[Runner], Answer], answer: asyncio.Future[Answer]) -> None:
        try:
            found = function(runner)
        except EngineError as error:
            self._call_soon(_settle, answer, None, error)
        else:
            self._call_soon(_settle, answer, found, None)

    def _serve(self) -> None:
        with ExitStack() as stack:
            try:
                backend = self._open_model(stack)
                draft = self._open_draft(backend, stack) if self._config.draft.path else None
                offload = open_offload(self._config.memory, backend.info, whole=not backend.context.divisible)
            except Exception as error:
                self._call_soon(_settle, self._opened, None, error)
                return
            self._serve_with(backend, draft, offload)

    def _open_model(self, stack: ExitStack) -> Backend:
        backend = self._opener(
            self._config, lambda share: self._call_soon(self._listener.progress, share), self._is_wanted
        )
        stack.callback(backend.close)
        self._backends.append(backend)
        if not backend.context.partial:
            self._silent.update(dict.fromkeys(PROPOSER_TYPES, "the model cannot forget single tokens"))
        return backend

    def _open_draft(self, backend: Backend, stack: ExitStack) -> Backend | None:
        """The draft model; None, with a line in the log, if it cannot guess for the model of `backend`."""
        config = self._config.of_draft(backend.context.cells)
        draft = self._opener(config, lambda share: None, self._is_wanted)
        if reason := difference(backend.vocab, draft.vocab):
            self._refuse_draft(f"{config.model.path} does not fit the model: {reason}")
        elif not (backend.context.partial and draft.context.partial):
            self._refuse_draft("a model that cannot forget single tokens cannot verify or make drafts")
        else:
            stack.callback(draft.close)
            self._backends.append(draft)
            return draft
        draft.close()
        return None

    def _is_wanted(self) -> bool:
        return not self._closing.is_set()

    def _refuse_draft(self, reason: str) -> None:
        self._silent["draft"] = reason
        log.warning("no drafts from a model: %s", reason)

    def _serve_with(self, backend: Backend, draft: Backend | None, offload: Offload | None) -> None:
        try:
            runner = self._runner(backend, draft, offload)
            self._call_soon(_settle, self._opened, Opened(backend, runner, self._silent), None)
            self._run(runner)
            runner.close()
        except BaseException as error:  # a panic of a library in Rust is no Exception
            fault = EngineFault(f"the engine failed: {error!r}", fatal=True)
            fault.__cause__ = error
            self._call_soon(_settle, self._opened, None, fault)
            self._call_soon(self._die, fault)
            # Readers may still ask for tokens' text: close with the engine.
            while not self._closing.is_set() and self.inbox.get() is not None:
                pass

    def _runner(self, backend: Backend, draft: Backend | None, offload: Offload | None) -> Runner:
        config, batch = self._config, self._config.batch
        pace = Pace(batch.step_ms / 1000, batch.idle_step_ms / 1000)
        cost = self._cost(config, backend)
        model = None
        if draft is not None:
            own = config.of_draft(backend.context.cells)
            model = DraftModel(draft, backend.info.vocabulary, self._cost(own, draft))
        shared = Shared(config.speculation, backend.vocab)
        speculate = self._speculate or proposers(config)
        drafting = Drafting(shared, config.speculation, config.draft, model, speculate, cost)
        outbox = Outbox(self._loop, self._listener.deliver)
        return Runner(backend, batch.slots, pace, outbox, drafting, offload, config.memory.reuse)

    def _cost(self, config: EngineConfig, backend: Backend) -> StepCost:
        """What the steps of `backend` cost: measured, now or at an earlier start."""
        if not config.model.warmup:
            return StepCost(layout=Layout.of(backend.context))
        return warm_up(backend.context, calibrated(config, backend) if config.model.calibrate else None)

    def _run(self, runner: Runner) -> None:
        """Steps until told to stop; sleeps when there is nothing to step."""
        while True:
            if not runner.busy:
                runner.check_idle()
            while not runner.busy or not self.inbox.empty():
                while not runner.busy and self.inbox.empty() and runner.maintain_idle():
                    pass
                command = self.inbox.get()
                if command is None:
                    runner.fail_all(SHUTTING_DOWN)
                    runner.step()
                    return
                self._carry_out(runner, command)
                if not runner.busy:
                    runner.step()
            runner.step()


def _settle(future: asyncio.Future[Answer], result: Answer, error: Exception | None) -> None:
    """On the event loop; one that is settled or cancelled stays so."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
