"""Runs the choices of one HTTP request, and builds a stream or a body of OpenAI's endpoints from their updates."""

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

from api.generation.loaded_model import LoadedModel
from api.http.events import DONE_EVENT, sse_event
from api.http.request_body import read_body
from api.http.request_context import RequestContext
from api.http.responses import EventStreamResponse, PendingJSONResponse, SendEvents
from api.http.tasks import run_concurrently
from api.schema.replies import ChatChoice, CompletionReply, TextChoice, TimingsReply, UsageReply
from api.schema.requests import GenerationRequest, decode_body, refuse_unsupported
from api.schema.speculation import parse_speculation
from api.schema.speculation_stats import MetricsReply, SpeculativeReply
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

# Maximum choices of one HTTP request, over all prompts.
_MAX_CHOICES = 256

# Random seeds are below 2^53: every JSON parser reads such integers exactly.
_RANDOM_SEED_LIMIT = 2**53

OnUpdate = Callable[[int, Update], Awaitable[None]]
_RequestT = TypeVar("_RequestT", bound=GenerationRequest)


class Choices:
    """The choices of one HTTP request: `n` for each prompt, all generated concurrently.

    Choice p * n + i is choice i of prompt p and samples with seed `derive_seed(seed, i)`, so the choices of a prompt do
    not depend on the request's other prompts.
    """

    def __init__(
        self,
        model: LoadedModel,
        context: RequestContext,
        request: GenerationRequest,
        prompts: Sequence[tuple[int, ...]],
        *,
        token_limit: int | None,
        logprobs: int | None,
        prediction: tuple[int, ...],
        control_texts: tuple[tuple[int, str], ...] = (),
        reasoning: ReasoningBudget | None = None,
        grammar: Grammar | None = None,
        progress: bool = False,
    ) -> None:
        """Creates the generations without submitting them. Raises RequestRefused.

        `prediction` is cut to the length of the longest possible output.
        """
        self.n = request.n or 1
        check_choice_count(model, len(prompts), self.n)
        self.seed = _choose_seed(request.seed, model.options.sampling.seed)
        sampling = request.sampling_params(model.options.sampling)
        self.speculation = parse_speculation(request.speculative, model.default_proposers)
        """The request's `speculative` field. None if the request has no such field."""
        prediction = prediction[: model.engine.request_limit]
        self._context = context
        self._generations = [
            model.engine.generate(
                Request(
                    prompt=prompt,
                    max_tokens=None if token_limit in (None, -1) else token_limit,
                    min_tokens=request.min_tokens or 0,
                    sampling=msgspec.structs.replace(sampling, seed=derive_seed(self.seed, choice)),
                    stop=request.stop_strings,
                    stop_tokens=tuple(request.stop_token_ids or ()),
                    ignore_eos=bool(request.ignore_eos),
                    logprobs=logprobs,
                    grammar=grammar,
                    salt=context.cache_salt(request.cache_salt),
                    speculation=self.speculation,
                    prediction=prediction,
                    control_texts=control_texts,
                    reasoning=reasoning,
                    progress=progress,
                    id=context.id,
                )
            )
            for prompt in prompts
            for choice in range(self.n)
        ]
        self._finished: list[Finished | None] = [None] * len(self)

    def __len__(self) -> int:
        return len(self._generations)

    @property
    def requests(self) -> list[Request]:
        """The engine's requests, one for each choice."""
        return [generation.request for generation in self._generations]

    @property
    def all_finished(self) -> bool:
        """True if every choice has finished."""
        return None not in self._finished

    @property
    def finished_by_prompt(self) -> list[list[Finished]]:
        """The terminal updates, one list for each prompt. All choices must have finished."""
        finished = self.finished
        return [finished[start : start + self.n] for start in range(0, len(finished), self.n)]

    @property
    def finished(self) -> list[Finished]:
        """The terminal updates of the choices that have finished, in order of the index."""
        return [end for end in self._finished if end is not None]

    def enough(self, index: int) -> None:
        """Ends the running choice with the tokens emitted so far and finish reason `length`."""
        self._generations[index].enough()

    async def run(self, on_update: OnUpdate) -> None:
        """Submits all choices and calls `on_update` with the index and each update of a choice, in order.

        The first error cancels all choices and is raised. Cancelling this coroutine cancels the running choices.
        """
        async with AsyncExitStack() as stack:
            for generation in self._generations:
                await stack.enter_async_context(generation)
            try:
                await run_concurrently([partial(self._follow, index, on_update) for index in range(len(self))])
            finally:
                self._context.finished = self.finished

    async def _follow(self, index: int, on_update: OnUpdate) -> None:
        async for update in self._generations[index]:
            has_token = not (isinstance(update, Tokens) and update.prefill_progress)
            if has_token and self._context.first_token_seconds is None:
                self._context.first_token_seconds = self._context.age_seconds
            if isinstance(update, Finished):
                if update.reason is FinishReason.CANCELLED:
                    raise EngineFault("The server ended the request.")
                self._finished[index] = update
            await on_update(index, update)


def check_choice_count(model: LoadedModel, prompts: int, n: int) -> None:
    """Raises RequestRefused if `n` choices for each of `prompts` prompts are more than one HTTP request may have."""
    limit = min(_MAX_CHOICES, model.engine.max_requests)
    if prompts * n > limit:
        field = "n" if n > 1 else "prompt"
        raise RequestRefused(
            f"{field}: {prompts} prompts with {n} choices each are {prompts * n} choices; request at most {limit}.",
            field=field,
        )


async def read_generation_request(
    http_request: HTTPRequest, model: LoadedModel, decoder: msgspec.json.Decoder[_RequestT]
) -> _RequestT:
    """Returns the parsed body. Raises HTTPException 413 for a too large body, RequestRefused for an invalid one."""
    body = await read_body(http_request, model.options.server.max_body)
    return parse_generation_request(body, model, decoder)


def parse_generation_request(body: bytes, model: LoadedModel, decoder: msgspec.json.Decoder[_RequestT]) -> _RequestT:
    """Returns the request in `body`. Raises RequestRefused for invalid JSON, another model or an unsupported field."""
    request = decode_body(decoder, body)
    model.check_name(request.model)
    refuse_unsupported(request)
    return request


def _choose_seed(requested: int | None, default: int | None) -> int:
    """Returns the seed modulo 2^63, or a random seed below 2^53 if there is none or it is llama-server's -1."""
    seed = default if requested is None else requested
    return secrets.randbelow(_RANDOM_SEED_LIMIT) if seed is None or seed == -1 else seed & (2**63 - 1)


class ReplyBuilder(ABC):
    """Builds the events of a stream or the choices of a body in one endpoint's shape.

    `chunk` is one object that is modified and encoded again for every event.
    """

    def __init__(self, model: LoadedModel, request: GenerationRequest, kind: str, id_prefix: str) -> None:
        """`kind` is the reply's `object`."""
        self.chunk = CompletionReply(
            id=id_prefix + uuid4().hex,
            object=kind,
            created=int(time.time()),
            model=model.name,
            system_fingerprint=model.fingerprint,
            choices=(),
            # In OpenAI's API, usage is null in every chunk before the usage chunk.
            usage=None if request.stream and request.include_usage else UNSET,
        )

    @abstractmethod
    def token_event(self, index: int, update: Tokens) -> bytes:
        """Returns the encoded event for `update`, or empty bytes if `update` adds nothing to the reply."""

    @abstractmethod
    def set_final_chunk(self, index: int, end: Finished) -> None:
        """Turns `chunk` into the last chunk of the choice."""

    @abstractmethod
    def whole_choice(
        self, index: int, text: str, logprobs: Sequence[Logprob], end: Finished
    ) -> ChatChoice | TextChoice:
        """Returns the finished choice for the body of a reply without a stream."""


def respond(
    request: GenerationRequest, choices: Choices, builder: ReplyBuilder, ping_seconds: float
) -> PendingJSONResponse | EventStreamResponse:
    """Returns an event stream if the request has `stream`, otherwise a JSON response."""
    if not request.stream:
        return PendingJSONResponse(partial(_body, choices, builder))
    return EventStreamResponse(partial(_stream, choices, builder, request.include_usage), ping_seconds)


async def _stream(choices: Choices, builder: ReplyBuilder, include_usage: bool, send_events: SendEvents) -> None:
    async def on_update(index: int, update: Update) -> None:
        if isinstance(update, Tokens):
            if events := builder.token_event(index, update):
                await send_events(events)
        else:
            builder.set_final_chunk(index, update)
            chunk = builder.chunk
            await send_events(_last_events(choices, chunk, include_usage) if choices.all_finished else sse_event(chunk))

    await choices.run(on_update)


def _last_events(choices: Choices, chunk: CompletionReply, include_usage: bool) -> bytes:
    """Returns the encoded `chunk`, which ends the last choice, then the usage chunk if requested, and [DONE].

    The chunk before [DONE] has the statistics of the request.
    """
    events = b""
    if include_usage:
        events = sse_event(chunk)
        chunk.choices = ()
        chunk.usage = UsageReply.of(choices.finished_by_prompt)
    _set_statistics(choices, chunk)
    return events + sse_event(chunk) + DONE_EVENT


def _set_statistics(choices: Choices, reply: CompletionReply) -> None:
    """Sets the statistics of the reply. All choices must have finished."""
    reply.timings = TimingsReply.of(choices.finished_by_prompt)
    reply.metrics = MetricsReply.of(choices.finished)
    reply.speculative = SpeculativeReply.of(choices.speculation, choices.finished)
    reply.seed = choices.seed


async def _body(choices: Choices, builder: ReplyBuilder) -> CompletionReply:
    texts: list[list[str]] = [[] for _ in range(len(choices))]
    logprobs: list[list[Logprob]] = [[] for _ in range(len(choices))]

    async def on_update(index: int, update: Update) -> None:
        if isinstance(update, Tokens):
            texts[index].append(update.text)
            logprobs[index].extend(update.logprobs)

    await choices.run(on_update)
    builder.chunk.choices = [
        builder.whole_choice(index, "".join(texts[index]), logprobs[index], end)
        for index, end in enumerate(choices.finished)
    ]
    builder.chunk.usage = UsageReply.of(choices.finished_by_prompt)
    _set_statistics(choices, builder.chunk)
    return builder.chunk
