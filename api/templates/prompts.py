"""Conversations and texts to token ids, and back.

The names that a chat template may use are those that Hugging Face's `apply_chat_template` offers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
import msgspec

from api.config.server import ChatConfig
from api.schema.requests import ChatRequest, Message, Part, Prediction
from api.templates.builtin import CHATML
from api.templates.chat_template import ChatTemplate, TemplateTrouble, compiled, names_of, wanted
from api.tools.formats import Format, Generic, format_of
from api.tools.requested import as_text, offered, taught, with_objects
from engine import ModelInfo, RequestRefused, Vocab

Given = TypeVar("Given", bound=Sized)
Made = TypeVar("Made")

LONG = 20_000
"""Characters from which on a text is worth a worker thread, some 5 ms of tokenizing; or tokens, to be spelled."""

# The space tells whether the template strips the content, in which case the space is gone.
_CUT = "\ue000paceline cuts here\ue001 "


class Prompts:
    """The model's way to write prompts."""

    def __init__(self, info: ModelInfo, vocab: Vocab, chat: ChatConfig = ChatConfig()) -> None:  # noqa: B008 (frozen)
        """Raises TemplateTrouble if the settings make no sense."""
        self._info = info
        self._vocab = vocab
        self.chat = chat
        """The settings."""
        self._names = names_of(chat)
        self.trouble: str | None = None
        """What is wrong with the template that is served, for people; None if nothing is."""
        self.template = self._served_template()
        """What conversations are written with; None if it is not Jinja: only texts can be completed then."""

    async def text_of_chat(self, request: ChatRequest) -> str:
        """A conversation as the model reads it, up to where the assistant goes on, special tokens by their names.
        Raises RequestRefused."""
        if request.chat_template is None and _size(request) < LONG:
            return self.render(request)
        return await anyio.to_thread.run_sync(self.render, request)

    async def of_text(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, special ones in it recognised. Raises RequestRefused if there are none."""
        return await aside(self.tokens, text)

    async def of_prediction(self, prediction: Prediction | None) -> tuple[int, ...]:
        """The tokens of what a client expects, none special; empty if nothing. Raises RequestRefused."""
        if prediction is None:
            return ()
        content = prediction.content
        text = content if isinstance(content, str) else "".join(_texts(content, "prediction.content"))
        return tuple(await aside(partial(self._vocab.tokenize, special=False), text))

    async def of_piece(self, text: str, *, add: bool, parse: bool) -> list[int]:
        """The tokens of any text, also of none: `add` what the model wants before and after a text, `parse` the
        names of special tokens in it."""
        return await aside(partial(self._piece, add=add, parse=parse), text)

    async def of_pieces(self, pieces: Sequence[str | int], *, add: bool, parse: bool) -> list[int]:
        """The tokens of texts and tokens by turns; what the model wants around a text goes around the first piece."""
        return await anyio.to_thread.run_sync(partial(self._pieces, pieces, add=add, parse=parse))

    def _piece(self, text: str, *, add: bool, parse: bool) -> list[int]:
        tokens = self._vocab.tokenize(text, special=parse)
        if add and not parse:
            before, after = ([token] if token >= 0 else [] for token in self._vocab.added)
            return [*before, *tokens, *after]
        return tokens if add or not parse else self._stripped(tokens)

    def _pieces(self, pieces: Sequence[str | int], *, add: bool, parse: bool) -> list[int]:
        tokens: list[int] = []
        for index, piece in enumerate(pieces):
            if isinstance(piece, int):
                tokens.append(piece)
            else:
                tokens += self._piece(piece, add=add and index == 0, parse=parse)
        return tokens

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text that tokens stand for."""
        return b"".join(map(self._vocab.piece, tokens)).decode("utf-8", "replace")

    def spelled(self, token: int) -> bytes:
        """A token's bytes; of a special one its name."""
        return self._vocab.piece(token) or self._vocab.text(token).encode()

    def text_with_names_of(self, tokens: Sequence[int]) -> str:
        """The text that tokens stand for, special ones by their names."""
        return b"".join(each_of(tokens, self.spelled)).decode("utf-8", "replace")

    def tokens(self, text: str) -> tuple[int, ...]:
        """What `of_text` returns, computed here and now."""
        info = self._info
        if info.bos_added and info.bos:
            text = text.removeprefix(info.bos)  # many templates write it; the tokenizer would add a second
        tokens = self._vocab.tokenize(text, special=True)
        if not tokens:
            raise RequestRefused("The prompt is empty.", field="prompt")
        return tuple(tokens)

    def render(self, request: ChatRequest) -> str:
        """The conversation as the model wants to read it. Raises RequestRefused with what the template says."""
        template, format, tools = self.template_for(request), self.format_for(request), offered(request)
        extend = self._extends(request)
        messages = [self._message(index, message) for index, message in enumerate(request.messages)]
        if "tool_calls" not in template.source:
            messages = list(map(as_text, messages))
        if isinstance(format, Generic) and tools:
            system = template.capabilities.supports_system_role
            messages, tools = taught(messages, tools, system=system), None
        if any("tool_calls" in message for message in messages) and template.capabilities.supports_object_arguments:
            messages = list(map(with_objects, messages))
        messages = list(map(template.fitted, messages))
        if extend:
            _mark(messages[-1])
        names = {
            "documents": None,
            **self._names,
            **self._thinking(request),
            **(request.chat_template_kwargs or {}),
            "messages": messages,
            "add_generation_prompt": not extend and request.add_generation_prompt is not False,
            "bos_token": self._info.bos,
            "eos_token": self._info.eos,
            "tools": tools,
        }
        if request.documents is not None:
            names["documents"] = request.documents
        text = template.render(names)
        return _cut(text) if extend else text

    def _served_template(self) -> ChatTemplate | None:
        source = wanted(self.chat) or self._info.chat_template
        if source is None:
            self.trouble = "The model has no chat template; ChatML is used."
            return ChatTemplate(CHATML)
        try:
            template = ChatTemplate(source)
        except TemplateTrouble as error:
            self.trouble = f"The chat template cannot be used: {error}."
            return None
        if not (template.reads_text or template.reads_parts):
            self.trouble = "The chat template shows nothing of a user's plain message, or fails on it."
        return template

    def _thinking(self, request: ChatRequest) -> dict[str, Any]:
        """What templates are told of how much to think, under the names that families use."""
        names: dict[str, Any] = {}
        if request.reasoning_effort is not None:
            names["reasoning_effort"] = request.reasoning_effort
        thinks = request.enable_thinking
        if thinks is None and (request.reasoning_effort == "none" or self.budget_of(request) == 0):
            thinks = False
        if thinks is not None:
            names["enable_thinking"] = names["thinking"] = thinks
        return names

    def budget_of(self, request: ChatRequest) -> int:
        """Tokens that may be thought; -1 is any number."""
        asked = request.thinking_budget
        return self.chat.reasoning_budget if asked is None else asked

    def format_for(self, request: ChatRequest) -> Format:
        """How the request's model writes calls. Raises RequestRefused."""
        return format_of(self.template_for(request).source)

    def special_token(self, text: str) -> int | None:
        """The special token that is spelled like this; None if there is none."""
        tokens = self._bare(text)
        return tokens[0] if len(tokens) == 1 and tokens[0] in self._vocab.special else None

    def closing(self, text: str) -> tuple[int, ...]:
        """The tokens of a tag and an empty line after it."""
        return (*self._bare(text), *self._vocab.tokenize("\n\n", special=False))

    def _bare(self, text: str) -> list[int]:
        """The tokens of `text` without those that the model wants around a text."""
        return self._stripped(self._vocab.tokenize(text, special=True))

    def _stripped(self, tokens: list[int]) -> list[int]:
        """`tokens` without those that the model wants around a text."""
        before, after = self._vocab.added
        start = int(bool(tokens) and tokens[0] == before)
        return tokens[start : len(tokens) - int(len(tokens) > start and tokens[-1] == after)]

    def template_for(self, request: ChatRequest) -> ChatTemplate:
        """The template that the request is written with. Raises RequestRefused."""
        if request.chat_template is not None:
            return self._brought(request.chat_template)
        if self.template is None:
            raise RequestRefused(f"{self.trouble} Use /v1/completions.")
        return self.template

    def _brought(self, source: str) -> ChatTemplate:
        if not self.chat.trust_request_template:
            raise RequestRefused(
                "This server takes no chat_template from requests: leave it out, or serve with "
                "--trust-request-chat-template.",
                field="chat_template",
            )
        try:
            return compiled(source)
        except TemplateTrouble as error:
            raise RequestRefused(f"chat_template cannot be used: {error}.", field="chat_template") from None

    def _extends(self, request: ChatRequest) -> bool:
        """Whether the last message is to go on, instead of a new one. Raises RequestRefused."""
        last = request.messages[-1]
        if request.continue_final_message is None and request.add_generation_prompt is None:
            return self.chat.prefill_assistant and last.role == "assistant" and not last.tool_calls
        if not request.continue_final_message:
            return False
        if request.add_generation_prompt:
            raise RequestRefused(
                "add_generation_prompt and continue_final_message exclude each other.",
                field="continue_final_message",
            )
        if last.tool_calls:
            raise RequestRefused("A message with tool calls cannot be continued.", field="continue_final_message")
        return True

    def _message(self, index: int, message: Message) -> dict[str, Any]:
        """The message as templates know it: with nothing that the client left out but content, a text or parts."""
        if message.content is None and message.role != "assistant":
            raise RequestRefused(
                f"A message of role {message.role!r} needs content.", field=f"messages[{index}].content"
            )
        for place, call in enumerate(message.tool_calls or ()):
            if not isinstance(call.get("function"), dict):
                raise RequestRefused(
                    "A call needs a function, an object with its name and its arguments.",
                    field=f"messages[{index}].tool_calls[{place}].function",
                )
        fields: dict[str, Any] = msgspec.to_builtins(message)
        if not message.tool_calls:
            fields.pop("tool_calls", None)  # to templates an empty list would be a message of calls
        if isinstance(message.content, list):
            texts = _texts(message.content, f"messages[{index}].content")
            fields["content"] = [{"type": "text", "text": text} for text in texts]
        else:
            fields["content"] = message.content or ""
        return fields


def each_of(tokens: Sequence[int], function: Callable[[int], Made]) -> list[Made]:
    """What `function` makes of each token; it is asked once for those that are equal."""
    made = {token: function(token) for token in set(tokens)}
    return [made[token] for token in tokens]


async def aside(function: Callable[[Given], Made], given: Given) -> Made:
    """What `function` makes of a text, or of tokens, on a worker thread if they are long."""
    return function(given) if len(given) < LONG else await anyio.to_thread.run_sync(function, given)


def _mark(message: dict[str, Any]) -> None:
    """Puts the mark at the end of the message's text."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _CUT
    else:
        message["content"] = [*content[:-1], {"type": "text", "text": (content[-1]["text"] if content else "") + _CUT}]


def _cut(text: str) -> str:
    """`text` up to the mark, stripped as the template would have stripped what stands before it."""
    at = text.rfind(_CUT.rstrip())
    if at < 0:
        raise RequestRefused(
            "The chat template does not show the last message, so it cannot be continued.",
            field="continue_final_message",
        )
    return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()


def _size(request: ChatRequest) -> int:
    """Bytes of JSON of what a template goes through."""
    return len(msgspec.json.encode((request.messages, request.tools, request.documents, request.chat_template_kwargs)))


def _texts(parts: Sequence[Part], path: str) -> list[str]:
    """The texts of parts, all of which must be text."""
    for index, part in enumerate(parts):
        if part.type != "text":
            raise RequestRefused(
                f"Content parts of type {part.type[:32]!r} are not supported, only 'text'.",
                field=f"{path}[{index}].type",
            )
        if part.text is None:
            raise RequestRefused("A content part of type 'text' needs text.", field=f"{path}[{index}].text")
    return [part.text or "" for part in parts]
