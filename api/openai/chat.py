"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.choices import Choices, ReplyBuilder, read_generation_request, respond
from api.generation.loaded_model import AppState, LoadedModel
from api.generation.prepared_chat import PreparedChat, prepare_chat
from api.http.events import sse_event
from api.http.request_context import request_context
from api.openai.messages import message_from_deltas, set_fields
from api.schema.logprobs import chat_logprobs
from api.schema.replies import ChatChoice, ChatChunkChoice, ChatMessage, DeltaMessage
from api.schema.requests import ChatRequest
from api.tools.formats import MessageParser
from engine import ContextExceeded, Finished, FinishReason, Logprob, Tokens

_DECODER = msgspec.json.Decoder(ChatRequest)


class ChatCompletionEndpoint:
    """The endpoint POST /v1/chat/completions."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def create(self, http_request: HTTPRequest) -> Response:
        """Generates the assistant's next message, `n` times."""
        model = self._state.model
        request = await read_generation_request(http_request, model, _DECODER)
        chat = await prepare_chat(request, model.prompts)
        prediction = await model.prompts.tokenize_prediction(request.prediction)
        try:
            choices = Choices(
                model,
                request_context(http_request.scope),
                request,
                [chat.prompt],
                token_limit=request.token_limit,
                logprobs=(request.top_logprobs or 0) if request.logprobs else None,
                prediction=prediction,
                control_texts=chat.control_texts,
                reasoning=chat.reasoning_budget,
                grammar=await chat.grammar(model.engine),
            )
        except ContextExceeded as error:
            error.field = "messages"
            raise
        builder = ChatReplyBuilder(model, request, chat, len(choices))
        return respond(request, choices, builder, model.options.server.sse_ping)


class ChatReplyBuilder(ReplyBuilder):
    """Builds chat chunks and choices. The first chunk of a choice has the role, the last one the finish reason."""

    def __init__(self, model: LoadedModel, request: ChatRequest, chat: PreparedChat, choices: int) -> None:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        super().__init__(model, request, kind, "chatcmpl-")
        self._vocab = model.engine.vocab
        self._choices = [(ChatChunkChoice(index, DeltaMessage("assistant", "")),) for index in range(choices)]
        self._parsers = [chat.parser() for _ in range(choices)]

    def token_event(self, index: int, update: Tokens) -> bytes:
        if not update.text and not update.logprobs:
            return b""
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        if not self._set_delta(index, update.text, choice.delta) and not update.logprobs:
            return b""
        choice.logprobs = chat_logprobs(self._vocab, update.logprobs) if update.logprobs else None
        event = sse_event(self.chunk)
        choice.delta.role = UNSET
        return event

    def _set_delta(self, index: int, text: str, message: DeltaMessage) -> bool:
        """Sets the fields that `text` adds to the message. Returns False if `text` adds nothing yet."""
        parser = self._parsers[index]
        if parser is None:
            message.content = text
            return True
        deltas = parser.feed(text)
        set_fields(message, deltas)
        return bool(deltas)

    def set_final_chunk(self, index: int, end: Finished) -> None:
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        parser = self._parsers[index]
        set_fields(choice.delta, parser.finish() if parser else ())
        # A choice without output had no first chunk, so its final chunk has the role and the content too.
        if choice.delta.role is not UNSET and choice.delta.content is UNSET:
            choice.delta.content = ""
        choice.logprobs = None
        choice.finish_reason = _finish_reason(end, parser)

    def whole_choice(self, index: int, text: str, logprobs: Sequence[Logprob], end: Finished) -> ChatChoice:
        parser = self._parsers[index]
        if parser is None:
            message = ChatMessage(content=text)
        else:
            message = message_from_deltas([*parser.feed(text), *parser.finish()])
        reply_logprobs = chat_logprobs(self._vocab, logprobs) if logprobs else None
        return ChatChoice(index, message, reply_logprobs, _finish_reason(end, parser))


def _finish_reason(end: Finished, parser: MessageParser | None) -> str:
    """Returns `tool_calls` for a complete message with calls, otherwise the engine's finish reason."""
    has_calls = parser is not None and parser.num_calls > 0
    return "tool_calls" if has_calls and end.reason is FinishReason.STOP else end.reason
