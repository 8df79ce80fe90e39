"""Runs one response, as a whole body or as a stream of events."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from api.generation.choices import Choices
from api.generation.completion_output import CompletionOutput
from api.generation.loaded_model import LoadedModel
from api.http.error_responses import error_response
from api.http.events import encode_json
from api.http.request_context import RequestContext
from api.http.responses import EventStream
from api.openai.responses.chat_form import ChatForm
from api.openai.responses.output import OutputBuilder
from api.openai.responses.reply import (
    FailureCode,
    IncompleteDetails,
    OutputEvent,
    ResponseEvent,
    ResponseFailure,
    ResponseReply,
    ResponseUsage,
)
from api.openai.responses.request import ResponsesRequest
from api.schema.logprobs import chat_logprobs
from api.schema.replies import PromptProgress, TimingsReply, TokenLogprob, UnenforcedKeywords, UsageReply
from api.schema.speculation_stats import SpeculativeReply
from engine import EngineError, Finished, FinishReason, Logprob, Overloaded, PrefillProgress, Tokens, Update

_log = logging.getLogger("paceline")

# The types of the events before the first item, all with the response as it is then.
_FIRST_EVENTS = ("response.created", "response.in_progress")

OnFinished = Callable[[ResponseReply], ResponseReply]


class ResponseRun:
    """The generation of one response.

    `reply` is the response before its first token. `on_finished` gets the response after its last one, and returns that
    for the client.
    """

    def __init__(
        self,
        model: LoadedModel,
        context: RequestContext,
        request: ResponsesRequest,
        form: ChatForm,
        choices: Choices,
        reply: ResponseReply,
        output: OutputBuilder,
        on_finished: OnFinished,
    ) -> None:
        self._model = model
        self._context = context
        self._request = request
        self._form = form
        self._choices = choices
        self._reply = reply
        self._output = output
        self._on_finished = on_finished
        self._next_number = 0

    async def body(self) -> ResponseReply:
        """Generates the response and returns it."""
        await self._choices.run(self._collect)
        self._output.finish(_status(self._choices.finished[0]))
        return await self._finished_reply()

    def _collect(self, index: int, update: Update) -> bytes:
        if isinstance(update, Tokens):
            self._output.feed(update.text, self._logprobs(update.logprobs))
        return b""

    async def stream(self, stream: EventStream) -> None:
        """Generates the response and sends its events, the first ones when the prefill begins.

        An error after the first event is sent as `response.failed`; an earlier one is raised.
        """
        try:
            await self._choices.run(self._encode_update, stream)
            await stream.send(await self._last_events())
        except OSError:
            raise
        except Exception as error:
            if not self._next_number:
                raise
            self._context.error = error
            if not isinstance(error, EngineError):
                _log.error("The stream failed", exc_info=error)
            await stream.send(self._encoded(self._failure(error)))

    def _encode_update(self, index: int, update: Update) -> bytes:
        """Returns the encoded events of an update, without those of the last update (see `_last_events`)."""
        events: list[ResponseEvent | OutputEvent] = []
        if not self._next_number:
            events += [ResponseEvent(type=kind, response=self._reply) for kind in _FIRST_EVENTS]
        if isinstance(update, Tokens):
            events += self._update_events(update)
        return b"".join(map(self._encoded, events))

    async def _last_events(self) -> bytes:
        events: list[ResponseEvent | OutputEvent] = [*self._output.finish(_status(self._choices.finished[0]))]
        reply = await self._finished_reply()
        events.append(ResponseEvent(type=f"response.{reply.status}", response=reply, timings=reply.timings))
        return b"".join(map(self._encoded, events))

    def _update_events(self, update: Tokens) -> list[ResponseEvent | OutputEvent]:
        if update.prefill_progress is not None:
            if not self._request.return_progress:
                return []
            return self._progress_events(self._choices.outputs[0], update.prefill_progress)
        events = self._output.feed(update.text, self._logprobs(update.logprobs))
        if self._request.timings_per_token:
            timings = self._choices.outputs[0].timings()
            for event in events:
                event.timings = timings if event.delta is not UNSET else UNSET
        return [*events]

    def _progress_events(
        self, output: CompletionOutput, progress: PrefillProgress
    ) -> list[ResponseEvent | OutputEvent]:
        return [
            ResponseEvent(
                type=_FIRST_EVENTS[-1],
                response=self._reply,
                prompt_progress=PromptProgress.of(report),
                timings=output.timings(report) if self._request.timings_per_token else UNSET,
            )
            for report in output.new_progress(progress)
        ]

    def _encoded(self, event: ResponseEvent | OutputEvent) -> bytes:
        event.sequence_number = self._next_number
        self._next_number += 1
        return b"event: %b\ndata: %b\n\n" % (event.type.encode(), encode_json(event))

    def _logprobs(self, logprobs: Sequence[Logprob]) -> Sequence[TokenLogprob]:
        return chat_logprobs(self._model.engine.vocab, logprobs).content if logprobs else ()

    async def _finished_reply(self) -> ResponseReply:
        """Returns the result of `on_finished` for the response with its output and statistics."""
        (end,), (generated,) = self._choices.finished, self._choices.outputs
        ends = self._choices.finished_by_prompt
        reasoning = await self._model.prompts.tokenize_text(
            self._output.reasoning, add_special=False, parse_special=False
        )
        reply = replace(
            self._reply,
            status=_status(end),
            completed_at=int(time.time()) if _status(end) == "completed" else None,
            incomplete_details=IncompleteDetails() if _status(end) == "incomplete" else None,
            output=tuple(self._output.items),
            usage=ResponseUsage.of(UsageReply.of(ends), len(reasoning)),
            timings=TimingsReply.of(ends),
            speculative=SpeculativeReply.of(self._choices.speculation, self._choices.finished),
            unenforced_schema_keywords=self._unenforced_keywords(generated),
            verbose=generated.reply(end) if generated.verbose else UNSET,
        )
        return self._on_finished(reply)

    def _unenforced_keywords(self, output: CompletionOutput) -> UnenforcedKeywords | UnsetType:
        found = output.unenforced_keywords()
        if found is UNSET:
            return UNSET
        return replace(found, keywords=[self._form.original_path(path) for path in found.keywords])

    def _failure(self, error: Exception) -> ResponseEvent:
        code: FailureCode = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
        failure = ResponseFailure(code, error_response(error).error.message)
        reply = replace(self._reply, status="failed", error=failure, output=tuple(self._output.items))
        return ResponseEvent(type="response.failed", response=reply)


def _status(end: Finished) -> Literal["completed", "incomplete"]:
    return "incomplete" if end.reason is FinishReason.LENGTH else "completed"
