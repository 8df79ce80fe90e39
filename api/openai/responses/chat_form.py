"""Converts a request of the Responses API to a chat request, and the paths in errors back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from api.openai.responses.conversation import ChatConversation
from api.openai.responses.request import ResponsesRequest, TextFormat
from api.openai.responses.tools import CallableTool, CallableTools
from api.schema.request_values import NamedSchema, ResponseFormat
from api.schema.requests import ChatRequest, GenerationRequest
from engine import RequestRefused

_QUOTED_CHARS = 64


class ChatForm:
    """A request of the Responses API as a chat: `request` has the same meaning as a chat request."""

    def __init__(self, request: ResponsesRequest, conversation: ChatConversation) -> None:
        """Raises RequestRefused with the field."""
        self._tools = CallableTools(request.tools or ())
        self._conversation = conversation
        self._has_format = request.text is not None and request.text.format is not None
        self.warnings = self._tools.warnings
        shared = {name: getattr(request, name) for name in GenerationRequest.__struct_fields__}
        shared["tool_choice"] = self._tool_choice(request.tool_choice)
        shared["tools"] = [{"type": "function", "function": function} for function in self._tools.functions] or None
        shared["max_completion_tokens"] = request.output_limit
        if self._has_format:
            shared["response_format"] = _response_format(request)
        if request.reasoning is not None and request.reasoning.effort is not None:
            shared["reasoning_effort"] = request.reasoning.effort
        self.request = ChatRequest(**shared, messages=conversation.messages, logprobs=request.wants_logprobs or None)

    def _tool_choice(self, choice: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
        """Returns the `tool_choice` of the chat request, after dropping tools that it does not allow."""
        if choice is None or isinstance(choice, str):
            return choice
        match dict(choice):
            case {"type": "function" | "custom" as kind, "name": str(name)}:
                return self._tools.chat_choice(str(kind), name)
            case {"type": "function" | "custom"}:
                raise RequestRefused(
                    "tool_choice.name: the field is missing; expected the name of a tool", field="tool_choice.name"
                )
            case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(tools)}:
                self._tools.allow(tools)
                return str(mode)
            case {"type": "allowed_tools"}:
                raise RequestRefused(
                    "tool_choice: type 'allowed_tools' needs mode, 'auto' or 'required', and a list of tools.",
                    field="tool_choice.mode",
                )
        if choice.get("type") is None:
            raise RequestRefused(
                "tool_choice.type: the field is missing; expected 'function', 'custom' or 'allowed_tools'",
                field="tool_choice.type",
            )
        kind = str(choice["type"])[:_QUOTED_CHARS]
        raise RequestRefused(
            f"tool_choice.type: {kind!r} is not supported; use 'function', 'custom' or 'allowed_tools'.",
            field="tool_choice.type",
        )

    def called_tools(self) -> dict[str, CallableTool]:
        """Returns the tools that the output may call by their names in the chat."""
        return self._tools.by_chat_name()

    @contextmanager
    def paths(self) -> Iterator[None]:
        """Replaces the path in a RequestRefused, a path of the chat request, by the path in the original request."""
        try:
            yield
        except RequestRefused as error:
            if error.field and (path := self.original_path(error.field)) != error.field:
                error.args = (str(error).replace(error.field, path),)
                error.field = path
            raise

    def original_path(self, path: str) -> str:
        """Returns the path in the original request of a chat request's `path`.

        >>> form = ChatForm(ResponsesRequest(tools=[{"type": "x"}, {"type": "function"}]), ChatConversation(None))
        >>> form.original_path("tools[0].function.name"), form.original_path("messages")
        ('tools[1].name', 'input')
        """
        if found := re.match(r"messages\[(\d+)\](\.content)?", path):
            return self._conversation.paths[int(found[1])] + (found[2] or "") + path[found.end() :]
        if found := re.match(r"tools\[(\d+)\](\.function)?", path):
            return self._tools.original_path(int(found[1]), path[found.end() :])
        if self._has_format and (found := re.match(r"response_format(\.json_schema)?", path)):
            return "text.format" + path[found.end() :]
        if path in ("messages", "prompt"):
            return "input"
        return path.replace("tool_choice.function", "tool_choice")


def _response_format(request: ResponsesRequest) -> ResponseFormat:
    """Returns the `text.format` of the request in the chat's shape. Raises RequestRefused for a second constraint."""
    assert request.text is not None
    assert request.text.format is not None
    if request.response_format is not None:
        raise RequestRefused(
            "text.format and response_format exclude each other: send text.format.", field="response_format"
        )
    format: TextFormat = request.text.format
    if format.type != "json_schema":
        return ResponseFormat(format.type)
    if format.schema is None:
        raise RequestRefused("text.format.schema: the field is missing; expected an object", field="text.format.schema")
    return ResponseFormat(format.type, NamedSchema(format.schema, format.name, format.strict))
