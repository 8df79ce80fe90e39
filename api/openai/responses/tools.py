"""The tools of a Responses request as functions of a chat: functions, custom tools and namespaces of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from api.http.decode_errors import as_refusal
from api.openai.responses.reply import RequestWarning
from engine import RequestRefused

_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_CALLABLE_TYPES = ("function", "custom")
_SUPPORTED_TYPES = (*_CALLABLE_TYPES, "namespace")
_QUOTED_CHARS = 64

_ToolT = TypeVar("_ToolT", bound=Struct)

INPUT_FIELD = "input"
"""The only parameter of the function that stands for a custom tool."""


class CustomToolFormat(Struct, frozen=True):
    """The language of a custom tool's input. A regular expression is enforced, a Lark grammar only described."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(Struct, frozen=True):
    """A tool whose input is a text instead of JSON."""

    name: str
    description: str | None = None
    format: CustomToolFormat | None = None


class NamespaceTool(Struct, frozen=True):
    """Tools whose names are unique in this namespace only."""

    name: str
    tools: list[dict[str, Any]]


class CallableTool(Struct, frozen=True):
    """A tool that the model may call as the function `chat_name`."""

    type: Literal["function", "custom"]
    name: str
    namespace: str | None
    path: str
    """The path in the request."""

    @property
    def chat_name(self) -> str:
        """The name in the chat request."""
        return chat_tool_name(self.name, self.namespace)

    def answers_to(self, type: object, name: object) -> bool:
        """True if a `tool_choice` of this type and name means the tool."""
        if type == "namespace":
            return name == self.namespace
        return type == self.type and name in (self.name, self.chat_name)


class CallableTools:
    """The tools of a request that the model may call, and warnings about what the server does not honour."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises RequestRefused for a tool without a type, and for a tool of an unsupported type with `strict`.

        Other tools of unsupported types are dropped with a warning.
        """
        self.functions: list[dict[str, Any]] = []
        """The definitions for the chat request."""
        self.tools: list[CallableTool] = []
        """The tool of each function."""
        self.warnings: list[RequestWarning] = []
        self._add(tools, "tools", None)

    def _add(self, tools: Sequence[Mapping[str, Any]], path: str, namespace: str | None) -> None:
        for index, tool in enumerate(tools):
            at = f"{path}[{index}]"
            match tool.get("type"):
                case "function" | "custom" as kind:
                    function = _function(tool) if kind == "function" else self._custom_function(tool, at)
                    callable_tool = CallableTool(kind, str(function.get("name", "")), namespace, at)
                    if namespace is not None and callable_tool.name:
                        function["name"] = callable_tool.chat_name
                    self.functions.append(function)
                    self.tools.append(callable_tool)
                case "namespace" if namespace is None:
                    group = _convert_tool(tool, NamespaceTool, at)
                    self._add(group.tools, f"{at}.tools", group.name)
                case kind:
                    self._drop(kind, f"{at}.type", refuse=kind is None or bool(tool.get("strict")))

    def _drop(self, kind: object, path: str, *, refuse: bool) -> None:
        supported = ", ".join(map(repr, _SUPPORTED_TYPES))
        if kind is None:
            raise RequestRefused(f"{path}: the field is missing; expected one of {supported}", field=path)
        message = f"{path}: tools of type {str(kind)[:_QUOTED_CHARS]!r} are not supported, only {supported}."
        if refuse:
            raise RequestRefused(message, field=path)
        self.warnings.append(RequestWarning(path, f"{message} The tool was dropped."))

    def _custom_function(self, tool: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Returns the function with one text as its parameter that stands for a custom tool."""
        custom = _convert_tool(tool, CustomTool, path)
        text, notes = {"type": "string"}, [custom.description or ""]
        if (language := custom.format) is not None and language.type == "grammar":
            for name in ("syntax", "definition"):
                if getattr(language, name) is None:
                    at = f"{path}.format.{name}"
                    raise RequestRefused(f"{at}: the field is missing; a grammar needs it", field=at)
            notes.append(f"The input matches this {language.syntax} grammar:\n{language.definition}")
            if language.syntax == "regex":
                text["pattern"] = f"^(?:{language.definition})$"
            else:
                at = f"{path}.format"
                message = f"{at}: the model is shown the Lark grammar, which is not enforced."
                self.warnings.append(RequestWarning(at, message, "unenforced_grammar"))
        parameters = {
            "type": "object",
            "properties": {INPUT_FIELD: text},
            "required": [INPUT_FIELD],
            "additionalProperties": False,
        }
        notes.append(f"The argument `{INPUT_FIELD}` is the plain text.")
        return {"name": custom.name, "description": "\n".join(filter(None, notes)), "parameters": parameters}

    def allow(self, choices: Sequence[Any]) -> None:
        """Drops all tools but those that `choices` name. Raises RequestRefused for an unknown name."""
        named = [choice for choice in choices if isinstance(choice, Mapping)]
        for choice in named:
            if not any(tool.answers_to(choice.get("type"), choice.get("name")) for tool in self.tools):
                raise RequestRefused(
                    f"tool_choice.tools: no {str(choice.get('type'))[:_QUOTED_CHARS]} is named "
                    f"{str(choice.get('name'))[:_QUOTED_CHARS]!r}.",
                    field="tool_choice.tools",
                )
        kept = [
            at
            for at, tool in enumerate(self.tools)
            if any(tool.answers_to(choice.get("type"), choice.get("name")) for choice in named)
        ]
        self.functions = [self.functions[at] for at in kept]
        self.tools = [self.tools[at] for at in kept]

    def chat_choice(self, kind: str, name: str) -> dict[str, Any]:
        """Returns the `tool_choice` of the chat request for one tool, which may be unknown."""
        found = next((tool.chat_name for tool in self.tools if tool.answers_to(kind, name)), name)
        return {"type": "function", "function": {"name": found}}

    def original_path(self, index: int, path: str) -> str:
        """Returns the path in the request for the path `path` inside of function `index`."""
        tool = self.tools[index]
        if tool.type == "custom" and path.startswith(".parameters"):
            return f"{tool.path}.format.definition"
        return tool.path + path

    def by_chat_name(self) -> dict[str, CallableTool]:
        """Returns the tools by their names in the chat request."""
        return {tool.chat_name: tool for tool in self.tools}


def chat_tool_name(name: str, namespace: str | None) -> str:
    """Returns the name of a tool in the chat request."""
    return name if namespace is None else f"{namespace}.{name}"


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tool[name] for name in _FUNCTION_FIELDS if name in tool}


def _convert_tool(tool: Mapping[str, Any], kind: type[_ToolT], path: str) -> _ToolT:
    try:
        return msgspec.convert(tool, kind)
    except msgspec.ValidationError as error:
        raise as_refusal(error, kind, tool, path) from None
