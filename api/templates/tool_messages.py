"""Tools and tool calls in the messages that chat templates render, for templates with and without tool support."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jiter

from api.templates.chat_template import TemplateMessage
from api.tools.formats import tool_instructions


def with_argument_objects(message: TemplateMessage) -> TemplateMessage:
    """Returns the message with call arguments decoded to objects. Most templates encode them as JSON themselves."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_with_argument_object(call) for call in calls]}


def _with_argument_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = jiter.from_json(function["arguments"].encode() or b"{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def with_tool_instructions(
    messages: Sequence[TemplateMessage], tools: Sequence[Mapping[str, Any]], *, has_system_role: bool
) -> list[TemplateMessage]:
    """Returns the messages with a description of `tools`, for a template without tools.

    The description is appended to the system message. If the conversation has none, the description becomes a new
    system message, or is prepended to a first user message if the template has no system role.
    """
    first, text = messages[0], tool_instructions(tools)
    if first["role"] in ("system", "developer"):
        return [{**first, "content": _append(first["content"], text)}, *messages[1:]]
    if not has_system_role and first["role"] == "user":
        return [{**first, "content": _prepend(first["content"], text)}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def calls_as_text(message: TemplateMessage) -> TemplateMessage:
    """Returns the message for a template without tool calls: calls as content, a tool's result as a user message."""
    if calls := message.get("tool_calls"):
        texts = [_call_text(_with_argument_object(call)["function"]) for call in calls]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**rest, "content": _append(message["content"], "\n".join(texts))}
    if message["role"] == "tool":
        return {"role": "user", "content": _tool_response(message["content"])}
    return message


def _call_text(function: Mapping[str, Any]) -> str:
    call = {"name": function.get("name"), "arguments": function.get("arguments", {})}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _tool_response(content: Any) -> Any:
    before, after = "<tool_response>\n", "\n</tool_response>"
    if isinstance(content, str):
        return before + content + after
    return [{"type": "text", "text": before}, *content, {"type": "text", "text": after}]


def _append(content: Any, text: str) -> Any:
    if isinstance(content, str):
        return f"{content}\n\n{text}" if content else text
    return [*content, {"type": "text", "text": text}]


def _prepend(content: Any, text: str) -> Any:
    if isinstance(content, str):
        return f"{text}\n\n{content}"
    return [{"type": "text", "text": text}, *content]
