"""The engine thread, and the engine as the event loop sees it.

One thread owns every native object and all scheduling state. In: a queue of commands. Out: one call on the event
loop for each step. Nothing else is shared, so there is no lock.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from queue import SimpleQueue

from engine.backend import Backend, ModelInfo, Progress, Vocab
from engine.config import EngineConfig
from engine.contract import (
    SPECULATOR_TYPES,
    ContextExceeded,
    Draining,
    EngineError,
    EngineFault,
    Failed,
    FinishReason,
    Overloaded,
    Request,
    RequestRefused,
    Speculation,
    SpeculatorType,
)
from engine.generation import Generation
from engine.memory import Store, open_store
from engine.outbox import News, Outbox
from engine.pace import Pace, warm_up
from engine.runner import SHUTTING_DOWN, Runner
from engine.speculate import Drafting, DraftModel, Shared, Speculate, difference
from engine.stats import Stats
from engine.streams import Stream

log = logging.getLogger("paceline.speculation")

Command = Callable[[Runner], None]
"""Runs on the engine thread between two steps."""
Opener = Callable[[EngineConfig, Progress, Callable[[], bool]], Backend]
"""Opens a model on the engine thread, told of its progress and asked whether to go on; raises EngineError."""


def open_model(config: EngineConfig, progress: Progress, go_on: Callable[[], bool]) -> Backend:
    """Opens a GGUF with llama.cpp. The native library is loaded here and not before."""
    from engine.llama import open_gguf

    return open_gguf(config, progress, go_on)


def open_vocabulary(path: Path) -> AbstractContextManager[Vocab]:
    """The vocabulary of a GGUF, without its weights. Entering raises ModelError."""
    from engine.llama import open_vocabulary

    return open_vocabulary(path)


class Engine:
    """A served model. `Engine.open` makes one; everything else is called on the event loop that opened it."""

    _runner: Runner

    def __init__(self, config: EngineConfig, opener: Opener, speculate: Speculate | None) -> None:
        self._config = config
        self._opener = opener
        self._speculate = speculate
        self._loop = asyncio.get_running_loop()
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._open: dict[int, Generation] = {}  # until their terminal update
        self._wanted: set[int] = set()  # of those, the ones that nobody has left
        self._keys = count(1)
        self._ready: asyncio.Future[Runner] = self._loop.create_future()
        self._empty = asyncio.Event()
        self._empty.set()
        self._refusal: Callable[[], EngineError] | None = None
        self.fault: EngineFault | None = None
        """Why the engine serves nothing more, if it failed for good."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="paceline-engine")
        self._progress: Progress = lambda share: None
        self._backend: Backend | None = None
        self._draft_backend: Backend | None = None
        self.slots = config.batch.slots
        self._silent: dict[str, str] = {}
        if not config.draft.path:
            self._silent["draft"] = "there is no draft model, see --model-draft"

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: EngineConfig,
        *,
        progress: Progress = lambda share: None,
        opener: Opener = open_model,
        speculate: Speculate | None = None,
    ) -> AsyncIterator[Engine]:
        """Loads the model and serves it until the block is left, which ends whatever still runs.

        `progress` is called on the event loop with the share of the load that is done. Raises ModelError if the
        model cannot be opened.
        """
        engine = cls(config, opener, speculate)
        engine._progress = lambda share: engine._call_soon(progress, share)
        engine._thread.start()
        try:
            engine._runner = await asyncio.shield(engine._ready)
            yield engine
        finally:
            engine._ready.cancel()
            engine._closing.set()
            for backend in (engine._backend, engine._draft_backend):
                if backend is not None:
                    backend.context.abort()
            engine._inbox.put(None)
            await asyncio.shield(asyncio.to_thread(engine._thread.join))

    # ── on the event loop ──

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return self._model.info

    @property
    def vocab(self) -> Vocab:
        """Text to tokens and back, from any thread."""
        return self._model.vocab

    @property
    def places(self) -> int:
        """Requests that may run or wait at once."""
        return self.slots + self._config.batch.queue

    @property
    def request_limit(self) -> int:
        """Tokens that one request may have, prompt and continuation together."""
        return min(self._model.context.cells, self.info.trained_context or 2**30)

    @property
    def _model(self) -> Backend:
        assert self._backend is not None, "an engine that was yielded is open"
        return self._backend

    @property
    def silent(self) -> Mapping[str, str]:
        """Types of speculators that guess for nobody, each with the reason."""
        fault = self._runner.draft_fault
        return {**self._silent, "draft": fault} if fault else self._silent

    @property
    def speculators(self) -> tuple[SpeculatorType, ...]:
        """The types that a request may ask for."""
        return tuple(kind for kind in SPECULATOR_TYPES if kind not in self.silent)

    def stats(self) -> Stats:
        """What was done so far."""
        return self._runner.counters.snapshot()

    def generate(self, request: Request) -> Generation:
        """A continuation of `request.prompt`, which starts when the Generation is entered.

        Raises RequestRefused if it can never run. Entering raises Overloaded if slots and queue are full and
        Draining if the engine is ending.
        """
        self._check(request)
        return Generation(request, self.vocab.piece, self._submit, self._cancel)

    def _check(self, request: Request) -> None:
        size = self.info.vocabulary
        if not request.prompt:
            raise RequestRefused("The prompt is empty: give at least one token.", field="prompt")
        if min(request.prompt) < 0 or max(request.prompt) >= size:
            raise RequestRefused(f"The prompt holds a token id outside 0..{size - 1}.", field="prompt")
        if len(request.prompt) >= self.request_limit:
            raise ContextExceeded(len(request.prompt), self.request_limit)
        if (request.max_tokens or 0) < 0:
            raise RequestRefused("max_tokens must be 0 or more.", field="max_tokens")
        if any(not 0 <= token < size for token, _ in request.sampling.logit_bias):
            raise RequestRefused(f"logit_bias names a token id outside 0..{size - 1}.", field="logit_bias")
        if request.prediction and (min(request.prediction) < 0 or max(request.prediction) >= size):
            raise RequestRefused(f"The prediction holds a token id outside 0..{size - 1}.", field="prediction")
        if request.speculation is not None:
            self._check_types(request.speculation)
        if any(not 0 <= token < size for token in request.stop_tokens):
            raise RequestRefused(f"stop_token_ids has a token id outside 0..{size - 1}.", field="stop_token_ids")

    def _check_types(self, asked: Speculation) -> None:
        for kind in asked.type:
            if reason := self.silent.get(kind):
                raise RequestRefused(f"Nobody can guess by {kind!r} here: {reason}.", field="speculative.type")

    def _submit(self, generation: Generation) -> None:
        if self._refusal is not None:
            raise self._refusal()
        if len(self._wanted) >= self.places:
            raise Overloaded(self._retry_after())
        key = generation.key = next(self._keys)
        self._open[key] = generation
        self._wanted.add(key)
        self._empty.clear()
        request = generation.request
        seed, batch = request.sampling.seed, self._config.batch
        stream = Stream(
            key,
            request,
            secrets.randbits(63) if seed is None else seed,
            self.vocab,
            self.request_limit,
            batch.keep if batch.context_shift else None,
        )
        self._inbox.put(lambda runner: runner.submit(stream))

    def _retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free, from the pace so far; 1 to 60."""
        stats = self.stats()
        done = stats.requests_finished["stop"] + stats.requests_finished["length"]
        return min(60.0, max(1.0, stats.busy_seconds / done if done else 1.0))

    def _cancel(self, generation: Generation) -> None:
        self._wanted.discard(generation.key)
        reason = FinishReason.STOP if generation.complete else FinishReason.CANCELLED
        self._inbox.put(lambda runner: runner.end(generation.key, reason))

    def _deliver(self, items: list[News]) -> None:
        for key, ids, logprobs, end in items:
            generation = self._open.get(key)
            if generation is None:
                continue
            if end is None:
                generation.deliver_tokens(ids, logprobs)
            else:
                generation.deliver_end(end)
                del self._open[key]
                self._wanted.discard(key)
        if not self._open:
            self._empty.set()

    async def drain(self, grace: float) -> None:
        """Takes nothing new, gives what runs `grace` seconds to end, and fails the rest with an EngineFault."""
        self._refusal = Draining
        try:
            await asyncio.wait_for(self._empty.wait(), grace)
        except TimeoutError:
            self._inbox.put(lambda runner: runner.fail_all(SHUTTING_DOWN))
            await self._empty.wait()

    def _die(self, fault: EngineFault) -> None:
        """After the thread has failed: everyone who waits is told, and nobody is taken any more."""
        self.fault = fault
        self._refusal = lambda: EngineFault(str(fault), fatal=True)  # one for each: raising one grows it
        self._deliver([News(key, (), (), Failed(self._refusal())) for key in list(self._open)])

    # ── on the engine thread ──

    def _call_soon(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _serve(self) -> None:
        with ExitStack() as stack:
            try:
                self._backend = self._opener(self._config, self._progress, lambda: not self._closing.is_set())
                stack.callback(self._backend.close)
                if not self._backend.context.partial:
                    self._silent.update(dict.fromkeys(SPECULATOR_TYPES, "the model cannot forget single tokens"))
                if self._config.draft.path:
                    self._draft_backend = self._open_draft(self._backend)
                whole = not self._backend.context.partial
                store = open_store(self._config.memory, self._backend.info, whole=whole)
            except Exception as error:
                self._call_soon(self._settle_ready, None, error)
                return
            if self._draft_backend is not None:
                stack.callback(self._draft_backend.close)
            self._serve_with(self._backend, self._draft_backend, store)

    def _open_draft(self, backend: Backend) -> Backend | None:
        """The draft model; None, with a line in the log, if it cannot guess for the model of `backend`."""
        config = self._config.of_draft(backend.context.cells)
        draft = self._opener(config, lambda share: None, lambda: not self._closing.is_set())
        if reason := difference(backend.vocab, draft.vocab):
            self._refuse_draft(f"{config.model.path} does not fit the model: {reason}")
        elif not (backend.context.partial and draft.context.partial):
            self._refuse_draft("a model that cannot forget single tokens cannot verify or make drafts")
        else:
            return draft
        draft.close()
        return None

    def _refuse_draft(self, reason: str) -> None:
        self._silent["draft"] = reason
        log.warning("no drafts from a model: %s", reason)

    def _serve_with(self, backend: Backend, draft: Backend | None, store: Store | None) -> None:
        batch, config = self._config.batch, self._config
        try:
            pace = Pace(batch.step_ms / 1000, batch.idle_step_ms / 1000)
            model = None if draft is None else DraftModel(draft, backend.info.vocabulary, warmup=config.model.warmup)
            shared = Shared(config.speculation, backend.vocab)
            drafting = Drafting(shared, config.speculation, config.draft, model, self._speculate)
            outbox = Outbox(self._loop, self._deliver)
            runner = Runner(backend, self.slots, pace, outbox, drafting, store, config.memory.reuse)
            if config.model.warmup:
                warm_up(backend.context, runner.cost)
            self._call_soon(self._settle_ready, runner, None)
            self._run(runner)
            runner.close()
        except Exception as error:
            fault = EngineFault(f"the engine failed: {error!r}", fatal=True)
            fault.__cause__ = error
            self._call_soon(self._settle_ready, None, fault)
            self._call_soon(self._die, fault)
            # Readers may still ask for tokens' text: close with the engine.
            while not self._closing.is_set() and self._inbox.get() is not None:
                pass

    def _settle_ready(self, runner: Runner | None, error: Exception | None) -> None:
        if self._ready.done():
            return
        if runner is not None:
            self._ready.set_result(runner)
        elif error is not None:
            self._ready.set_exception(error)

    def _run(self, runner: Runner) -> None:
        """Steps until told to stop; sleeps when there is nothing to step."""
        while True:
            if not runner.busy:
                runner.rest()
            while not runner.busy and self._inbox.empty() and runner.tidy():
                pass
            while not runner.busy or not self._inbox.empty():
                command = self._inbox.get()
                if command is None:
                    runner.fail_all(SHUTTING_DOWN)
                    runner.step()
                    return
                command(runner)
                if not runner.busy:
                    runner.step()
            runner.step()
