"""An engine without a model: scripted tokens and errors, real generations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from api.config.options import Options
from api.generation.loaded_model import AppState, LoadedModel
from engine import (
    PROPOSER_TYPES,
    AdapterInfo,
    ContextExceeded,
    DraftStats,
    Embedding,
    EmbeddingModel,
    EmbeddingStats,
    Engine,
    EngineError,
    EngineFault,
    EngineStalled,
    Finished,
    FinishReason,
    Generation,
    Grammar,
    GrammarSpec,
    Histogram,
    Logprob,
    MediaReader,
    MemoryInfo,
    ModelInfo,
    PrefillProgress,
    ProposerType,
    Request,
    RequestRefused,
    RequestState,
    SamplingParams,
    SlotState,
    SlotTransfer,
    Stats,
    Timings,
    Usage,
)
from engine.contract import Failed
from engine.grammar import GrammarCompiler, GrammarError
from engine.loaded_adapters import LoadedAdapters
from engine.validation import check_slot

BOS, EOS, START, END = 256, 257, 258, 259
SPECIAL = {"<s>": BOS, "</s>": EOS, "<|im_start|>": START, "<|im_end|>": END}

# One step of a script: bytes are the tokens of a step, a number is a pause in seconds, and an event is a pause until it
# is set. Progress is delivered to requests with `progress`. An error ends the request.
Step = bytes | float | asyncio.Event | PrefillProgress | EngineError
Script = Callable[[Request], Iterable[Step]]


class ByteVocab:
    """A vocabulary with one token for each byte, and four special tokens."""

    size = 260
    ends = frozenset({EOS, END})
    special = frozenset(SPECIAL.values())
    kind = 0

    def __init__(self, *, bos_added: bool = False) -> None:
        self._bos_added = bos_added
        self.added = (BOS if bos_added else -1, -1)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        tokens = [BOS] if special and self._bos_added else []
        while text:
            name = next((name for name in SPECIAL if special and text.startswith(name)), None)
            if name is None:
                tokens += text[0].encode()
                text = text[1:]
            else:
                tokens.append(SPECIAL[name])
                text = text.removeprefix(name)
        return tokens

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def text(self, token: int) -> str:
        return next((name for name, special in SPECIAL.items() if special == token), chr(token))


INFO = ModelInfo(
    name="Fake",
    path="/models/fake-1.gguf",
    description="no model",
    bytes=1000,
    parameters=2000,
    vocabulary=260,
    trained_context=4096,
    context=2048,
    device="no device",
    chat_template=None,
    bos="<s>",
    eos="</s>",
    bos_added=False,
    adapters=(
        AdapterInfo(id=0, path="/adapters/a.gguf", scale=0.0, digest="a", task_name="sums", prompt_prefix="Add: "),
        AdapterInfo(id=1, path="/adapters/b.gguf", scale=0.0, digest="b"),
    ),
)


# The default draft statistics of a request: one draft, three of its four tokens accepted.
DRAFTS = (DraftStats("suffix", 4, (0, 0, 0, 1, 0), 3.5, 0.5, 0.25, 0.75),)

# Slot 0 is busy; the other slots have never run a request.
SLOTS = (
    SlotState(
        0,
        True,
        70,
        RequestState(
            key=9,
            prompt=64,
            cached=32,
            processed=32,
            emitted=7,
            max_tokens=10,
            sampling=SamplingParams(seed=5),
            min_tokens=1,
            ignore_eos=False,
            proposers=("suffix",),
            draft=3,
            drafts=DRAFTS,
        ),
    ),
    *(SlotState(number, False, 0, None) for number in range(1, 4)),
)


def hello(request: Request) -> Iterable[Step]:
    """Returns the default script, which emits `Hello wörld` in three steps."""
    return [b"Hel", 0.002, b"lo", 0.002, " wörld".encode()]


def endless(request: Request) -> Iterable[Step]:
    """Yields tokens until the client disconnects."""
    while True:
        yield b"x"
        yield 0.001


def silence(request: Request) -> Iterable[Step]:
    """Returns a script that emits no token and pauses until the client disconnects."""
    return [asyncio.Event()]


def _counts(names: Iterable[str], count: int) -> dict[str, Any]:
    return dict.fromkeys(names, count)


class FakeEngine:
    """Plays `script` for every request. `log` has an entry for each submission, cancellation and slot operation."""

    def __init__(self, script: Script = hello, *, info: ModelInfo = INFO) -> None:
        self.script = script
        self.drafts: tuple[DraftStats, ...] = DRAFTS
        self.unavailable_proposers = {
            "draft": "there is no draft model, see --model-draft",
            "draft-mtp": "the model has no MTP layer that can be used",
        }
        self.info = info
        self.vocab = ByteVocab(bos_added=info.bos_added)
        self.slots = 4
        self.request_limit = 512
        self.log: list[str] = []
        self.requests: list[Request] = []
        # The error of a submission while at least `num_accepted` requests are open; `None` accepts every request.
        self.refusal: EngineError | None = None
        self.num_accepted = 0
        self.max_requests = 512
        self.fault: EngineFault | None = None
        self.stall: EngineStalled | None = None
        self.embeddings: EmbeddingModel | None = None
        self.media: MediaReader | None = None
        self.embedded: list[Sequence[int]] = []
        self.owners: list[tuple[str, float]] = []  # of requests for embeddings
        self.adapters = LoadedAdapters(info.adapters)
        self.memory = MemoryInfo(
            kv_unified=False,
            kv_reason="each slot has 512 tokens",
            partial=True,
            window=0,
            ram_bytes=2**30,
            disk=False,
            disk_bytes=0,
            reuse_min_tokens=0,
        )
        self.process_id = None
        self.states = SLOTS
        # The error of saving, restoring or erasing a slot; `None` lets the operation succeed.
        self.slot_error: EngineError | None = None
        self._playing: dict[Generation, asyncio.Task[None]] = {}
        self._grammars = GrammarCompiler(self.vocab)

    @property
    def proposers(self) -> tuple[ProposerType, ...]:
        return tuple(kind for kind in PROPOSER_TYPES if kind not in self.unavailable_proposers)

    async def compile(self, form: GrammarSpec) -> Grammar:
        try:
            return await self._grammars.compile(form)
        except GrammarError as error:
            raise RequestRefused(str(error), field=error.pointer) from None

    def context_exceeded(self, prompt_tokens: int, *, at_least: bool = False) -> ContextExceeded:
        return ContextExceeded(prompt_tokens, self.request_limit, at_least=at_least)

    def generate(self, request: Request) -> Generation:
        if len(request.prompt) >= self.request_limit:
            raise self.context_exceeded(len(request.prompt))
        if request.speculation is not None and any(
            kind in self.unavailable_proposers for kind in request.speculation.type
        ):
            raise RequestRefused("speculative.type: the proposer is unavailable.", field="speculative.type")
        check_slot(request.slot, self.slots)
        request = self.adapters.resolve(request)
        self.requests.append(request)
        return Generation(request, self.vocab.piece, self._submit, self._cancel)

    async def embed(self, inputs: Sequence[Sequence[int]], owner: str = "", weight: float = 1.0) -> list[Embedding]:
        """Returns one vector, the number of tokens, their sum and their last one, or with pooling `none` one for each
        token."""
        self.embedded += inputs
        self.owners.append((owner, weight))
        assert self.embeddings is not None
        if self.embeddings.info.pooling == "none":
            return [np.array([[token, 0, 0] for token in tokens], np.float32) for tokens in inputs]
        return [np.array([[len(tokens), sum(tokens), tokens[-1]]], np.float32) for tokens in inputs]

    def stats(self) -> Stats:
        histogram = Histogram((0.1, 1.0), (2, 1, 1), 3.5)
        return Stats(
            requests_finished={"stop": 3, "length": 1, "cancelled": 0, "error": 0},
            **_counts(("prompt_tokens", "cached_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens"), 7),
            **_counts(("steps", "native_passes", "preemptions", "restores", "hits"), 5),
            busy_seconds=2.5,
            native_seconds=2.0,
            prefilled_tokens=6,
            prefill_seconds=0.5,
            busy_slots=15,
            longest_sequence=99,
            queue=histogram,
            ttft=histogram,
            gap=histogram,
            running=2,
            waiting=1,
            cells=100,
            cells_used=60,
            cells_idle=10,
            **_counts(("saved_tokens", "restored_tokens", "ram_bytes", "disk_bytes"), 9),
            drafts=(
                DraftStats("suffix", 20, (1, 2, 3), 7.5, 0.8, 0.25, 0.75),
                DraftStats("ngram-mod", 9, (0, 1, 0, 1)),
            ),
            step_seconds={1: 0.01, 2: 0.015},
            embeddings=EmbeddingStats(2, 5, 1),
        )

    async def slot_states(self) -> tuple[SlotState, ...]:
        return self.states

    async def save_slot(self, number: int, path: Path) -> SlotTransfer:
        return self._transfer(f"save {number} {path}")

    async def restore_slot(self, number: int, path: Path) -> SlotTransfer:
        return self._transfer(f"restore {number} {path}")

    async def erase_slot(self, number: int) -> int:
        return self._transfer(f"erase {number}").tokens

    def _transfer(self, entry: str) -> SlotTransfer:
        if self.slot_error is not None:
            raise self.slot_error
        self.log.append(entry)
        return SlotTransfer(70, 1000, 0.25)

    def _submit(self, generation: Generation) -> None:
        if self.refusal is not None and len(self._playing) >= self.num_accepted:
            raise self.refusal
        self.log.append("submit")
        self._playing[generation] = asyncio.create_task(self._play(generation))

    def _cancel(self, generation: Generation) -> None:
        self.log.append("cancel")
        self._playing.pop(generation).cancel()
        # The engine delivers the end one step later.
        asyncio.get_running_loop().call_soon(generation.deliver_end, self._finished(generation.request, 0, "cancelled"))

    async def _play(self, generation: Generation) -> None:
        request, count = generation.request, 0
        limit = 2**30 if request.max_tokens is None else request.max_tokens
        for step in self.script(request):
            await asyncio.sleep(step if isinstance(step, float) else 0)
            match step:
                case EngineError():
                    if isinstance(step, EngineFault) and step.fatal:
                        self.fault = step
                    self._finish(generation, Failed(step))
                    return
                case asyncio.Event():
                    await step.wait()
                case PrefillProgress():
                    if request.progress:
                        generation.deliver_progress(step)
                case bytes():
                    tokens = list(step[: limit - count])
                    count += len(tokens)
                    # Of each step's tokens the last one is the model's, as after an accepted draft.
                    origins = [*["suffix"] * (len(tokens) - 1), "model"] if request.origins else []
                    generation.deliver_tokens(tokens, self._logprobs(request, tokens), origins[: len(tokens)])
            if count >= limit:
                break
        self._finish(generation, self._finished(request, count, "length" if count >= limit else "stop"))

    def _finish(self, generation: Generation, end: Finished | Failed) -> None:
        self._playing.pop(generation, None)
        generation.deliver_end(end)

    def _finished(self, request: Request, count: int, reason: str) -> Finished:
        """Returns a terminal update with fixed times: 0.25 s in the queue, 0.5 s of prefill, 2 s of decoding."""
        disabled = request.speculation is not None and not request.speculation.type
        drafts = () if disabled else self.drafts
        drafted, accepted = sum(each.drafted for each in drafts), sum(each.accepted for each in drafts)
        usage = Usage(len(request.prompt), 2, count, drafted, accepted)
        timings = Timings(0.25, 0.5, 2.0)
        return Finished(FinishReason(reason), usage, timings, request.sampling.seed or 0, drafts=drafts)

    def _logprobs(self, request: Request, tokens: list[int]) -> list[Logprob]:
        if request.logprobs is None:
            return []
        return [Logprob(t, -0.5, ((t, -0.5), (t + 1, float("-inf")))[: request.logprobs]) for t in tokens]


def app_state(engine: FakeEngine | None = None, *, options: Any = None, **config: Any) -> AppState:
    """Returns a state that serves `engine`, or a new fake one.

    `config` has settings of the server, `options` the other tables of the configuration.
    """
    tables = {"model": {"path": INFO.path}, "server": config, **(options or {})}
    converted = msgspec.convert(tables, Options)
    state = AppState(converted.server)
    state.loaded = LoadedModel(cast("Engine", engine or FakeEngine()), converted)
    return state
