"""Converts the messages of Anthropic's API, which consist of blocks, to the messages of chat templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from api.anthropic.messages_schema import BlockSource, ContentBlock, MessageParam
from api.schema.request_values import ContentPart
from api.schema.requests import ChatMessageParam
from engine import RequestRefused

# Agents begin the system prompt with a block of this name, which changes with each request: in the prompt, the block
# would keep every request from using the cached prefix of the one before.
_BILLING_HEADER = "x-anthropic-billing-header:"

_TEXT_TYPES = ("text", "document with a text", "search_result", "tool_reference")
# The types of blocks that messages of a role may have besides those with a text.
_BLOCK_TYPES = {
    "user": ("image", "tool_result"),
    "assistant": ("tool_use", "thinking", "redacted_thinking"),
    "system": (),
}
_QUOTED_CHARS = 64


def message_params(
    system: str | Sequence[ContentBlock] | None, messages: Sequence[MessageParam]
) -> list[ChatMessageParam]:
    """Returns the conversation for chat templates. Raises RequestRefused, with the path of the block.

    Successive messages of one role become one message, as in Anthropic's API.
    """
    conversation = _Conversation()
    for text in _system_texts(system or ()):
        conversation.add_text("system", text)
    for index, message in enumerate(messages):
        path = f"messages[{index}].content"
        blocks = [ContentBlock("text", message.content)] if isinstance(message.content, str) else message.content
        for number, block in enumerate(blocks):
            conversation.add_block(message.role, block, f"{path}[{number}]")
        if not blocks:
            conversation.begin(message.role)
    return conversation.finish()


def named_tools(messages: Sequence[MessageParam]) -> frozenset[str]:
    """Returns the names of the tools that calls and `tool_reference` blocks of the messages name."""
    blocks = [block for each in messages if not isinstance(each.content, str) for block in each.content]
    blocks += [inner for block in blocks if isinstance(block.content, list) for inner in block.content]
    calls = {block.name for block in blocks if block.type == "tool_use" and block.name}
    return frozenset(
        calls | {block.tool_name for block in blocks if block.type == "tool_reference" and block.tool_name}
    )


class _Conversation:
    """The messages so far. Their contents are lists of parts until `finish`."""

    def __init__(self) -> None:
        self._messages: list[ChatMessageParam] = []
        self._tool_names: dict[str, str] = {}

    def begin(self, role: str) -> ChatMessageParam:
        """Returns the last message if it has this role, else a new message."""
        if not self._messages or self._messages[-1].role != role:
            self._messages.append(ChatMessageParam(role, []))
        return self._messages[-1]

    def add_text(self, role: str, text: str) -> None:
        """Appends a text to the message of this role."""
        self._add_part(role, ContentPart("text", text))

    def _add_part(self, role: str, part: ContentPart) -> None:
        content = self.begin(role).content
        assert isinstance(content, list)
        content.append(part)

    def add_block(self, role: str, block: ContentBlock, path: str) -> None:
        """Appends a block of a message. Redacted reasoning, which cannot be read, is dropped."""
        match role, block.type:
            case "user", "image":
                self._add_part(role, _image_part(block, path))
            case "user", "tool_result":
                self._add_tool_result(block, path)
            case "assistant", "tool_use":
                message = self.begin(role)
                message.tool_calls = [*(message.tool_calls or ()), self._call(block, path)]
            case "assistant", "thinking":
                message = self.begin(role)
                message.reasoning_content = (message.reasoning_content or "") + (block.thinking or "") or None
            case "assistant", "redacted_thinking":
                self.begin(role)
            case _:
                self.add_text(role, _block_text(block, path, _BLOCK_TYPES[role]))

    def _add_tool_result(self, block: ContentBlock, path: str) -> None:
        """Appends the result of a tool as a message of its own."""
        call_id = _required(block.tool_use_id, path, "tool_use_id")
        images, texts = _images_and_texts(block.content, f"{path}.content")
        text = "\n".join(texts)
        if block.is_error and not text.lower().startswith("error"):
            text = f"Error: {text}"
        name = self._tool_names.get(call_id)
        content = [*images, ContentPart("text", text)] if images else text
        self._messages.append(ChatMessageParam("tool", content, name=name, tool_call_id=call_id))

    def _call(self, block: ContentBlock, path: str) -> dict[str, Any]:
        id, name = _required(block.id, path, "id"), _required(block.name, path, "name")
        self._tool_names[id] = name
        arguments = msgspec.json.encode(block.input or {}).decode()
        return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def finish(self) -> list[ChatMessageParam]:
        """Returns the messages. Contents without parts or with one text become texts."""
        for message in self._messages:
            parts = message.content
            if isinstance(parts, list) and len(parts) < 2 and all(part.type == "text" for part in parts):
                message.content = "".join(part.text or "" for part in parts)
        return self._messages


def _images_and_texts(content: str | Sequence[ContentBlock] | None, path: str) -> tuple[list[ContentPart], list[str]]:
    """Returns the images and the texts of a tool's result. Raises RequestRefused for blocks of other types."""
    if content is None or isinstance(content, str):
        return [], [content or ""]
    blocks = [(block, f"{path}[{number}]") for number, block in enumerate(content)]
    images = [_image_part(block, field) for block, field in blocks if block.type == "image"]
    return images, [_block_text(block, field, ("image",)) for block, field in blocks if block.type != "image"]


def _image_part(block: ContentBlock, path: str) -> ContentPart:
    """Returns an image in the form of chat completions. Raises RequestRefused unless its source has data or a URL."""
    match block.source:
        case BlockSource(type="base64") as source:
            data = _required(source.data, f"{path}.source", "data")
            url = f"data:{source.media_type or 'image/png'};base64,{data}"
        case BlockSource(type="url") as source:
            url = _required(source.url, f"{path}.source", "url")
        case _:
            raise RequestRefused(
                f"{path}.source: expected an object of type 'base64' with data, or of type 'url' with a url",
                field=f"{path}.source",
            )
    return ContentPart("image_url", image_url=url)


def _system_texts(system: str | Sequence[ContentBlock]) -> Iterator[str]:
    texts = [system] if isinstance(system, str) else _content_texts(system, "system")
    return (text for text in texts if text and not text.startswith(_BILLING_HEADER))


def _content_texts(content: str | Sequence[ContentBlock] | None, path: str) -> list[str]:
    """Returns the texts of a content. Raises RequestRefused for a block without a text."""
    if content is None or isinstance(content, str):
        return [content or ""]
    return [_block_text(block, f"{path}[{number}]") for number, block in enumerate(content)]


def _block_text(block: ContentBlock, path: str, other_types: Sequence[str] = ()) -> str:
    """Returns the text of a block of `_TEXT_TYPES`. Raises RequestRefused for other types.

    `other_types` are further types of blocks that are supported at this place.
    """
    match block:
        case ContentBlock(type="text"):
            return _required(block.text, path, "text")
        case ContentBlock(type="tool_reference"):
            return f"The tool {_required(block.tool_name, path, 'tool_name')} is available."
        case ContentBlock(type="document", source=BlockSource(type="text" | "content") as source):
            if source.type == "text":
                return _joined(block.title, _required(source.data, f"{path}.source", "data"))
            return _joined(block.title, *_content_texts(source.content, f"{path}.source.content"))
        case ContentBlock(type="search_result", source=str() as url):
            return _joined(block.title, url, *_content_texts(block.content, f"{path}.content"))
    kind, field = repr(block.type[:_QUOTED_CHARS]), "type"
    if block.type == "document" and isinstance(block.source, BlockSource):
        kind, field = f"'document' with a source of type {block.source.type[:_QUOTED_CHARS]!r}", "source.type"
    supported = ", ".join((*_TEXT_TYPES, *other_types))
    raise RequestRefused(f"Blocks of type {kind} are not supported here, only {supported}.", field=f"{path}.{field}")


def _joined(*texts: str | None) -> str:
    return "\n".join(filter(None, texts))


def _required(value: str | None, path: str, name: str) -> str:
    if value is None:
        raise RequestRefused(f"{path}.{name}: the field is missing; expected a string", field=f"{path}.{name}")
    return value
