"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.chat_choices import chat_choices
from api.generation.choices import read_generation_request
from api.generation.loaded_model import AppState, LoadedModel
from api.generation.openai_replies import ReplyBuilder, respond
from api.generation.prepared_chat import PreparedChat, prepare_chat
from api.http.events import sse_event
from api.http.request_context import request_context
from api.openai.messages import message_from_deltas, set_fields
from api.schema.logprobs import chat_logprobs
from api.schema.replies import ChatChoice, ChatChunkChoice, ChatMessage, DeltaMessage
from api.schema.requests import ChatRequest
from api.schema.token_origins import token_origins
from api.tools.formats import MessageParser
from engine import Finished, FinishReason, Logprob, Tokens

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
        choices = await chat_choices(model, request_context(http_request.scope), request, chat)
        builder = ChatReplyBuilder(model, request, chat, len(choices))
        return respond(request, choices, builder, model.options.server.sse_ping)


class ChatReplyBuilder(ReplyBuilder):
    """Builds chat chunks and choices. The first chunk of a choice has only the role, the last one the finish reason."""

    def __init__(self, model: LoadedModel, request: ChatRequest, chat: PreparedChat, choices: int) -> None:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        super().__init__(model, request, kind, "chatcmpl-")
        self._vocab = model.engine.vocab
        self._functions = bool(request.functions)
        self._choices = [(ChatChunkChoice(index, DeltaMessage()),) for index in range(choices)]
        self._without_role = set(range(choices))  # indices of the choices without a chunk so far
        self._parsers = [chat.parser() for _ in range(choices)]
        self.events_differ_in_text_only &= not any(self._parsers)

    def full_event(self, index: int, update: Tokens) -> bytes:
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        if not self._set_delta(index, update.text, choice.delta) and not update.logprobs and not update.origins:
            return b""
        choice.logprobs = chat_logprobs(self._vocab, update.logprobs) if update.logprobs else None
        choice.token_origins = token_origins(self._vocab, update.ids, update.origins)
        event = sse_event(self.chunk)
        return self._role_event(index) + event if index in self._without_role else event

    def progress_event(self, index: int) -> bytes:
        start = self._role_event(index) if index in self._without_role else b""
        self.chunk.choices = (ChatChunkChoice(index, DeltaMessage()),)
        return start + sse_event(self.chunk)

    def _role_event(self, index: int) -> bytes:
        """Returns the encoded first chunk of the choice. As in llama-server, it has the role, and null as content."""
        self._without_role.discard(index)
        choice = ChatChunkChoice(index, DeltaMessage("assistant", None))
        return sse_event(msgspec.structs.replace(self.chunk, choices=(choice,), timings=UNSET, prompt_progress=UNSET))

    def _set_delta(self, index: int, text: str, message: DeltaMessage) -> bool:
        """Sets the fields that `text` adds to the message. Returns False if `text` adds nothing yet."""
        parser = self._parsers[index]
        if parser is None:
            message.content = text
            return True
        deltas = parser.feed(text)
        set_fields(message, deltas, functions=self._functions)
        return bool(deltas)

    def set_final_chunk(self, index: int, end: Finished) -> None:
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        parser = self._parsers[index]
        rest = parser.finish(truncated=end.reason is FinishReason.LENGTH) if parser else ()
        set_fields(choice.delta, rest, functions=self._functions)
        # A choice without output had no first chunk, so its final chunk has the role and the content too.
        if index in self._without_role:
            choice.delta.role = "assistant"
            choice.delta.content = "" if choice.delta.content is UNSET else choice.delta.content
        choice.logprobs, choice.token_origins = None, UNSET
        choice.finish_reason = self._finish_reason(end, parser)

    def whole_choice(self, index: int, text: str, logprobs: Sequence[Logprob], end: Finished) -> ChatChoice:
        parser = self._parsers[index]
        if parser is None:
            message = ChatMessage(content=text)
        else:
            truncated = end.reason is FinishReason.LENGTH
            deltas = [*parser.feed(text), *parser.finish(truncated=truncated)]
            message = message_from_deltas(deltas, functions=self._functions)
        reply_logprobs = chat_logprobs(self._vocab, logprobs) if logprobs else None
        return ChatChoice(index, message, reply_logprobs, self._finish_reason(end, parser))

    def _finish_reason(self, end: Finished, parser: MessageParser | None) -> str:
        """Returns `tool_calls` or `function_call` for a message with complete calls, otherwise the engine's reason."""
        if end.reason is FinishReason.STOP and parser is not None and parser.has_complete_calls:
            return "function_call" if self._functions else "tool_calls"
        return end.reason
