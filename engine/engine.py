"""The engine on the event loop: opening a model, generating, slots, statistics, closing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path

from msgspec import structs

from engine.backend import Embedding, LoadProgress, ModelInfo, NativeFault, Vocab
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
    ModelError,
    Overloaded,
    ProposerType,
    Request,
    RequestRefused,
    ShutDown,
)
from engine.core_client import CoreClient
from engine.core_process import ProcessCore
from engine.devices import DeviceInfo
from engine.embedding import EmbeddingModel
from engine.fairness import has_place
from engine.generation import Generation, count_by_owner
from engine.grammar import Grammar, GrammarSpec
from engine.kv.changes import ChangeSink
from engine.loaded_adapters import LoadedAdapters
from engine.local_core import LocalCore
from engine.measured_costs import load_or_measure_costs
from engine.media import MediaReader
from engine.outbox import StepOutput
from engine.pace import Calibration
from engine.slotfiles import SlotTransfer
from engine.slots import SlotState
from engine.speculate import ProposerFactory
from engine.stats import MemoryInfo, Stats, stats_after_fault
from engine.step import EngineCore
from engine.thread import Listener, Opener, Result, open_model
from engine.validation import TokenCheck, check_media, check_parameters, check_slot
from engine.watchdog import FAIL_SECONDS, EngineStalled
from engine.worker_pool import call_soon


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


def _keep_configuration() -> None:
    """Does nothing: the default of `configure_process`."""


def _slot_states(core: EngineCore) -> tuple[SlotState, ...]:
    return core.slots.states()


def _retry_after_seconds(stats: Stats) -> float:
    """Returns the busy seconds per finished request, from 1 to 60, as an estimate of the seconds until another request
    can be queued."""
    done = stats.requests_finished["stop"] + stats.requests_finished["length"]
    return min(60.0, max(1.0, stats.busy_seconds / done if done else 1.0))


class Engine:
    """A served model, created by `Engine.open`. All methods are called on the event loop that opened it."""

    _core: CoreClient
    adapters: LoadedAdapters
    """The LoRA adapters that requests can name."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._generations: dict[int, Generation] = {}  # by key, until their terminal update
        self._check_tokens = TokenCheck()
        self._active: dict[int, str] = {}  # the owners of the generations that are not cancelled, by key
        self._embedding: dict[int, str] = {}  # the owners of the running calls of `embed`
        self._keys = count(1)
        self._no_requests = asyncio.Event()
        self._no_requests.set()
        self._refusal: Callable[[], EngineError] | None = None
        self._failed = 0  # number of requests that the fatal fault ended
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
        configure_process: Callable[[], None] = _keep_configuration,
    ) -> AsyncIterator[Engine]:
        """Returns a context manager that loads and serves the model. Leaving it ends all requests.

        `progress` is called on the event loop with the loaded share of the model, 0 to 1. `proposer_factory` replaces
        all types of proposers. The process of `CpuConfig.engine_process` calls `configure_process` first, and all
        functions but `progress` must then be picklable. Entering raises ModelError if the model cannot be opened.
        """
        engine = cls(config)
        deliver = partial(call_soon, asyncio.get_running_loop(), engine._deliver)
        listener = Listener(progress, deliver, engine._on_fault)
        opening: AbstractAsyncContextManager[CoreClient]
        if config.cpu.engine_process:
            opening = ProcessCore.open(config, opener, proposer_factory, listener, configure_process)
        else:
            opening = LocalCore.open(config, opener, proposer_factory, listener)
        async with opening as engine._core:
            engine.adapters = LoadedAdapters(engine.info.adapters)
            yield engine

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._core.facts.info

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary; safe to use from any thread."""
        return self._core.vocab

    @property
    def media(self) -> MediaReader | None:
        """Reads prompts with images and sounds. None without a projector."""
        return self._core.media

    @property
    def embeddings(self) -> EmbeddingModel | None:
        """The model that computes embeddings. None if the configuration has none."""
        return self._core.embeddings

    @property
    def process_id(self) -> int | None:
        """The id of the engine core's process. None if the core is in this process."""
        return self._core.process_id

    @property
    def max_requests(self) -> int:
        """Maximum number of requests that run or wait at once."""
        return self.slots + self._config.batch.queue

    @property
    def request_limit(self) -> int:
        """Maximum number of tokens of one request, prompt and output together."""
        return self._core.facts.request_limit

    def context_exceeded(self, prompt_tokens: int, *, at_least: bool = False) -> ContextExceeded:
        """Returns the error for a prompt of (at least) `prompt_tokens` tokens, with the flags that raise the limit."""
        return ContextExceeded(prompt_tokens, self.request_limit, self._core.facts.sharing_slots, at_least=at_least)

    @property
    def memory(self) -> MemoryInfo:
        """Layout and capacities of the KV cache."""
        return self._core.facts.memory

    @property
    def stall(self) -> EngineStalled | None:
        """The error of all requests while a step exceeds the configured time. None while steps end."""
        return self._core.stall

    @property
    def unavailable_proposers(self) -> Mapping[str, str]:
        """The reason for each type of proposer that no request can use."""
        return self._core.unavailable_proposers

    @property
    def proposers(self) -> tuple[ProposerType, ...]:
        """Types of proposers that a request can use."""
        unavailable = self.unavailable_proposers
        return tuple(kind for kind in PROPOSER_TYPES if kind not in unavailable)

    def stats(self) -> Stats:
        """Returns a snapshot of the counters, which is at most 0.1 s old."""
        counts = self._core.stats() if self.fault is None else stats_after_fault(self._core.stats(), self._failed)
        return structs.replace(counts, owners=count_by_owner(self._generations.values()))

    async def query(self, function: Callable[[EngineCore], Result]) -> Result:
        """See `CoreClient.query`. Raises EngineFault if the engine fails or closes before the call."""
        return await self._core.query(function)

    # ── slots and the KV cache ──

    async def slot_states(self) -> tuple[SlotState, ...]:
        """Returns snapshots of the slots, by number. Raises EngineFault if the engine has failed."""
        return await self.query(_slot_states)

    async def save_slot(self, number: int, path: Path) -> SlotTransfer:
        """See `SlotFiles.save`."""
        return await self._core.save_slot(number, path)

    async def restore_slot(self, number: int, path: Path) -> SlotTransfer:
        """See `SlotFiles.restore`."""
        return await self._core.restore_slot(number, path)

    async def erase_slot(self, number: int) -> int:
        """See `SlotFiles.erase`."""
        return await self._core.erase_slot(number)

    async def report_kv_changes(self, sink: ChangeSink) -> None:
        """See `KVCache.report_changes`. `sink` may be called on any thread."""
        await self._core.report_kv_changes(sink)

    # ── requests ──

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """Returns the grammar of `spec` for `Request.grammar`, compiled on a worker thread or cached.

        Raises RequestRefused if the grammar is invalid, with the JSON pointer of the wrong keyword, if any, as its
        field; GrammarTimeout if it takes too long; Draining or EngineFault if the engine takes no requests.
        """
        if self._refusal is not None:
            raise self._refusal()
        return await self._core.compile(spec)

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
        if not has_place(owner, self._embedding.values(), self.max_requests, self.slots):
            raise Overloaded(_retry_after_seconds(self.stats()))
        key = next(self._keys)
        self._embedding[key] = owner
        self._no_requests.clear()
        try:
            return await self._core.embed(inputs, owner, weight)
        finally:
            del self._embedding[key]
            self._check_idle()

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
        self._core.put(Submit(key, request, secrets.randbits(63) if seed is None else seed))

    def _cancel(self, generation: Generation) -> None:
        self._active.pop(generation.key, None)
        reason = FinishReason.STOP if generation.complete else FinishReason.CANCELLED
        self._core.put(Cancel(generation.key, reason))

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            if (generation := self._generations.get(output.key)) is None:
                continue
            if not generation.deliver(output):
                self._cancel(generation)
            if output.event is not None and isinstance(output.event, Finished | Failed):
                del self._generations[output.key]
                self._active.pop(output.key, None)
        self._check_idle()

    def _check_idle(self) -> None:
        if not self._generations and not self._embedding:
            self._no_requests.set()

    async def drain(self, grace: float) -> None:
        """Refuses new requests, waits up to `grace` seconds for the others to end, and fails the remaining ones with an
        EngineFault."""
        self._refusal = Draining
        self._core.stop_compiling()
        try:
            async with asyncio.timeout(0.0 if self.stall else grace):
                await self._no_requests.wait()
        except TimeoutError:
            self._core.put(FailAll())
            with suppress(EngineFault):
                await self._core.stop_embedding()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._no_requests.wait(), 0.0 if self.stall else FAIL_SECONDS)
            self._fail_generations(ShutDown)  # the rest, if a step takes long or hangs

    def _on_fault(self, fault: EngineFault) -> None:
        """Fails all requests and refuses later ones. Called after the thread has failed."""
        self.fault, self._failed = fault, len(self._generations)
        self._refusal = lambda: EngineFault(str(fault), fatal=True)  # new each time: raising extends a traceback
        self._fail_generations(self._refusal)
        self.failed.set()

    def _fail_generations(self, new_error: Callable[[], EngineError]) -> None:
        self._deliver([StepOutput(key, (), (), Failed(new_error())) for key in list(self._generations)])
