"""From a request to its choices, and from their updates to events or to one body. Knows no endpoint's shapes."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TypeVar
from uuid import uuid4

import msgspec
from msgspec import UNSET
from starlette.requests import Request as HTTPRequest

from api.generation.loaded_model import Served
from api.http.events import DONE, event
from api.http.request_body import read
from api.http.request_context import Exchange
from api.http.responses import Answer, Emit, EventStream
from api.http.tasks import together
from api.schema.drafts import MetricsReply, SpeculativeReply
from api.schema.replies import ChatChoice, Reply, TextChoice, TimingsReply, UsageReply
from api.schema.requests import Completion, decode, refuse_unsupported
from api.schema.speculation import speculation_of
from engine import (
    EngineFault,
    Finished,
    FinishReason,
    Grammar,
    Logprob,
    ReasoningBudget,
    Request,
    RequestRefused,
    Tokens,
    Update,
    derive_seed,
)

MOST_CHOICES = 256
"""Choices of one HTTP request, over all its prompts."""

EXACT = 2**53
"""Seeds that we draw are below this, so that every JSON parser reads them back exactly."""


class Choices:
    """The choices of one HTTP request: `n` for each prompt, those of one prompt side by side.

    Choice i of a prompt samples with seed `derive_seed(seed, i)`, so a prompt's choices do not depend on the
    prompts it came with.
    """

    def __init__(
        self,
        served: Served,
        exchange: Exchange,
        asked: Completion,
        prompts: Sequence[tuple[int, ...]],
        *,
        limit: int | None,
        logprobs: int | None,
        prediction: tuple[int, ...],
        spelled: tuple[tuple[int, str], ...] = (),
        reasoning: ReasoningBudget | None = None,
        grammar: Grammar | None = None,
        progress: bool = False,
    ) -> None:
        """Nothing is submitted yet. Raises RequestRefused. Of `prediction`, what no text could reach is dropped."""
        self.n = asked.n or 1
        check_count(served, len(prompts), self.n)
        self.seed = _seed(asked.seed, served.options.sampling.seed)
        sampling = asked.sampling(served.options.sampling)
        self.speculation = speculation_of(asked.speculative, served.guessers)
        """What was asked for."""
        prediction = prediction[: served.engine.request_limit]
        self._served = served
        self._exchange = exchange
        self._generations = [
            served.engine.generate(
                Request(
                    prompt=prompt,
                    max_tokens=None if limit in (None, -1) else limit,
                    min_tokens=asked.min_tokens or 0,
                    sampling=msgspec.structs.replace(sampling, seed=derive_seed(self.seed, choice)),
                    stop=asked.stops,
                    stop_tokens=tuple(asked.stop_token_ids or ()),
                    ignore_eos=bool(asked.ignore_eos),
                    logprobs=logprobs,
                    grammar=grammar,
                    salt=exchange.salt(asked.cache_salt),
                    speculation=self.speculation,
                    prediction=prediction,
                    spelled=spelled,
                    reasoning=reasoning,
                    progress=progress,
                    id=exchange.id,
                )
            )
            for prompt in prompts
            for choice in range(self.n)
        ]
        self._ends: list[Finished | None] = [None] * len(self)
        self._silent = True

    def __len__(self) -> int:
        return len(self._generations)

    @property
    def requests(self) -> list[Request]:
        """What the engine is asked for each."""
        return [generation.request for generation in self._generations]

    def enough(self, index: int) -> None:
        """Ends a choice that runs with what it has said so far, as if at its limit."""
        self._generations[index].enough()

    @property
    def finished(self) -> bool:
        """Whether all have come to their end."""
        return None not in self._ends

    @property
    def ends(self) -> list[list[Finished]]:
        """The ends by prompt, of those that have one."""
        ends = [end for end in self._ends if end is not None]
        return [ends[at : at + self.n] for at in range(0, len(ends), self.n)]

    async def run(self, tell: Callable[[int, Update], Awaitable[None]]) -> None:
        """Submits all and tells the updates of each in order, with the index of the choice.

        The first error ends all and is raised; leaving by it or by being cancelled cancels what still runs.
        """
        async with AsyncExitStack() as stack:
            for generation in self._generations:
                await stack.enter_async_context(generation)
            try:
                await together([partial(self._follow, index, tell) for index in range(len(self))])
            finally:
                self._exchange.ends = [end for end in self._ends if end is not None]

    async def _follow(self, index: int, tell: Callable[[int, Update], Awaitable[None]]) -> None:
        async for update in self._generations[index]:
            if self._silent and not (isinstance(update, Tokens) and update.reading):
                self._silent = False
                self._exchange.first_token = self._exchange.age
            if isinstance(update, Finished):
                if update.reason is FinishReason.CANCELLED:
                    raise EngineFault("The server ended the request.")
                self._ends[index] = update
            await tell(index, update)


def check_count(served: Served, prompts: int, n: int) -> None:
    """Raises RequestRefused for more choices than an HTTP request may have."""
    most = min(MOST_CHOICES, served.engine.places)
    if prompts * n > most:
        raise RequestRefused(
            f"{prompts} prompts with {n} choices each are more than {most} choices.", field="n" if n > 1 else "prompt"
        )


Asked = TypeVar("Asked", bound=Completion)


async def asked_of(request: HTTPRequest, served: Served, decoder: msgspec.json.Decoder[Asked]) -> Asked:
    """What the client asks for. Raises RequestRefused, also for another model and for what is not supported."""
    return asked_in(await read(request, served.options.server.max_body), served, decoder)


def asked_in(body: bytes, served: Served, decoder: msgspec.json.Decoder[Asked]) -> Asked:
    """The same of a body that was read already."""
    asked = decode(decoder, body)
    served.check_model(asked.model)
    refuse_unsupported(asked)
    return asked


def _seed(asked: int | None, default: int | None) -> int:
    """The seed to use: below 2^63, and for -1, which means none to llama-server, one of our own."""
    seed = default if asked is None else asked
    return secrets.randbelow(EXACT) if seed is None or seed == -1 else seed & (2**63 - 1)


class Writer(ABC):
    """One endpoint's shapes: writes the events of a stream, or the choices of a body.

    `chunk` is changed and encoded again for every event.
    """

    def __init__(self, served: Served, asked: Completion, kind: str, prefix: str) -> None:
        self.chunk = Reply(
            id=prefix + uuid4().hex,
            object=kind,
            created=int(time.time()),
            model=served.name,
            system_fingerprint=served.fingerprint,
            choices=(),
            # OpenAI says null in every chunk but the one with the usage.
            usage=None if asked.stream and asked.with_usage else UNSET,
        )

    @abstractmethod
    def tokens(self, index: int, update: Tokens) -> bytes:
        """The event that shows `update`; empty if it has nothing to show yet."""

    @abstractmethod
    def end(self, index: int, end: Finished) -> None:
        """Sets `chunk` to the one that ends the choice."""

    @abstractmethod
    def whole(self, index: int, text: str, logprobs: Sequence[Logprob], end: Finished) -> ChatChoice | TextChoice:
        """The whole choice of a body."""


def respond(asked: Completion, choices: Choices, writer: Writer, ping: float) -> Answer | EventStream:
    """The response: a stream if one was asked for."""
    if not asked.stream:
        return Answer(partial(_body, choices, writer))
    return EventStream(partial(_stream, choices, writer, asked.with_usage), ping)


async def _stream(choices: Choices, writer: Writer, with_usage: bool, emit: Emit) -> None:
    async def tell(index: int, update: Update) -> None:
        if isinstance(update, Tokens):
            if shown := writer.tokens(index, update):
                await emit(shown)
        else:
            writer.end(index, update)
            await emit(_last(choices, writer.chunk, with_usage) if choices.finished else event(writer.chunk))

    await choices.run(tell)


def _last(choices: Choices, chunk: Reply, with_usage: bool) -> bytes:
    """The chunk that ends the last choice, the usage if asked for, and the end. The last chunk sums up."""
    before = b""
    if with_usage:
        before = event(chunk)
        chunk.choices = ()
        chunk.usage = UsageReply.of(choices.ends)
    _sum_up(choices, chunk)
    return before + event(chunk) + DONE


def _sum_up(choices: Choices, reply: Reply) -> None:
    """Tells what is known at the end."""
    ends = [end for group in choices.ends for end in group]
    reply.timings = TimingsReply.of(choices.ends)
    reply.metrics = MetricsReply.of(ends)
    reply.speculative = SpeculativeReply.of(choices.speculation, ends)
    reply.seed = choices.seed


async def _body(choices: Choices, writer: Writer) -> Reply:
    texts: list[list[str]] = [[] for _ in range(len(choices))]
    logprobs: list[list[Logprob]] = [[] for _ in range(len(choices))]

    async def tell(index: int, update: Update) -> None:
        if isinstance(update, Tokens):
            texts[index].append(update.text)
            logprobs[index].extend(update.logprobs)

    await choices.run(tell)
    ends = choices.ends
    writer.chunk.choices = [
        writer.whole(index, "".join(texts[index]), logprobs[index], end)
        for index, end in enumerate(end for group in ends for end in group)
    ]
    writer.chunk.usage = UsageReply.of(ends)
    _sum_up(choices, writer.chunk)
    return writer.chunk
