"""Converts parsed deltas to a whole message or to the fields of a chunk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import UNSET, UnsetType

from api.schema.replies import ChatMessage, DeltaMessage, FunctionCallReply, ToolCallChunk, ToolCallReply
from api.tools.formats import ArgumentsDelta, ContentDelta, MessageDelta, ReasoningDelta, ToolCallStart


def set_fields(message: DeltaMessage, deltas: Sequence[MessageDelta]) -> None:
    """Sets all fields of `message` but the role to the concatenation of `deltas`. Fields without a delta are unset."""
    message.content = _text(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    message.reasoning_content = _text(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    calls: dict[int, ToolCallChunk] = {}
    for delta in deltas:
        if isinstance(delta, ToolCallStart):
            calls[delta.index] = ToolCallChunk(delta.index, FunctionCallReply("", delta.name), delta.id, "function")
        elif isinstance(delta, ArgumentsDelta):
            call = calls.setdefault(delta.index, ToolCallChunk(delta.index, FunctionCallReply("")))
            call.function.arguments += delta.text
    message.tool_calls = list(calls.values()) or UNSET


def message_from_deltas(deltas: Sequence[MessageDelta]) -> ChatMessage:
    """Returns the message composed of `deltas`. With tool calls, empty content is null, as in OpenAI's API."""
    fields = DeltaMessage()
    set_fields(fields, deltas)
    if fields.tool_calls is UNSET:
        return ChatMessage(content=fields.content or "", reasoning_content=fields.reasoning_content)
    calls = [ToolCallReply(str(call.id), call.function) for call in fields.tool_calls]
    return ChatMessage(content=fields.content or None, reasoning_content=fields.reasoning_content, tool_calls=calls)


def _text(texts: Iterable[str]) -> str | UnsetType:
    return "".join(texts) or UNSET
