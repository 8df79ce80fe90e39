"""Converts a request of Anthropic's Messages API to a chat request, and the paths in errors back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from api.anthropic.client_tools import client_tool_definition
from api.anthropic.conversation import message_params, named_tools
from api.anthropic.messages_schema import MessagesRequest, OutputFormat, ToolChoiceParam, ToolParam
from api.schema.request_values import NamedSchema, ResponseFormat
from api.schema.requests import ChatRequest, GenerationRequest
from engine import RequestRefused

# New tokens of a request without `max_tokens`, as in llama-server. Anthropic's API refuses such a request.
_DEFAULT_MAX_TOKENS = 4096

_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_QUOTED_CHARS = 64

# Fields of chat completions for which this API has a field of its own, or whose effect its replies cannot show.
_CHAT_FIELDS = (
    *("parallel_tool_calls", "functions", "function_call", "documents", "chat_template"),
    *("reasoning_format", "reasoning_effort", "enable_thinking"),
    *("reasoning_budget", "reasoning_budget_tokens", "thinking_budget_tokens"),
    "reasoning_budget_message",
    *("add_generation_prompt", "continue_final_message", "top_logprobs", "n_probs", "post_sampling_probs"),
    *("timings_per_token", "return_progress"),
)

# Fields of Anthropic's API that a reply of this server cannot honour, with the remedies.
_UNSUPPORTED_FIELDS = {
    "mcp_servers": "this server calls no MCP servers; let the client call them and send tools",
    "container": "this server runs no containers; leave the field out",
    "compaction": "this server summarizes no conversations; ask for a summary in a message",
    "thread": "this server holds no conversations; leave the field out and send all messages",
    "token_origins": "events of a message have no origins of tokens; use /v1/chat/completions",
}

# Patterns of paths in chat requests, with the paths of the same values in requests of this API.
_PATHS = (
    (re.compile(r"tools\[(\d+)\]\.function\.parameters"), r"tools[\1].input_schema"),
    (re.compile(r"tools\[(\d+)\]\.function"), r"tools[\1]"),
    (re.compile(r"tool_choice\.function"), "tool_choice"),
    (re.compile(r"response_format\.json_schema"), "output_config.format"),
    (re.compile(r"messages\b.*|prompt$", re.DOTALL), "messages"),
)


class MessageForm:
    """A request of the Messages API as a chat: `request` has the same meaning as a chat request."""

    def __init__(self, request: MessagesRequest) -> None:
        """Raises RequestRefused with the field.

        Without `thinking` the server's and the template's defaults decide on reasoning, as in chat completions.
        """
        _refuse_foreign_fields(request)
        self._positions = _offered_positions(request)
        fields = {name: getattr(request, name) for name in GenerationRequest.__struct_fields__}
        if request.token_limit is None:
            fields["max_tokens"] = _DEFAULT_MAX_TOKENS
        if request.user is None and isinstance(user := (request.metadata or {}).get("user_id"), str):
            fields["user"] = user
        if request.stop_sequences:
            fields["stop"] = [*request.stop_strings, *request.stop_sequences]
        if (output_format := _output_format(request)) is not None:
            fields["response_format"] = ResponseFormat("json_schema", NamedSchema(output_format.schema))
        fields |= _tool_fields(request.tools or (), self._positions, request.tool_choice) | _reasoning_fields(request)
        self.request = ChatRequest(**fields | {"messages": message_params(request.system, request.messages)})

    def original_path(self, path: str) -> str:
        """Returns the path in the original request of a chat request's `path`."""
        if found := re.match(r"tools\[(\d+)\]", path):
            path = f"tools[{self._positions[int(found[1])]}]{path[found.end() :]}"
        for pattern, replacement in _PATHS:
            if found := pattern.match(path):
                return found.expand(replacement) + path[found.end() :]
        return path

    @contextmanager
    def paths(self) -> Iterator[None]:
        """Replaces the path in a RequestRefused, a path of the chat request, by the path in the original request."""
        try:
            yield
        except RequestRefused as error:
            path, message = error.field or "", str(error)
            if path:
                error.field = self.original_path(path)
                if message.startswith(path):
                    error.args = (error.field + message.removeprefix(path),)
            raise


def _offered_positions(request: MessagesRequest) -> list[int]:
    """Returns the positions of the tools that the model is shown: all but those whose loading is deferred."""
    tools = request.tools or ()
    if not any(tool.defer_loading for tool in tools):
        return [*range(len(tools))]
    loaded = named_tools(request.messages) | {request.tool_choice.name if request.tool_choice else None}
    return [position for position, tool in enumerate(tools) if not tool.defer_loading or tool.name in loaded]


def _refuse_foreign_fields(request: MessagesRequest) -> None:
    for name in _CHAT_FIELDS:
        if getattr(request, name) is not None:
            raise RequestRefused(
                f"{name}: a message has no such field; leave the field out or use /v1/chat/completions.", field=name
            )
    if request.n not in (None, 1):
        raise RequestRefused(f"n: a message has one choice, not {request.n}; leave the field out.", field="n")
    for name, remedy in _UNSUPPORTED_FIELDS.items():
        if getattr(request, name):
            raise RequestRefused(f"{name}: {remedy}.", field=name)


def _output_format(request: MessagesRequest) -> OutputFormat | None:
    configured = request.output_config.format if request.output_config else None
    if configured is not None and request.output_format is not None:
        raise RequestRefused(
            "output_format and output_config.format exclude each other: send the latter.", field="output_format"
        )
    return configured or request.output_format


def _reasoning_fields(request: MessagesRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {"reasoning_effort": request.output_config.effort if request.output_config else None}
    if (thinking := request.thinking) is not None:
        fields["enable_thinking"] = thinking.type != "disabled"
        fields["reasoning_budget"] = thinking.budget_tokens if thinking.type == "enabled" else None
        if thinking.type == "disabled":
            fields["reasoning_budget"] = 0
    return fields


def _tool_fields(
    tools: Sequence[ToolParam], positions: Sequence[int], choice: ToolChoiceParam | None
) -> dict[str, Any]:
    """Returns the fields `tools`, those at `positions`, `tool_choice` and `parallel_tool_calls` of a chat request."""
    chat_tools = [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    fields: dict[str, Any] = {"tools": [chat_tools[position] for position in positions]}
    if choice is None:
        return fields
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    if choice.type in ("any", "tool") and not tools:
        raise RequestRefused(f"tool_choice: type {choice.type!r} needs tools.", field="tool_choice")
    if choice.type != "tool":
        fields["tool_choice"] = _TOOL_CHOICES[choice.type]
    elif choice.name is None:
        raise RequestRefused(
            "tool_choice.name: the field is missing; expected the name of a tool", field="tool_choice.name"
        )
    else:
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    return fields


def _chat_tool(tool: ToolParam, path: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        if defined := client_tool_definition(tool.type):
            return {"type": "function", "function": {"name": tool.name, **defined}}
        raise RequestRefused(
            f"Tools of type {tool.type[:_QUOTED_CHARS]!r} are not supported, only 'custom' tools, which the client "
            "runs and describes by an input_schema, and Anthropic's bash, text_editor and memory tools.",
            field=f"{path}.type",
        )
    if tool.input_schema is None:
        raise RequestRefused(
            f"{path}.input_schema: the field is missing; expected an object", field=f"{path}.input_schema"
        )
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}
