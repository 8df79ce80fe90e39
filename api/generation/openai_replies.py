"""Builds a stream or a body of OpenAI's completion endpoints from the updates of their choices."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from uuid import uuid4

from msgspec import UNSET, structs

from api.generation.choices import Choices
from api.generation.completion_output import CompletionOutput, unenforced_keywords
from api.generation.loaded_model import LoadedModel
from api.http.events import DONE_EVENT, TextEvent, sse_event
from api.http.responses import EventStream, EventStreamResponse, PendingJSONResponse
from api.schema.replies import ChatChoice, CompletionReply, PromptProgress, TextChoice, TimingsReply, UsageReply
from api.schema.requests import GenerationRequest
from api.schema.speculation_stats import MetricsReply, SpeculativeReply
from engine import (
    Finished,
    Logprob,
    PrefillProgress,
    Tokens,
    Update,
)

# Stands for the text in an event that is encoded once.
_PLACEHOLDER = "\0text\0"


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
        self.events_differ_in_text_only = not request.timings_per_token and not request.continuous_usage
        """True if the events of a choice without log probabilities and origins differ in one text only, after the
        first of them."""
        self._text_events: dict[int, TextEvent] = {}

    def token_event(self, index: int, update: Tokens) -> bytes:
        """Returns the encoded event for `update`, or empty bytes if `update` adds nothing to the reply."""
        if update.logprobs or update.origins:
            return self.full_event(index, update)
        if not update.text:
            return b""
        if (event := self._text_events.get(index)) is not None:
            return event.with_text(update.text)
        events = self.full_event(index, update)
        if self.events_differ_in_text_only:
            self._text_events[index] = TextEvent(self.full_event(index, Tokens((), _PLACEHOLDER)), _PLACEHOLDER)
        return events

    @abstractmethod
    def full_event(self, index: int, update: Tokens) -> bytes:
        """Returns the encoded event for `update`, which has a text, log probabilities or origins, or empty bytes if
        `update` adds nothing to the reply."""

    @abstractmethod
    def progress_event(self, index: int) -> bytes:
        """Returns the encoded event of a choice whose prompt is being prefilled; `chunk` has the progress."""

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
    return EventStreamResponse(partial(_stream, request, choices, builder), ping_seconds)


async def _stream(request: GenerationRequest, choices: Choices, builder: ReplyBuilder, stream: EventStream) -> None:
    chunk = builder.chunk

    def encode(index: int, update: Update) -> bytes:
        output = choices.outputs[index]
        if request.timings_per_token:
            chunk.timings = output.timings()
        if request.continuous_usage:
            chunk.usage = output.usage(update if isinstance(update, Finished) else None)
        if isinstance(update, Tokens):
            if update.prefill_progress is None:
                return builder.token_event(index, update)
            if request.return_progress:
                return _progress_events(request, builder, index, output, update.prefill_progress)
            return b""
        builder.set_final_chunk(index, update)
        chunk.verbose = output.reply(update) if output.verbose else UNSET
        is_last = choices.all_finished
        events = _last_events(choices, chunk, request.include_usage) if is_last else sse_event(chunk)
        chunk.verbose = UNSET
        return events

    await choices.run(encode, stream)


def _progress_events(
    request: GenerationRequest, builder: ReplyBuilder, index: int, output: CompletionOutput, progress: PrefillProgress
) -> bytes:
    """Returns the encoded events that report the progress of a choice's prefill."""
    events = b""
    for report in output.new_progress(progress):
        builder.chunk.prompt_progress = PromptProgress.of(report)
        builder.chunk.timings = output.timings(report) if request.timings_per_token else UNSET
        events += builder.progress_event(index)
    builder.chunk.prompt_progress = UNSET
    return events


def _last_events(choices: Choices, chunk: CompletionReply, include_usage: bool) -> bytes:
    """Returns the encoded `chunk`, which ends the last choice, then the usage chunk if requested, and [DONE].

    The chunk before [DONE] has the statistics of the request.
    """
    events = b""
    if include_usage:
        events = sse_event(chunk)
        chunk.choices, chunk.verbose = (), UNSET
        chunk.usage = UsageReply.of(choices.finished_by_prompt)
    _set_statistics(choices, chunk)
    return events + sse_event(chunk) + DONE_EVENT


def _set_statistics(choices: Choices, reply: CompletionReply) -> None:
    """Sets the statistics of the reply. All choices must have finished."""
    reply.timings = TimingsReply.of(choices.finished_by_prompt)
    reply.metrics = MetricsReply.of(choices.finished)
    reply.speculative = SpeculativeReply.of(choices.speculation, choices.finished)
    reply.seed = choices.seed
    reply.unenforced_schema_keywords = unenforced_keywords(choices.outputs)


async def _body(choices: Choices, builder: ReplyBuilder) -> CompletionReply:
    await choices.run()
    outputs, ends, reply = choices.outputs, choices.finished, builder.chunk
    reply.choices = [
        structs.replace(
            builder.whole_choice(index, output.text, output.logprobs, end), token_origins=output.token_origins()
        )
        for index, (output, end) in enumerate(zip(outputs, ends, strict=True))
    ]
    reply.usage = UsageReply.of(choices.finished_by_prompt)
    if outputs[0].verbose:
        reply.verbose = outputs[0].reply(ends[0])
    _set_statistics(choices, reply)
    return reply
