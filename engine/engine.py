"""The engine on the event loop: opening a model, generating, slots, statistics, closing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, closing, suppress
from itertools import count
from pathlib import Path

import msgspec

from engine.backend import Backend, Embedding, LoadProgress, ModelInfo, NativeFault, Vocab
from engine.commands import Cancel, FailAll, Submit
from engine.config import EngineConfig
from engine.contract import (
    PROPOSER_TYPES,
    ContextExceeded,
    Draining,
    EngineError,
    EngineFault,
    Failed,
    Finished,
    FinishReason,
    GrammarTimeout,
    ModelError,
    Overloaded,
    ProposerType,
    Request,
    RequestRefused,
    ShutDown,
)
from engine.devices import DeviceInfo
from engine.embedding import EmbeddingModel, EmbeddingThread
from engine.fairness import has_place
from engine.generation import Generation, count_by_owner
from engine.grammar import CompilerClosed, CompileTimeout, Grammar, GrammarCompiler, GrammarError, GrammarSpec
from engine.loaded_adapters import LoadedAdapters
from engine.measured_costs import load_or_measure_costs
from engine.media import MediaReader
from engine.outbox import StepOutput
from engine.pace import Calibration
from engine.slotfiles import SlotFiles
from engine.slots import SlotState
from engine.speculate import ProposerFactory
from engine.stats import MemoryInfo, Stats, memory_info
from engine.step import EngineCore
from engine.thread import (
    EngineThread,
    Listener,
    LoadedEngine,
    Opener,
    Result,
    open_model,
    request_limit,
)
from engine.validation import TokenCheck, check_media, check_parameters, check_slot
from engine.watchdog import FAIL_SECONDS, EngineStalled, Watchdog


def open_vocabulary(path: Path) -> AbstractContextManager[Vocab]:
    """Returns a context manager of the vocabulary of a GGUF, without its weights. Entering raises ModelError."""
    from engine.llama import open_vocabulary

    return open_vocabulary(path)


def list_devices() -> list[DeviceInfo]:
    """Returns the devices besides the CPU on which models can be computed."""
    from engine.llama import list_devices

    return list_devices()


def measure_step_costs(config: EngineConfig, progress: LoadProgress) -> Calibration:
    """Measures the costs of a model's steps and saves them for later starts. Raises ModelError."""
    backend = open_model(config, progress, lambda: True)
    try:
        return load_or_measure_costs(config, backend, remeasure=True)
    except NativeFault as fault:
        raise ModelError(f"cannot compute {config.model.path}: {fault}") from None
    finally:
        backend.close()


def _retry_after_seconds(stats: Stats) -> float:
    """Returns the busy seconds per finished request, from 1 to 60, as an estimate of the seconds until another request
    can be queued."""
    done = stats.requests_finished["stop"] + stats.requests_finished["length"]
    return min(60.0, max(1.0, stats.busy_seconds / done if done else 1.0))


class Engine:
    """A served model, created by `Engine.open`. All methods are called on the event loop that opened it."""

    _opened: LoadedEngine
    _grammars: GrammarCompiler
    _watchdog: Watchdog
    adapters: LoadedAdapters
    """The LoRA adapters that requests can name."""
    media: MediaReader | None
    """Reads prompts with images and sounds. None without a projector."""

    def __init__(
        self, config: EngineConfig, opener: Opener, proposer_factory: ProposerFactory | None, progress: LoadProgress
    ) -> None:
        self._config = config
        self._thread = EngineThread(config, opener, proposer_factory, Listener(progress, self._deliver, self._on_fault))
        self._inbox = self._thread.inbox
        self._embedding = EmbeddingThread(config, on_fault=self._on_fault)
        self.embeddings: EmbeddingModel | None = None
        """The model that computes embeddings. None if the configuration has none."""
        self._generations: dict[int, Generation] = {}  # by key, until their terminal update
        self._check_tokens = TokenCheck()
        self._active: dict[int, str] = {}  # the owners of the generations that are not cancelled, by key
        self._keys = count(1)
        self._no_requests = asyncio.Event()
        self._no_requests.set()
        self._refusal: Callable[[], EngineError] | None = None
        self.fault: EngineFault | None = None
        """The fatal fault. None while the engine works."""
        self.failed = asyncio.Event()
        """Set after the fatal fault."""
        self.slots = config.batch.num_slots
        """Number of slots."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: EngineConfig,
        *,
        progress: LoadProgress = lambda share: None,
        opener: Opener = open_model,
        proposer_factory: ProposerFactory | None = None,
    ) -> AsyncIterator[Engine]:
        """Returns a context manager that loads and serves the model. Leaving it ends all requests.

        `progress` is called on the event loop with the loaded share of the model, 0 to 1. `proposer_factory` replaces
        all types of proposers. Entering raises ModelError if the model cannot be opened.
        """
        engine = cls(config, opener, proposer_factory, progress)
        try:
            engine._opened = await engine._thread.open()
            engine.adapters, engine.media = LoadedAdapters(engine.info.adapters), engine._opened.media
            if config.embedding.enabled or not engine.info.generates:
                engine.embeddings = await engine._embedding.open(engine._model)
            counters, stall_seconds = engine._opened.core.counters, config.batch.stall_timeout
            engine._watchdog = Watchdog(engine._thread.work, stall_seconds, counters)
            with closing(GrammarCompiler(engine.vocab)) as engine._grammars, engine._watchdog:
                if config.model.warmup and engine.info.generates:
                    await engine._grammars.warm_up()
                yield engine
        finally:
            await engine._embedding.close()
            await engine._thread.close()

    # ── properties ──

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._model.info

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary; safe to use from any thread."""
        return self._model.vocab

    @property
    def max_requests(self) -> int:
        """Maximum number of requests that run or wait at once."""
        return self.slots + self._config.batch.queue

    @property
    def request_limit(self) -> int:
        """Maximum number of tokens of one request, prompt and output together."""
        return request_limit(self._model.context, self.info, self._config.batch.slot_context)

    def context_exceeded(self, prompt_tokens: int, *, at_least: bool = False) -> ContextExceeded:
        """Returns the error for a prompt of (at least) `prompt_tokens` tokens, with the flags that raise the limit."""
        context = self._model.context
        shared = not context.unified and self.slots > 1 and context.sequence_cells == self.request_limit
        return ContextExceeded(prompt_tokens, self.request_limit, self.slots if shared else 0, at_least=at_least)

    @property
    def memory(self) -> MemoryInfo:
        """Layout and capacities of the KV cache."""
        reuse = self._opened.core.kv.reuse
        return memory_info(self._model.context, self._config.memory, self.info.kv_reason, reuse)

    @property
    def stall(self) -> EngineStalled | None:
        """The error of all requests while a step exceeds the configured time. None while steps end."""
        return self._watchdog.stall

    @property
    def _model(self) -> Backend:
        return self._opened.backend

    @property
    def unavailable_proposers(self) -> Mapping[str, str]:
        """The reason for each type of proposer that no request can use."""
        return {**self._opened.unavailable_proposers, **self._opened.core.speculative_decoding.faults}

    @property
    def proposers(self) -> tuple[ProposerType, ...]:
        """Types of proposers that a request can use."""
        return tuple(kind for kind in PROPOSER_TYPES if kind not in self.unavailable_proposers)

    def stats(self) -> Stats:
        """Returns a snapshot of the counters."""
        snapshot = self._opened.core.counters.snapshot()
        return msgspec.structs.replace(
            snapshot,
            embeddings=self._embedding.stats,
            owners=count_by_owner(self._generations.values()),
            grammar=self._grammars.seconds,
        )

    async def query(self, function: Callable[[EngineCore], Result]) -> Result:
        """Returns the result of `function`, called on the engine thread between two steps, which delays all requests.

        Raises the EngineError of `function`, and EngineFault if the engine fails or closes before the call.
        """
        return await self._thread.query(function)

    # ── slots ──

    async def slot_states(self) -> tuple[SlotState, ...]:
        """Returns snapshots of the slots, by number. Raises EngineFault if the engine has failed."""
        return await self.query(lambda core: core.slots.states())

    @property
    def slot_files(self) -> SlotFiles:
        """Saves, restores and erases the content of slots."""
        return SlotFiles(self._thread, self.info.layout)

    # ── requests ──

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """Returns the grammar of `spec` for `Request.grammar`, compiled on a worker thread or cached.

        Raises RequestRefused if the grammar is invalid, with the JSON pointer of the wrong keyword, if any, as its
        field; GrammarTimeout if it takes too long; Draining or EngineFault if the engine takes no requests.
        """
        if self._refusal is not None:
            raise self._refusal()
        try:
            return await self._grammars.compile(spec)
        except CompileTimeout as error:
            raise GrammarTimeout(str(error)) from None
        except GrammarError as error:
            raise RequestRefused(str(error), field=error.pointer) from None
        except CompilerClosed:
            raise Draining from None

    def generate(self, request: Request) -> Generation:
        """Returns a continuation of `request.prompt`, which starts when the Generation is entered.

        Raises RequestRefused if the request can never run. Entering raises Overloaded if slots and queue are full,
        Draining or EngineFault if the engine takes no requests.
        """
        if not self.info.generates:
            raise RequestRefused("This model computes embeddings, not text.")
        check_media(request, self.media)
        self._check_tokens(request, self.vocab.size)
        if len(request.prompt) >= self.request_limit:
            raise self.context_exceeded(len(request.prompt))
        check_parameters(request, self.vocab.size, self.unavailable_proposers)
        check_slot(request.slot, self.slots)
        return Generation(self.adapters.resolve(request), self.vocab.piece, self._submit, self._cancel)

    async def embed(self, inputs: Sequence[Sequence[int]], owner: str = "", weight: float = 1.0) -> list[Embedding]:
        """Returns the vectors of each input: token ids of the model `embeddings`, at most its `limit`. Owners share the
        time by their weights, like those of `Request`.

        Raises Overloaded if `max_requests` requests are computed; owners without another request have one more place
        for each slot. Raises Draining or EngineFault if the engine takes no requests.
        """
        if self._refusal is not None:
            raise self._refusal()
        if not has_place(owner, self._embedding.owners, self.max_requests, self.slots):
            raise Overloaded(_retry_after_seconds(self.stats()))
        return await self._embedding.embed(inputs, owner, weight)

    def _submit(self, generation: Generation) -> None:
        if self._refusal is not None:
            raise self._refusal()
        if not has_place(generation.request.owner, self._active.values(), self.max_requests, self.slots):
            raise Overloaded(_retry_after_seconds(self.stats()))
        key, request = next(self._keys), generation.request
        seed = request.sampling.seed
        generation.key = key
        self._generations[key] = generation
        self._active[key] = request.owner
        self._no_requests.clear()
        self._inbox.put(Submit(key, request, secrets.randbits(63) if seed is None else seed))

    def _cancel(self, generation: Generation) -> None:
        self._active.pop(generation.key, None)
        reason = FinishReason.STOP if generation.complete else FinishReason.CANCELLED
        self._inbox.put(Cancel(generation.key, reason))

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            if (generation := self._generations.get(output.key)) is None:
                continue
            if not generation.deliver(output):
                self._cancel(generation)
            if output.event is not None and isinstance(output.event, Finished | Failed):
                del self._generations[output.key]
                self._active.pop(output.key, None)
        if not self._generations:
            self._no_requests.set()

    async def drain(self, grace: float) -> None:
        """Refuses new requests, waits up to `grace` seconds for the others to end, and fails the remaining ones with an
        EngineFault."""
        self._refusal = Draining
        self._grammars.close()
        try:
            async with asyncio.timeout(0.0 if self._watchdog.stall else grace):
                await self._no_requests.wait()
                await self._embedding.idle.wait()
        except TimeoutError:
            await self._embedding.close()
            self._inbox.put(FailAll())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._no_requests.wait(), 0.0 if self._watchdog.stall else FAIL_SECONDS)
            self._fail_generations(ShutDown)  # the rest, if a step takes long or hangs

    def _on_fault(self, fault: EngineFault) -> None:
        """Fails all requests and refuses later ones. Called after the thread has failed."""
        self.fault = fault
        self._refusal = lambda: EngineFault(str(fault), fatal=True)  # new each time: raising extends a traceback
        self._fail_generations(self._refusal)
        self.failed.set()

    def _fail_generations(self, new_error: Callable[[], EngineError]) -> None:
        self._deliver([StepOutput(key, (), (), Failed(new_error())) for key in list(self._generations)])
