"""POST /v1/messages and POST /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.anthropic.blocks import BlockEvents, content_blocks
from api.anthropic.conversion import MessageForm
from api.anthropic.errors import tagged_event
from api.anthropic.messages_schema import (
    MessageEnd,
    MessageEvent,
    MessageReply,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    StopInfo,
    TokenCountReply,
)
from api.generation.chat_choices import chat_choices
from api.generation.choices import Choices, read_generation_request
from api.generation.loaded_model import AppState, LoadedModel
from api.generation.prepared_chat import PreparedChat, prepare_chat
from api.http.request_context import request_context
from api.http.responses import EventStream, EventStreamResponse, JSONResponse, PendingJSONResponse
from api.schema.replies import UnenforcedKeywords
from api.tools.formats import ContentDelta, MessageDelta
from engine import Finished, FinishReason, Tokens, Update, Usage

_DECODER = msgspec.json.Decoder(MessagesRequest)


class MessagesEndpoints:
    """The endpoints POST /v1/messages and POST /v1/messages/count_tokens."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def create(self, http_request: HTTPRequest) -> Response:
        """Generates the assistant's next message."""
        model = self._state.model
        request = await read_generation_request(http_request, model, _DECODER)
        form = MessageForm(request)
        with form.paths():
            chat = await prepare_chat(form.request, model.prompts)
            choices = await chat_choices(
                model, request_context(http_request.scope), form.request, chat, progress=bool(request.stream)
            )
        run = MessageRun(model, form, chat, choices, shows_thinking=request.shows_thinking)
        if request.stream:
            return EventStreamResponse(run.stream, model.options.server.sse_ping)
        return PendingJSONResponse(run.body)

    async def count_tokens(self, http_request: HTTPRequest) -> Response:
        """Returns the number of tokens of the prompt, which may be longer than the context."""
        model = self._state.model
        request = await read_generation_request(http_request, model, _DECODER)
        form = MessageForm(request)
        with form.paths():
            chat = await prepare_chat(form.request, model.prompts)
        return JSONResponse(TokenCountReply(len(chat.prompt)))


class MessageRun:
    """The generation of one message, as a whole body or as a stream of events."""

    def __init__(
        self, model: LoadedModel, form: MessageForm, chat: PreparedChat, choices: Choices, *, shows_thinking: bool
    ) -> None:
        self._id = f"msg_{uuid4().hex}"
        self._form = form
        self._model = model
        self._choices = choices
        self._parser = chat.parser()
        self._shows_thinking = shows_thinking

    async def body(self) -> MessageReply:
        """Generates the message and returns it."""
        await self._choices.run()
        (output,), (end,) = self._choices.outputs, self._choices.finished
        deltas = [*self._deltas(output.text), *self._last_deltas(end)]
        stop = self._stop_info(end)
        return MessageReply(
            self._id,
            self._model.name,
            content_blocks(deltas, shows_thinking=self._shows_thinking),
            stop.stop_reason,
            stop.stop_sequence,
            MessageUsage.of(end.usage),
            unenforced_schema_keywords=self._unenforced_keywords(),
        )

    async def stream(self, stream: EventStream) -> None:
        """Generates the message and sends its events, the first one when the prefill begins."""
        blocks = BlockEvents(shows_thinking=self._shows_thinking)
        started = False

        def encode(index: int, update: Update) -> bytes:
            nonlocal started
            events: list[MessageEvent] = []
            if not started:
                started = True
                events.append(self._start(update))
            if isinstance(update, Tokens):
                events += blocks.feed(self._deltas(update.text))
            else:
                events += blocks.feed(self._last_deltas(update))
                events += blocks.finish()
                events += [self._end(update), MessageStop()]
            return b"".join(map(tagged_event, events))

        await self._choices.run(encode, stream)

    def _start(self, update: Update) -> MessageStart:
        """Returns the first event. `update` is the first update of the choice."""
        progress = update.prefill_progress if isinstance(update, Tokens) else None
        prompt, cached = len(self._choices.requests[0].prompt), progress.cached if progress else 0
        usage = MessageUsage.of(Usage(prompt, cached, 0))
        return MessageStart(MessageReply(self._id, self._model.name, [], None, None, usage))

    def _end(self, end: Finished) -> MessageEnd:
        return MessageEnd(self._stop_info(end), MessageUsage.of(end.usage), self._unenforced_keywords())

    def _unenforced_keywords(self) -> UnenforcedKeywords | UnsetType:
        found = self._choices.outputs[0].unenforced_keywords()
        if found is UNSET:
            return UNSET
        return UnenforcedKeywords([self._form.original_path(path) for path in found.keywords], found.satisfied)

    def _deltas(self, text: str) -> Sequence[MessageDelta]:
        if self._parser is not None:
            return self._parser.feed(text)
        return [ContentDelta(text)] if text else []

    def _last_deltas(self, end: Finished) -> Sequence[MessageDelta]:
        truncated = end.reason is FinishReason.LENGTH
        return self._parser.finish(truncated=truncated) if self._parser is not None else []

    def _stop_info(self, end: Finished) -> StopInfo:
        if end.reason is FinishReason.LENGTH:
            return StopInfo("model_context_window_exceeded" if self._context_is_full(end) else "max_tokens", None)
        if self._parser is not None and self._parser.has_complete_calls:
            return StopInfo("tool_use", None)
        return StopInfo("stop_sequence", end.stop) if isinstance(end.stop, str) else StopInfo("end_turn", None)

    def _context_is_full(self, end: Finished) -> bool:
        """True if the end of the context, not the request's own limit, has cut the message."""
        limit = self._choices.requests[0].max_tokens
        below_limit = limit is None or end.usage.completion < limit
        return below_limit and end.usage.prompt + end.usage.completion >= self._model.engine.request_limit
