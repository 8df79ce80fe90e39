"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from api.generation.choices import Choices, Writer, asked_of, respond
from api.generation.loaded_model import Served, Site
from api.generation.turns import Turn, turn_of
from api.http.events import event
from api.http.request_context import exchange_of
from api.openai.messages import message_of, show
from api.schema.logprobs import chat_logprobs
from api.schema.replies import ChatChoice, ChatDelta, ChatMessage, Delta
from api.schema.requests import ChatRequest
from api.tools.formats import Parser
from engine import ContextExceeded, Finished, FinishReason, Logprob, Tokens

_DECODER = msgspec.json.Decoder(ChatRequest)


class Chat:
    """The endpoint."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def complete(self, request: Request) -> Response:
        """A conversation's next turn."""
        served = self._site.open
        asked = await asked_of(request, served, _DECODER)
        turn = await turn_of(asked, served.prompts)
        prediction = await served.prompts.of_prediction(asked.prediction)
        try:
            choices = Choices(
                served,
                exchange_of(request.scope),
                asked,
                [turn.prompt],
                limit=asked.limit,
                logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
                prediction=prediction,
                spelled=turn.spelled,
                reasoning=turn.budget,
                grammar=await turn.grammar(served.engine),
            )
        except ContextExceeded as error:
            error.field = "messages"
            raise
        return respond(asked, choices, ChatWriter(served, asked, turn, len(choices)), served.options.server.sse_ping)


class ChatWriter(Writer):
    """Chat chunks: the first of each choice names the role, the last the reason of its end."""

    def __init__(self, served: Served, asked: ChatRequest, turn: Turn, choices: int) -> None:
        super().__init__(served, asked, "chat.completion.chunk" if asked.stream else "chat.completion", "chatcmpl-")
        self._vocab = served.engine.vocab
        self._choices = [(ChatDelta(index, Delta("assistant", "")),) for index in range(choices)]
        self._parsers = [turn.parser() for _ in range(choices)]

    def tokens(self, index: int, update: Tokens) -> bytes:
        if not update.text and not update.logprobs:
            return b""
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        if not self._show(index, update.text, choice.delta) and not update.logprobs:
            return b""
        choice.logprobs = chat_logprobs(self._vocab, update.logprobs) if update.logprobs else None
        shown = event(self.chunk)
        choice.delta.role = UNSET
        return shown

    def _show(self, index: int, text: str, delta: Delta) -> bool:
        """Sets the fields of `delta` to what `text` adds to the message; whether that is anything."""
        parser = self._parsers[index]
        if parser is None:
            delta.content = text
            return True
        deltas = parser.feed(text)
        show(deltas, delta)
        return bool(deltas)

    def end(self, index: int, end: Finished) -> None:
        self.chunk.choices = choices = self._choices[index]
        choice = choices[0]
        parser = self._parsers[index]
        show(parser.finish() if parser else (), choice.delta)
        # A choice without any text has not had its first chunk: this is the first and the last.
        if choice.delta.role is not UNSET and choice.delta.content is UNSET:
            choice.delta.content = ""
        choice.logprobs = None
        choice.finish_reason = reason_of(end, parser)

    def whole(self, index: int, text: str, logprobs: Sequence[Logprob], end: Finished) -> ChatChoice:
        told = chat_logprobs(self._vocab, logprobs) if logprobs else None
        parser = self._parsers[index]
        message = ChatMessage(content=text) if parser is None else message_of([*parser.feed(text), *parser.finish()])
        return ChatChoice(index, message, told, reason_of(end, parser))


def reason_of(end: Finished, parser: Parser | None) -> str:
    """Why the message ends: with calls, unless it was cut off."""
    calls = parser is not None and parser.begun > 0 and end.reason is FinishReason.STOP
    return "tool_calls" if calls else end.reason
