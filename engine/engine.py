"""The engine as the event loop sees it: it is opened, asked for continuations, and closed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, closing
from itertools import count
from pathlib import Path

from msgspec import Struct

from engine import slotfiles
from engine.backend import Backend, ModelInfo, NativeFault, Progress, Vocab
from engine.config import EngineConfig
from engine.contract import (
    PROPOSER_TYPES,
    CompiledTooSlowly,
    ContextExceeded,
    Draining,
    EngineError,
    EngineFault,
    Failed,
    FinishReason,
    ModelError,
    Overloaded,
    ProposerType,
    Reading,
    Request,
    RequestRefused,
    Speculation,
)
from engine.generation import Generation
from engine.grammar import Closed, Form, Grammar, GrammarError, Grammars, TooSlow
from engine.outbox import News
from engine.pace import Measured
from engine.runner import SHUTTING_DOWN, Runner
from engine.slotfiles import Moved
from engine.slots import SlotState
from engine.speculate import Speculate
from engine.stats import Stats
from engine.thread import (
    Answer,
    Cancel,
    EngineThread,
    FailAll,
    Listener,
    Opened,
    Opener,
    Submit,
    calibrated,
    open_model,
    request_limit,
)


def open_vocabulary(path: Path) -> AbstractContextManager[Vocab]:
    """The vocabulary of a GGUF, without its weights. Entering raises ModelError."""
    from engine.llama import open_vocabulary

    return open_vocabulary(path)


def step_costs(config: EngineConfig, progress: Progress) -> Measured:
    """What the steps of a model cost, measured anew and kept for the next start. Raises ModelError."""
    backend = open_model(config, progress, lambda: True)
    try:
        return calibrated(config, backend, anew=True)
    except NativeFault as fault:
        raise ModelError(f"cannot compute {config.model.path}: {fault}") from None
    finally:
        backend.close()


class MemoryInfo(Struct, frozen=True):
    """How prefixes are kept and shared."""

    kv_unified: bool
    """True if all slots share the KV cells, False if each has its own."""
    kv_reason: str
    """Why, in one line."""
    partial: bool
    """Whether requests share a prefix that ends at any token; if not, only where an earlier sequence ended."""
    window: int
    """Positions that some layers look back on; 0 if all look on all."""
    ram_bytes: int
    """Prefixes in RAM at most."""
    disk: bool
    """Whether they outlive the engine."""
    disk_bytes: int
    """Prefixes on disk at most; 0 if there is none."""
    moved_from: int
    """Tokens that must recur for a part of a changed prompt to be moved instead of computed; 0 if none is."""


class Engine:
    """A served model. `Engine.open` makes one; everything else is called on the event loop that opened it."""

    _opened: Opened
    _grammars: Grammars

    def __init__(self, config: EngineConfig, opener: Opener, speculate: Speculate | None, progress: Progress) -> None:
        self._config = config
        self._thread = EngineThread(config, opener, speculate, Listener(progress, self._deliver, self._die))
        self._inbox = self._thread.inbox
        self._open: dict[int, Generation] = {}  # until their terminal update
        self._wanted: set[int] = set()  # of those, the ones that nobody has left
        self._keys = count(1)
        self._empty = asyncio.Event()
        self._empty.set()
        self._refusal: Callable[[], EngineError] | None = None
        self.fault: EngineFault | None = None
        """Why the engine serves nothing more, if it failed for good."""
        self.slots = config.batch.slots

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
        engine = cls(config, opener, speculate, progress)
        try:
            engine._opened = await engine._thread.open()
            with closing(Grammars(engine.vocab)) as engine._grammars:
                if config.model.warmup:
                    await engine._grammars.warm_up()
                yield engine
        finally:
            await engine._thread.close()

    # ── what it is ──

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
        """Tokens that one request may have, prompt and output together."""
        return request_limit(self._model.context, self.info)

    def context_exceeded(self, prompt_tokens: int) -> ContextExceeded:
        """The refusal of a prompt that is too long, with the flags that would help."""
        context = self._model.context
        shared = not context.unified and self.slots > 1 and context.sequence_cells == self.request_limit
        return ContextExceeded(prompt_tokens, self.request_limit, self.slots if shared else 0)

    @property
    def memory(self) -> MemoryInfo:
        """How prefixes are kept and shared."""
        context, memory = self._model.context, self._config.memory
        return MemoryInfo(
            kv_unified=context.unified,
            kv_reason=self.info.kv_reason,
            partial=context.partial,
            window=context.window,
            ram_bytes=memory.ram_bytes,
            disk=bool(memory.disk),
            disk_bytes=memory.disk_bytes if memory.disk else 0,
            moved_from=self._opened.runner.kv.reuse,
        )

    @property
    def _model(self) -> Backend:
        return self._opened.backend

    @property
    def silent(self) -> Mapping[str, str]:
        """Types of proposers that guess for nobody, each with the reason."""
        fault = self._opened.runner.drafting.fault
        return {**self._opened.silent, "draft": fault} if fault else self._opened.silent

    @property
    def proposers(self) -> tuple[ProposerType, ...]:
        """The types that a request may ask for."""
        return tuple(kind for kind in PROPOSER_TYPES if kind not in self.silent)

    def stats(self) -> Stats:
        """What was done so far."""
        return self._opened.runner.counters.snapshot()

    async def ask(self, function: Callable[[Runner], Answer]) -> Answer:
        """What `function` answers on the engine thread between two steps, for which everybody waits.

        Raises the EngineError that it raises, and EngineFault if the engine fails or closes before.
        """
        return await self._thread.ask(function)

    # ── slots ──

    async def slot_states(self) -> tuple[SlotState, ...]:
        """The slots as of now, by number. Raises EngineFault if the engine has failed."""
        return await self.ask(lambda runner: runner.slots.states())

    async def save_slot(self, number: int, path: Path) -> Moved:
        """Writes what a slot ran last, as far as it is kept, to the file `path`, whole or not at all.

        Raises RequestRefused if there is nothing to save or no such slot, EngineFault if the file cannot be written.
        """
        return await slotfiles.save(self.ask, number, path, self.info.layout)

    async def restore_slot(self, number: int, path: Path) -> Moved:
        """Puts what a slot ran once back into RAM, from where the next request that begins so gets it; the slot counts
        as having run it last.

        Raises RequestRefused if it is busy, or if the file is not one of this model's or damaged: nothing of it is
        used then.
        """
        return await slotfiles.restore(self.ask, number, path, self.info.layout)

    async def erase_slot(self, number: int) -> int:
        """Forgets what a slot ran last, in cells, RAM and disk, as far as no other text begins so; tokens that are
        known no more. Raises RequestRefused if the slot is busy."""
        return await slotfiles.erase(self.ask, number)

    # ── requests ──

    async def compile(self, form: Form) -> Grammar:
        """What `Request.grammar` takes; compiled aside, or known from before.

        Raises RequestRefused if that cannot be, with the JSON pointer of the keyword to blame as its field if there
        is one, CompiledTooSlowly if it takes too long, and what entering a generation raises if the engine is ending.
        """
        if self._refusal is not None:
            raise self._refusal()
        try:
            return await self._grammars.compile(form)
        except TooSlow as error:
            raise CompiledTooSlowly(str(error)) from None
        except GrammarError as error:
            raise RequestRefused(str(error), field=error.pointer) from None
        except Closed:
            raise Draining from None

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
            raise self.context_exceeded(len(request.prompt))
        if (request.max_tokens or 0) < 0:
            raise RequestRefused("max_tokens must be 0 or more.", field="max_tokens")
        if any(not 0 <= token < size for token, _ in request.sampling.logit_bias):
            raise RequestRefused(f"logit_bias names a token id outside 0..{size - 1}.", field="logit_bias")
        if request.prediction and (min(request.prediction) < 0 or max(request.prediction) >= size):
            raise RequestRefused(f"The prediction holds a token id outside 0..{size - 1}.", field="prediction")
        if request.grammar is not None and request.grammar.size != self.vocab.size:
            raise RequestRefused("The grammar was compiled for another model.", field="grammar")
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
        key, request = next(self._keys), generation.request
        seed = request.sampling.seed
        generation.key = key
        self._open[key] = generation
        self._wanted.add(key)
        self._empty.clear()
        self._inbox.put(Submit(key, request, secrets.randbits(63) if seed is None else seed))

    def _retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free, from the pace so far; 1 to 60."""
        stats = self.stats()
        done = stats.requests_finished["stop"] + stats.requests_finished["length"]
        return min(60.0, max(1.0, stats.busy_seconds / done if done else 1.0))

    def _cancel(self, generation: Generation) -> None:
        self._wanted.discard(generation.key)
        reason = FinishReason.STOP if generation.complete else FinishReason.CANCELLED
        self._inbox.put(Cancel(generation.key, reason))

    def _deliver(self, items: list[News]) -> None:
        for key, ids, logprobs, other in items:
            generation = self._open.get(key)
            if generation is None:
                continue
            if other is None:
                generation.deliver_tokens(ids, logprobs)
            elif isinstance(other, Reading):
                generation.deliver_reading(other)
            else:
                generation.deliver_end(other)
                del self._open[key]
                self._wanted.discard(key)
        if not self._open:
            self._empty.set()

    async def drain(self, grace: float) -> None:
        """Takes nothing new, gives what runs `grace` seconds to end, and fails the rest with an EngineFault."""
        self._refusal = Draining
        self._grammars.close()
        try:
            await asyncio.wait_for(self._empty.wait(), grace)
        except TimeoutError:
            self._inbox.put(FailAll(SHUTTING_DOWN))
            await self._empty.wait()

    def _die(self, fault: EngineFault) -> None:
        """After the thread has failed: everyone who waits is told, and nobody is taken any more."""
        self.fault = fault
        self._refusal = lambda: EngineFault(str(fault), fatal=True)  # one for each: raising one grows it
        self._deliver([News(key, (), (), Failed(self._refusal())) for key in list(self._open)])
