"""A request's messages as chat templates render them: roles, content, and the end of a message to continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from api.schema.request_values import ContentPart
from api.schema.requests import ChatMessageParam
from api.templates.chat_template import TemplateMessage
from engine import RequestRefused

# The roles of OpenAI's API.
MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool")
# Roles of earlier APIs, and the roles that replaced them.
_LEGACY_ROLES = {"function": "tool"}

# Roles whose content may be null: a message of calls alone, and the result of a function that returns nothing.
_NULLABLE_CONTENT_ROLES = ("assistant", "tool", "function")

# Marks the end of the message to continue. The trailing space is missing in the prompt if the template strips content.
_END_MARK = "\ue000paceline cuts here\ue001 "


def template_message(index: int, message: ChatMessageParam, template_source: str) -> TemplateMessage:
    """Returns the message's fields for the template, with content as a string or a list of text parts.

    `index` is the message's place in the request. Raises RequestRefused.
    """
    path = f"messages[{index}]"
    calls = _calls(message, path)
    if message.content is None and message.role not in _NULLABLE_CONTENT_ROLES:
        raise RequestRefused(f"A message of role {message.role!r} needs content.", field=f"{path}.content")
    fields: TemplateMessage = msgspec.to_builtins(message)
    fields["role"] = _template_role(message.role, template_source, path)
    for name in ("function_call", "tool_calls"):
        fields.pop(name, None)  # templates treat a message with an empty list as a message with calls
    if calls:
        fields["tool_calls"] = calls
    if isinstance(message.content, list):
        texts = part_texts(message.content, f"{path}.content")
        fields["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        fields["content"] = message.content or ""
    return fields


def _calls(message: ChatMessageParam, path: str) -> list[dict[str, Any]]:
    """Returns the message's tool calls, with OpenAI's legacy `function_call` as one. Raises RequestRefused."""
    for index, call in enumerate(message.tool_calls or ()):
        if not isinstance(call.get("function"), dict):
            raise RequestRefused(
                "A tool call needs a function: an object with a name and arguments.",
                field=f"{path}.tool_calls[{index}].function",
            )
    if message.tool_calls or message.function_call is None:
        return message.tool_calls or []
    return [{"type": "function", "function": message.function_call}]


def _template_role(role: str, template_source: str, path: str) -> str:
    """Returns the role that the template renders. Raises RequestRefused for a role that neither OpenAI's API nor the
    template names, because most templates omit messages of other roles."""
    if role in _LEGACY_ROLES:
        return _LEGACY_ROLES[role]
    if role in MESSAGE_ROLES or f"'{role}'" in template_source or f'"{role}"' in template_source:
        return role
    raise RequestRefused(
        f"There is no role {role[:32]!r}; roles are {', '.join(MESSAGE_ROLES)} and those that the chat template names.",
        field=f"{path}.role",
    )


def part_texts(parts: Sequence[ContentPart], path: str) -> list[str]:
    """Returns the texts of content parts. Raises RequestRefused for parts of another type."""
    for index, part in enumerate(parts):
        if part.type != "text":
            raise RequestRefused(
                f"Content parts of type {part.type[:32]!r} are not supported, only 'text'.",
                field=f"{path}[{index}].type",
            )
        if part.text is None:
            raise RequestRefused("A content part of type 'text' needs text.", field=f"{path}[{index}].text")
    return [part.text or "" for part in parts]


def join_parts(message: TemplateMessage) -> TemplateMessage:
    """Returns the message to continue with its parts as one text, joined by empty lines as in llama-server."""
    if not isinstance(message["content"], list):
        return message
    text = ""
    for part in message["content"]:
        text += ("\n\n" if text else "") + part["text"]
    return {**message, "content": text}


def append_end_mark(message: TemplateMessage) -> None:
    """Appends the end mark to the message's text, in place."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _END_MARK
    else:
        last = content[-1]["text"] if content else ""
        message["content"] = [*content[:-1], {"type": "text", "text": last + _END_MARK}]


def cut_at_end_mark(text: str) -> str:
    """Returns `text` up to the end mark, stripped if the template strips content. Raises RequestRefused if `text`
    has no end mark."""
    at = text.rfind(_END_MARK.rstrip())
    if at < 0:
        raise RequestRefused(
            "The chat template does not show the last message, so it cannot be continued.",
            field="continue_final_message",
        )
    return text[:at] if text.startswith(_END_MARK, at) else text[:at].rstrip()
