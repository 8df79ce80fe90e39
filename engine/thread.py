"""The engine thread: opens the models, runs steps while there are requests, and executes commands between steps.

The thread owns every native object and all scheduling state. Its input is a queue of commands, its output one call on
the event loop per step. No other mutable state is shared, so there is no lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from engine.backend import Backend, Context, LoadProgress, ModelInfo
from engine.commands import Cancel, Command, FailAll, Query, Submit, Wake
from engine.config import EngineConfig
from engine.contents import ContentDigest
from engine.contract import ENGINE_FAILED, PROPOSER_TYPES, EngineError, EngineFault, Request, ShutDown
from engine.draft_head import DraftHead
from engine.kv import Offload, open_offload
from engine.measured_costs import load_or_measure_costs
from engine.media import MediaEncoder, MediaReader
from engine.media_prefill import open_encoder
from engine.outbox import Outbox, StepOutput
from engine.pace import Layout, StepCost, StepTargets, warm_up
from engine.sequence import Sequence
from engine.sim import open_sim, sim_proposers
from engine.speculate import (
    DraftModel,
    MtpProposer,
    ProposerFactory,
    SharedDraftData,
    SpeculativeDecoding,
    check_draft_files,
    vocabulary_mismatch,
)
from engine.step import EngineCore
from engine.watchdog import ENGINE_THREAD, WorkClock, await_end
from engine.worker_pool import call_soon

log = logging.getLogger("paceline.engine")

# Maximum time for which the start waits for the digest of the model's files. Hashing larger files goes on beside
# requests, which use the disk tier once the digest is known.
DISK_OPEN_SECONDS = 1.0

# Maximum commands between two steps while requests run, so that a flood of commands cannot hold the steps.
COMMANDS_PER_STEP = 256

Result = TypeVar("Result")


# Opens a model on the engine thread, given the configuration, a progress callback, and a function that returns False
# once the load must be cancelled. Raises EngineError.
Opener = Callable[[EngineConfig, LoadProgress, Callable[[], bool]], Backend]


def open_model(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> Backend:
    """Opens a GGUF with llama.cpp, or a simulated model. The native library is loaded at the first GGUF."""
    if config.sim.on:
        return open_sim(config, progress, keep_loading)
    from engine.llama import open_gguf

    return open_gguf(config, progress, keep_loading)


def request_limit(context: Context, info: ModelInfo, slot_context: int) -> int:
    """Returns the maximum number of tokens of one request, prompt and output together. `slot_context` is that of the
    configuration; 0 is none."""
    return min(context.sequence_cells, info.trained_context or 2**30, slot_context or 2**30)


class Listener(NamedTuple):
    """Callbacks of the engine thread. All but `on_outputs` are called on the event loop."""

    on_progress: LoadProgress
    """Called with the share of the model that is loaded, 0 to 1."""
    on_outputs: Callable[[list[StepOutput]], None]
    """Called with the outputs of each step, on any thread."""
    on_fault: Callable[[EngineFault], None]
    """Called once, with the fatal fault, after the thread has failed."""


class LoadedEngine(NamedTuple):
    """The opened models and the core that runs them."""

    backend: Backend
    core: EngineCore
    """Only the engine thread may use it, except `counters.snapshot()`, `kv.reuse` and `speculative_decoding.faults`."""
    unavailable_proposers: Mapping[str, str]
    """The reason for each type of proposer that no request can use."""
    media: MediaReader | None = None
    """Reads prompts with images and sounds. None without a projector."""


class EngineThread:
    """The engine thread. Its public methods are for the event loop on which it was created."""

    def __init__(
        self, config: EngineConfig, opener: Opener, proposer_factory: ProposerFactory | None, listener: Listener
    ) -> None:
        self._config = config
        self._opener = opener
        self.contents = ContentDigest(Path(config.model.path))
        """The digest of the model's files, on which saved states depend."""
        self._proposer_factory = proposer_factory
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self.inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._opened: asyncio.Future[LoadedEngine] = self._loop.create_future()
        self._queries: set[asyncio.Future[Any]] = set()
        self._end_reason = ""  # why the thread ended; empty while it runs
        self._closing = threading.Event()
        self.work = WorkClock()
        self._thread = threading.Thread(target=self._serve, name=ENGINE_THREAD, daemon=True)
        self._backends: list[Backend] = []
        self._encoder: MediaEncoder | None = None
        self._unavailable: dict[str, str] = {}

    # ── on the event loop ──

    async def open(self) -> LoadedEngine:
        """Starts the thread and waits until the model is loaded. Raises ModelError if the model cannot be opened."""
        self._thread.start()
        return await asyncio.shield(self._opened)

    async def close(self) -> None:
        """Ends all requests, frees the models, and waits for the end of the thread, unless it hangs."""
        self._opened.cancel()
        self._closing.set()
        self.contents.close()
        for backend in self._backends:
            backend.context.abort()
        self.inbox.put(None)
        await await_end(self._thread, self.work)
        self._fail_queries(str(ShutDown()))

    async def query(self, function: Callable[[EngineCore], Result]) -> Result:
        """Returns the result of `function`, called on the engine thread between two steps.

        Raises the EngineError that `function` raises, and EngineFault if the thread ends before the call. Any other
        exception of `function` ends the thread.
        """
        if self._end_reason:
            raise EngineFault(self._end_reason, fatal=True)
        future: asyncio.Future[Result] = self._loop.create_future()
        self._queries.add(future)
        self.inbox.put(Query(function, future))
        try:
            return await future
        finally:
            self._queries.discard(future)

    def _fail_queries(self, reason: str) -> None:
        self._end_reason = reason
        for future in self._queries:
            _settle(future, None, EngineFault(reason, fatal=True))

    def _on_fault(self, fault: EngineFault) -> None:
        self._fail_queries(str(fault))
        self._listener.on_fault(fault)

    # ── on the engine thread ──

    def _execute(self, core: EngineCore, command: Command) -> None:
        self.work.begin()
        match command:
            case Submit(key, request, seed):
                try:
                    core.lifecycle.submit(self._sequence(core, key, request, seed))
                except Exception:  # of the library that follows grammars
                    log.exception("a request cannot start")
                    core.lifecycle.reject(key, EngineFault("The request cannot start; the log has the reason."))
            case Cancel(key, reason):
                core.lifecycle.end(key, reason)
            case FailAll():
                core.lifecycle.fail_all(ShutDown)
            case Wake():
                pass
            case Query(function, future):
                self._run_query(core, function, future)

    def _sequence(self, core: EngineCore, key: int, request: Request, seed: int) -> Sequence:
        batch, info = self._config.batch, core.backend.info
        limit = request_limit(core.context, info, batch.slot_context)
        keep = (batch.keep if request.keep is None else request.keep) if batch.context_shift else None
        return Sequence(key, request, seed, core.backend.vocab, limit, keep)

    def _run_query(
        self, core: EngineCore, function: Callable[[EngineCore], Result], future: asyncio.Future[Result]
    ) -> None:
        try:
            result = function(core)
        except EngineError as error:
            call_soon(self._loop, _settle, future, None, error)
        else:
            call_soon(self._loop, _settle, future, result, None)

    def _serve(self) -> None:
        self.work.begin()
        with ExitStack() as stack:
            try:
                digest = self.contents.future() if self._config.memory.disk else None
                check_draft_files(self._config.speculation)
                backend = self._open_model(stack)
                check_draft_files(self._config.speculation, backend.vocab)
                draft = self._open_draft(backend, stack) if "draft" not in self._unavailable else None
                if (encoder := open_encoder(self._config, backend)) is not None:
                    self._encoder = stack.enter_context(closing(encoder))
                whole = not backend.context.divisible
                offload = open_offload(self._config.tiers, backend.info, digest, whole=whole)
                if digest is not None:
                    digest.add_done_callback(lambda _: self.inbox.put(Wake()))
            except Exception as error:
                call_soon(self._loop, _settle, self._opened, None, error)
                return
            self._serve_with(backend, draft, offload)

    def _open_model(self, stack: ExitStack) -> Backend:
        backend = self._opener(
            self._config, lambda share: call_soon(self._loop, self._listener.on_progress, share), self._keep_loading
        )
        stack.callback(backend.close)
        self._backends.append(backend)
        if not isinstance(backend.context, DraftHead):
            self._unavailable["draft-mtp"] = self._config.no_mtp or "the model has no MTP layer that can be used"
        elif self._config.draft.path:
            self._unavailable["draft"] = "the file of --model-draft has MTP layers, which draft instead (draft-mtp)"
        if not self._config.draft.path:
            self._unavailable["draft"] = "there is no draft model, see --model-draft"
        if backend.context.max_rollback == 0:
            reason = backend.info.no_drafts or "the model cannot roll back single tokens"
            self._unavailable.update(dict.fromkeys(PROPOSER_TYPES, reason))
        return backend

    def _open_draft(self, backend: Backend, stack: ExitStack) -> Backend | None:
        """Returns the draft model. Returns None, with a warning in the log, if the draft model cannot draft for
        `backend`."""
        config = self._config.for_draft_model(backend.context.cells)
        draft = self._opener(config, lambda share: None, self._keep_loading)
        if reason := vocabulary_mismatch(backend.vocab, draft.vocab):
            self._disable_draft_model(f"{config.model.path} does not fit the model: {reason}")
        elif not draft.context.partial:
            self._disable_draft_model("the draft model must be able to roll back any number of tokens")
        else:
            stack.callback(draft.close)
            self._backends.append(draft)
            return draft
        draft.close()
        return None

    def _keep_loading(self) -> bool:
        return not self._closing.is_set()

    def _disable_draft_model(self, reason: str) -> None:
        self._unavailable["draft"] = reason
        log.warning("draft model disabled: %s", reason)

    def _serve_with(self, backend: Backend, draft: Backend | None, offload: Offload | None) -> None:
        try:
            core = self._create_core(backend, draft, offload)
            if offload is not None:
                offload.await_disk(DISK_OPEN_SECONDS)
            self.work.end()
            reader = None if self._encoder is None else MediaReader(self._encoder.projector, backend.vocab)
            call_soon(self._loop, _settle, self._opened, LoadedEngine(backend, core, self._unavailable, reader), None)
            self._run(core)
            core.close()
        except BaseException:  # a panic of a Rust library is not an `Exception`
            log.exception("the engine has failed")
            self.work.end()
            fault = EngineFault(ENGINE_FAILED, fatal=True)
            call_soon(self._loop, _settle, self._opened, None, fault)
            call_soon(self._loop, self._on_fault, fault)
            # The event loop still converts tokens to text, so the model stays open until the engine is closed.
            while not self._closing.is_set() and self.inbox.get() is not None:
                pass

    def _create_core(self, backend: Backend, draft: Backend | None, offload: Offload | None) -> EngineCore:
        config, batch = self._config, self._config.batch
        targets = StepTargets(batch.step_ms / 1000, batch.idle_step_ms / 1000)
        cost = self._cost(config, backend)
        model = None
        if draft is not None:
            draft_config = config.for_draft_model(backend.context.cells)
            model = DraftModel(draft, backend.info.vocabulary, self._cost(draft_config, draft))
        head = backend.context
        mtp = MtpProposer(head, backend.vocab.ends) if isinstance(head, DraftHead) else None
        shared = SharedDraftData(config.speculation, backend.vocab)
        factory = self._proposer_factory or sim_proposers(config)
        speculative_decoding = SpeculativeDecoding(shared, config.speculation, config.draft, model, factory, cost, mtp)
        outbox = Outbox(self._listener.on_outputs)
        return EngineCore(
            backend,
            batch.num_slots,
            targets,
            outbox,
            speculative_decoding,
            offload,
            config.memory.reuse if self._encoder is None else 0,  # no part of an image may be moved
            batch.queue_timeout,
            self.work,
            self._encoder,
        )

    def _cost(self, config: EngineConfig, backend: Backend) -> StepCost:
        """Returns the cost model of the steps of `backend`, from measurements unless `config` disables them."""
        if not (config.model.warmup and backend.info.generates):
            return StepCost(layout=Layout.of(backend.context))
        return warm_up(backend.context, load_or_measure_costs(config, backend) if config.model.calibrate else None)

    def _run(self, core: EngineCore) -> None:
        """Runs steps and commands until `None` is taken from the inbox. Blocks on the inbox while there are no
        requests."""
        while True:
            if not core.lifecycle.busy:
                core.check_idle()
            taken = 0
            while not core.lifecycle.busy or (taken < COMMANDS_PER_STEP and not self.inbox.empty()):
                taken += 1
                while not core.lifecycle.busy and self.inbox.empty() and core.maintain_idle():
                    pass
                command = self.inbox.get()
                if command is None:
                    core.lifecycle.fail_all(ShutDown)
                    core.step()
                    return
                self._execute(core, command)
                if not core.lifecycle.busy:
                    core.step()
            core.step()


def _settle(future: asyncio.Future[Result], result: Result, error: Exception | None) -> None:
    """Sets the result, or the exception `error`, of `future`. No effect if `future` is done. Called on the event
    loop."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
