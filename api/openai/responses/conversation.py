"""Converts the items of a response's input to the messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from api.http.decode_errors import as_refusal
from api.openai.responses.encoded_reasoning import decode_reasoning
from api.openai.responses.tools import INPUT_FIELD, chat_tool_name
from api.schema.request_values import ContentPart, ImageURL, InputAudio
from api.schema.requests import ChatMessageParam
from engine import RequestRefused

_ITEM_TYPES = (
    *("message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"),
    *("reasoning", "item_reference"),
)
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
_LEADING_ROLES = ("system", "developer")
_QUOTED_CHARS = 64

_ItemT = TypeVar("_ItemT", bound=Struct)


class InputPart(Struct, frozen=True):
    """One part of an input item's content, with the fields of all types."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | ImageURL | None = None
    input_audio: InputAudio | None = None
    file_id: str | None = None


class InputMessage(Struct, frozen=True):
    """A message of any role."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputPart]


class InputFunctionCall(Struct, frozen=True):
    """A call of an earlier response."""

    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class InputCustomCall(Struct, frozen=True):
    """A call of a custom tool of an earlier response."""

    call_id: str
    name: str
    input: str
    namespace: str | None = None


class InputFunctionOutput(Struct, frozen=True):
    """The result of a call."""

    call_id: str
    output: str | list[InputPart]


class InputReasoning(Struct, frozen=True):
    """The reasoning of an earlier response, in `content`, `summary` or, from this server, `encrypted_content`."""

    summary: list[InputPart] | None = None
    content: list[InputPart] | None = None
    encrypted_content: str | None = None


class ChatConversation:
    """The chat messages of input items. `paths` has the path of the input item that began each message."""

    def __init__(self, instructions: str | None) -> None:
        self.messages: list[ChatMessageParam] = []
        self.paths: list[str] = []
        if instructions:
            self._begin(ChatMessageParam("system", instructions), "instructions")

    def add(self, items: Iterable[Mapping[str, Any]], path: str, *, indexed: bool = True) -> None:
        """Appends items. Raises RequestRefused with the item's path: `path`, with the item's index if `indexed`.

        Reasoning, message and calls of one turn become one message of the assistant.
        """
        for index, item in enumerate(items):
            self._add(item, f"{path}[{index}]" if indexed else path)

    def _add(self, item: Mapping[str, Any], path: str) -> None:
        match item_type(item):
            case "message":
                self._add_message(_convert(item, InputMessage, path), path)
            case "function_call":
                self._add_call(_convert(item, InputFunctionCall, path), path)
            case "custom_tool_call":
                custom = _convert(item, InputCustomCall, path)
                arguments = msgspec.json.encode({INPUT_FIELD: custom.input}).decode()
                self._add_call(InputFunctionCall(custom.call_id, custom.name, arguments, custom.namespace), path)
            case "function_call_output" | "custom_tool_call_output":
                result = _convert(item, InputFunctionOutput, path)
                content = _content(result.output, f"{path}.output")
                self._begin(ChatMessageParam("tool", content, tool_call_id=result.call_id), path)
            case "reasoning":
                reasoning = _convert(item, InputReasoning, path)
                if text := _reasoning_text(reasoning, path):
                    message = self._assistant(path)
                    message.reasoning_content = _join(message.reasoning_content, text)
            case other:
                raise RequestRefused(
                    f"{path}.type: items of type {str(other)[:_QUOTED_CHARS]!r} are not supported, only "
                    f"{', '.join(_ITEM_TYPES)}.",
                    field=f"{path}.type",
                )

    def _add_call(self, call: InputFunctionCall, path: str) -> None:
        message = self._assistant(path)
        function = {"name": chat_tool_name(call.name, call.namespace), "arguments": call.arguments}
        entry = {"id": call.call_id, "type": "function", "function": function}
        message.tool_calls = [*(message.tool_calls or ()), entry]

    def _add_message(self, message: InputMessage, path: str) -> None:
        content = _content(message.content, f"{path}.content")
        if message.role == "assistant":
            turn = self._assistant(path)
            turn.content = _join(turn.content, content) if turn.content else content
        elif message.role in _LEADING_ROLES and self.paths == ["instructions"]:
            # Most templates accept one system message at the start only.
            self.messages[0].content = _join(self.messages[0].content, content)
        else:
            self._begin(ChatMessageParam(message.role, content), path)

    def _assistant(self, path: str) -> ChatMessageParam:
        """Returns the last message if it is the assistant's, otherwise a new one."""
        if not self.messages or self.messages[-1].role != "assistant":
            self._begin(ChatMessageParam("assistant", ""), path)
        return self.messages[-1]

    def _begin(self, message: ChatMessageParam, path: str) -> None:
        self.messages.append(message)
        self.paths.append(path)

    def cuts(self) -> list[int]:
        """Returns the indices of the user's messages, with which a shortened conversation may begin."""
        return [index for index, message in enumerate(self.messages) if message.role == "user"]

    def cut(self, start: int) -> ChatConversation:
        """Returns the conversation from message `start` on, after its leading system messages."""
        lead = 0
        while lead < len(self.messages) and self.messages[lead].role in _LEADING_ROLES:
            lead += 1
        shorter = ChatConversation(None)
        shorter.messages = self.messages[:lead] + self.messages[max(start, lead) :]
        shorter.paths = self.paths[:lead] + self.paths[max(start, lead) :]
        return shorter


def item_type(item: Mapping[str, Any]) -> str | None:
    """Returns the type of an item, which may be absent in messages and references."""
    kind = item.get("type")
    if kind is None:
        return "message" if "role" in item else "item_reference" if "id" in item else None
    return str(kind)


def _convert(item: Mapping[str, Any], kind: type[_ItemT], path: str) -> _ItemT:
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        raise as_refusal(error, kind, item, path) from None


def _content(content: str | Sequence[InputPart], path: str) -> str | list[ContentPart]:
    """Returns the content of a chat message: a text, or parts with texts, images and sounds. Raises RequestRefused
    for parts of other types."""
    if isinstance(content, str):
        return content
    parts = [_content_part(part, f"{path}[{index}]") for index, part in enumerate(content)]
    if len(parts) < 2 and all(part.type == "text" for part in parts):
        return "".join(part.text or "" for part in parts)
    return parts


def _content_part(part: InputPart, path: str) -> ContentPart:
    if part.type == "input_image" and part.file_id is None:
        return ContentPart("image_url", image_url=part.image_url)
    if part.type == "input_audio":
        return ContentPart("input_audio", input_audio=part.input_audio)
    return ContentPart("text", _part_text(part, path))


def _part_texts(parts: Sequence[InputPart], path: str) -> list[str]:
    return [_part_text(part, f"{path}[{index}]") for index, part in enumerate(parts)]


def _part_text(part: InputPart, field: str) -> str:
    """Returns the text of a part. Raises RequestRefused for parts of other types."""
    if part.type == "input_image":
        raise RequestRefused(
            f"{field}.file_id: there are no uploaded files here; send image_url with a data URL.",
            field=f"{field}.file_id",
        )
    if part.type not in _TEXT_PARTS:
        raise RequestRefused(
            f"{field}.type: parts of type {part.type[:_QUOTED_CHARS]!r} are not supported, only texts, images and "
            "sounds; send 'input_text', 'input_image' or 'input_audio'.",
            field=f"{field}.type",
        )
    name = "refusal" if part.type == "refusal" else "text"
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise RequestRefused(f"{field}.{name}: the field is missing; expected a string", field=f"{field}.{name}")
    return text


def _reasoning_text(reasoning: InputReasoning, path: str) -> str:
    """Returns the reasoning; empty if it is encrypted by another server only."""
    if not reasoning.content and reasoning.encrypted_content:
        return decode_reasoning(reasoning.encrypted_content) or ""
    name = "content" if reasoning.content else "summary"
    return "\n\n".join(_part_texts(getattr(reasoning, name) or (), f"{path}.{name}"))


def _join(first: str | list[ContentPart] | None, second: str | list[ContentPart]) -> str:
    texts = [_as_text(first), _as_text(second)]
    return "\n\n".join(filter(None, texts))


def _as_text(content: str | list[ContentPart] | None) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    if any(part.type != "text" for part in content):
        raise RequestRefused("Images and sounds are supported only in messages of the user and results.", field="input")
    return "\n".join(part.text or "" for part in content)
