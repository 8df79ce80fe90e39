"""Reads the body of a generation request, and runs the choices of one HTTP request."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request as HTTPRequest

from api.generation.completion_output import CompletionOutput
from api.generation.loaded_model import LoadedModel
from api.generation.request_limits import apply_request_defaults, check_draft_limits, max_new_tokens
from api.generation.schema_checks import CompiledConstraint
from api.http.request_body import read_body
from api.http.request_context import RequestContext
from api.http.responses import EventStream
from api.http.tasks import run_concurrently
from api.schema.logit_bias import bias_pairs, texts_in_biases, tokenize_biases
from api.schema.requests import LONG_BODY_BYTES, GenerationRequest, decode_body
from api.schema.speculation import parse_speculation
from api.schema.unsupported import refuse_unsupported
from engine import (
    WORKERS,
    AdapterScale,
    EngineFault,
    Finished,
    FinishReason,
    MediaRun,
    ReasoningBudget,
    Request,
    RequestRefused,
    StopScope,
    Tokens,
    Update,
    derive_seed,
)

# Maximum choices of one HTTP request, over all prompts.
_MAX_CHOICES = 256

# Random seeds are below 2^53: every JSON parser reads such integers exactly.
_RANDOM_SEED_LIMIT = 2**53

# Returns the encoded events for an update of the choice with an index; empty bytes for no event.
Encode = Callable[[int, Update], bytes]
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
        grammar: CompiledConstraint | None = None,
        stop_scope: Callable[[], StopScope] | None = None,
        progress: bool = False,
        media: Sequence[tuple[MediaRun, ...]] = (),
    ) -> None:
        """Creates the generations without submitting them. Raises RequestRefused.

        `media` has the images and sounds of each prompt, or is empty if there are none. `prediction` is cut to the
        length of the longest possible output.
        """
        self.n = request.n or 1
        check_choice_count(model, len(prompts), self.n)
        self.seed = _choose_seed(request.seed, model.options.sampling.seed)
        sampling = request.sampling_params(model.options.sampling)
        self.speculation = parse_speculation(request.speculative_fields, model.default_proposers)
        """The request's `speculative` field. None if the request has no such field."""
        check_draft_limits(self.speculation, model.options)
        prediction = prediction[: model.engine.request_limit]
        own_fields = _own_fields(request, context)
        self._context = context
        self._coalesce_seconds = model.options.server.sse_coalesce_ms / 1000
        self._generations = [
            model.engine.generate(
                msgspec.structs.replace(
                    own_fields,
                    prompt=prompt,
                    media=runs,
                    max_tokens=max_new_tokens(model, token_limit, len(prompt)),
                    sampling=msgspec.structs.replace(sampling, seed=derive_seed(self.seed, choice)),
                    stop_scope=stop_scope,
                    logprobs=logprobs,
                    grammar=None if grammar is None else grammar.grammar,
                    salt=context.cache_salt(request.cache_salt),
                    speculation=self.speculation,
                    prediction=prediction,
                    control_texts=model.control_texts or control_texts,
                    reasoning=reasoning,
                    progress=progress or own_fields.progress,
                )
            )
            for prompt, runs in zip(prompts, media or [()] * len(prompts), strict=True)
            for choice in range(self.n)
        ]
        self.outputs = [
            CompletionOutput(model, request, index, generation, self.seed, grammar)
            for index, generation in enumerate(self._generations)
        ]
        """The outputs so far, one for each choice."""
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

    async def run(self, encode: Encode = lambda index, update: b"", stream: EventStream | None = None) -> None:
        """Submits all choices, calls `encode` for each update of a choice, in order, and sends the events to `stream`.

        The first error cancels all choices and is raised. Cancelling this coroutine cancels the running choices.
        """
        async with AsyncExitStack() as stack:
            for generation in self._generations:
                await stack.enter_async_context(generation)
            try:
                follow = self._collect if stream is None else partial(self._send, stream)
                await run_concurrently([partial(follow, index, encode) for index in range(len(self))])
            finally:
                self._context.finished = self.finished
                self._context.tokens += self._tokens_so_far()

    def _tokens_so_far(self) -> int:
        """Returns the prompt and output tokens of the choices that have started."""
        usages = (
            (generation.slot, output.usage())
            for generation, output in zip(self._generations, self.outputs, strict=True)
        )
        return sum(usage.total_tokens for slot, usage in usages if slot >= 0 or usage.completion_tokens)

    async def _collect(self, index: int, encode: Encode) -> None:
        """Calls `encode` for all updates of a choice."""
        generation = self._generations[index]

        def add(update: Update) -> None:
            self._add(index, update, encode)

        generation.divert(add, lambda: True)
        async for update in generation:
            add(update)

    async def _send(self, stream: EventStream, index: int, encode: Encode) -> None:
        """Sends the events of a choice: without a task switch while the client takes data, unless events merge."""
        generation = self._generations[index]

        def write(update: Tokens) -> None:
            if events := self._add(index, update, encode):
                stream.write(events)

        if not self._coalesce_seconds:
            generation.divert(write, stream.can_write)
        async for update in generation:
            if events := self._add(index, update, encode):
                await stream.send(events)
                if self._coalesce_seconds:
                    await generation.pause(self._coalesce_seconds)

    def _add(self, index: int, update: Update, encode: Encode) -> bytes:
        """Adds an update to the output of its choice, and returns its encoded events."""
        output, context = self.outputs[index], self._context
        if context.first_token_seconds is None and not (isinstance(update, Tokens) and update.prefill_progress):
            context.first_token_seconds = context.age_seconds
        if isinstance(update, Finished):
            if update.reason is FinishReason.CANCELLED:
                raise EngineFault("The server ended the request.")
            self._finished[index] = update
        else:
            output.add(update)
        events = encode(index, update)
        if output.time_is_up:
            self._generations[index].enough()
        return events


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
    request = await parse_any_generation_request(body, model, decoder)
    if request.logit_bias:
        pairs = bias_pairs(request.logit_bias)
        if texts_in_biases(pairs):
            request.logit_bias = await WORKERS.run(tokenize_biases, pairs, model.engine.vocab)
    return request


async def parse_any_generation_request(
    body: bytes, model: LoadedModel, decoder: msgspec.json.Decoder[_RequestT]
) -> _RequestT:
    """Returns the request in `body`, parsed on a worker thread if the body is long. Raises RequestRefused."""
    if len(body) < LONG_BODY_BYTES:
        return _parse_generation_request(body, model, decoder)
    return await WORKERS.run(_parse_generation_request, body, model, decoder)


def _parse_generation_request(body: bytes, model: LoadedModel, decoder: msgspec.json.Decoder[_RequestT]) -> _RequestT:
    """Returns the request in `body`. Raises RequestRefused for invalid JSON, another model or an unsupported field."""
    request = decode_body(decoder, body)
    model.check_name(request.model)
    refuse_unsupported(request)
    apply_request_defaults(request, model.options.generation)
    if request.n_discard and model.options.batch.context_shift:
        raise RequestRefused(
            "n_discard must be 0: a context shift discards half of the tokens after n_keep.", field="n_discard"
        )
    return request


def _own_fields(request: GenerationRequest, context: RequestContext) -> Request:
    """Returns an engine request without a prompt, with the fields that do not depend on the prompt. Raises
    RequestRefused."""
    key = context.key
    if key is not None and not key.admin and request.priority is not None and request.priority < key.min_priority:
        raise RequestRefused(
            f"priority: this API key can have {key.min_priority} or more, not {request.priority}.", field="priority"
        )
    return Request(
        prompt=(),
        min_tokens=request.min_tokens or 0,
        stop=request.stop_strings,
        stop_tokens=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        post_sampling=bool(request.post_sampling_probs),
        adapters=tuple(AdapterScale(each.id, each.scale) for each in request.lora) if request.lora else None,
        cache=request.cache_prompt is not False,
        keep=request.n_keep,
        slot=None if request.id_slot == -1 else request.id_slot,
        id=context.id,
        progress=bool(request.return_progress or request.timings_per_token),
        origins=bool(request.token_origins),
        owner=context.owner(request.user),
        weight=context.weight,
        priority=request.priority or 0,
        timeout=None if request.timeout_ms is None else request.timeout_ms / 1000,
    )


def _choose_seed(requested: int | None, default: int | None) -> int:
    """Returns the seed modulo 2^63, or a random seed below 2^53 if there is none or it is llama-server's -1."""
    seed = default if requested is None else requested
    return secrets.randbelow(_RANDOM_SEED_LIMIT) if seed is None or seed == -1 else seed & (2**63 - 1)
