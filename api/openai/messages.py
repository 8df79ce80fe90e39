"""Converts parsed deltas to a whole message or to the fields of a chunk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import UNSET, UnsetType

from api.schema.replies import ChatMessage, DeltaMessage, FunctionCallReply, ToolCallChunk, ToolCallReply
from api.tools.formats import ArgumentsDelta, ContentDelta, MessageDelta, ReasoningDelta, ToolCallStart


def set_fields(message: DeltaMessage, deltas: Sequence[MessageDelta], *, functions: bool = False) -> None:
    """Sets all fields of `message` but the role to the concatenation of `deltas`. Fields without a delta are unset.

    With `functions` the only call is the legacy `function_call`.
    """
    message.content = _text(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    message.reasoning_content = _text(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    calls: dict[int, ToolCallChunk] = {}
    for delta in deltas:
        if isinstance(delta, ToolCallStart):
            calls[delta.index] = ToolCallChunk(delta.index, FunctionCallReply("", delta.name), delta.id, "function")
        elif isinstance(delta, ArgumentsDelta):
            call = calls.setdefault(delta.index, ToolCallChunk(delta.index, FunctionCallReply("")))
            call.function.arguments += delta.text
    message.tool_calls = UNSET if functions or not calls else list(calls.values())
    message.function_call = calls[0].function if functions and 0 in calls else UNSET


def message_from_deltas(deltas: Sequence[MessageDelta], *, functions: bool = False) -> ChatMessage:
    """Returns the message composed of `deltas`. With calls, empty content is null, as in OpenAI's API. With `functions`
    the only call is the legacy `function_call`."""
    fields = DeltaMessage()
    set_fields(fields, deltas, functions=functions)
    if fields.tool_calls is UNSET and fields.function_call is UNSET:
        return ChatMessage(content=fields.content or "", reasoning_content=fields.reasoning_content)
    calls = [ToolCallReply(str(call.id), call.function) for call in fields.tool_calls or ()]
    return ChatMessage(
        content=fields.content or None,
        reasoning_content=fields.reasoning_content,
        tool_calls=calls or UNSET,
        function_call=fields.function_call,
    )


def _text(texts: Iterable[str]) -> str | UnsetType:
    return "".join(texts) or UNSET
