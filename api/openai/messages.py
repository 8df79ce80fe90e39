"""What readers of a text told, as fields of a message or of its part in a chunk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import UNSET, UnsetType

from api.schema.replies import CallDelta, CallReply, ChatMessage, FunctionReply
from api.schema.replies import Delta as Shown
from api.tools.formats import Arguments, Begun, Content, Delta, Reasoning


def show(deltas: Sequence[Delta], shown: Shown) -> None:
    """Sets the fields of a chunk, all but the role, to what `deltas` amount to."""
    shown.content = _text(each.text for each in deltas if isinstance(each, Content))
    shown.reasoning_content = _text(each.text for each in deltas if isinstance(each, Reasoning))
    calls: dict[int, CallDelta] = {}
    for each in deltas:
        if isinstance(each, Begun):
            calls[each.index] = CallDelta(each.index, FunctionReply("", each.name), each.id, "function")
        elif isinstance(each, Arguments):
            call = calls.setdefault(each.index, CallDelta(each.index, FunctionReply("")))
            call.function.arguments += each.text
    shown.tool_calls = list(calls.values()) or UNSET


def message_of(deltas: Sequence[Delta]) -> ChatMessage:
    """The whole message that `deltas` amount to."""
    shown = Shown()
    show(deltas, shown)
    if shown.tool_calls is UNSET:
        return ChatMessage(content=shown.content or "", reasoning_content=shown.reasoning_content)
    calls = [CallReply(str(call.id), call.function) for call in shown.tool_calls]
    return ChatMessage(content=shown.content or None, reasoning_content=shown.reasoning_content, tool_calls=calls)


def _text(texts: Iterable[str]) -> str | UnsetType:
    return "".join(texts) or UNSET
