"""The tool calls that a chat request allows, from its `tools`, `tool_choice` and `parallel_tool_calls`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from api.http.decode_errors import as_refusal, nearest_hint
from api.schema.requests import ChatRequest
from api.tools.formats import AllowedCalls, Tool
from engine import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH, RequestRefused

_TOOL_CHOICES = ("auto", "none", "required")
_ALLOWED_TOOLS = "allowed_tools"
# Values of the legacy `function_call` that name no function.
_NO_FUNCTION_CALL = (None, "auto", "none")
# Maximum tools whose names are compared for the hint about an unknown name, because comparing takes time.
_MAX_COMPARED_TOOLS = 64
# Maximum bytes of all schemas with their descriptions, which no grammar contains.
_MAX_SCHEMA_BYTES = 4 * MAX_GRAMMAR_BYTES


class FunctionDefinition(Struct):
    """A function as OpenAI's API describes it."""

    name: Annotated[str, Meta(pattern=r"^[\w.:/-]{1,128}\Z")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """True refuses a keyword of the schema that cannot be enforced. The others are enforced with and without it."""


class ToolDefinition(Struct):
    """A tool as OpenAI's API describes it."""

    function: FunctionDefinition
    type: str = "function"


class NamedFunction(Struct):
    """The `function` of a `tool_choice`."""

    name: str


class NamedToolChoice(Struct):
    """A `tool_choice` that names the tool to call."""

    function: NamedFunction
    type: str = "function"


class AllowedToolChoices(Struct):
    """The `allowed_tools` of a `tool_choice`: some of the tools, of which the answer may or must call any."""

    tools: list[NamedToolChoice]
    mode: Literal["auto", "required"] = "auto"


class AllowedToolsChoice(Struct):
    """A `tool_choice` that names several tools."""

    allowed_tools: AllowedToolChoices


def allowed_calls(request: ChatRequest) -> AllowedCalls:
    """Returns the calls that the answer may or must contain. Raises RequestRefused with the field."""
    if request.functions or request.function_call not in _NO_FUNCTION_CALL:
        return _function_calls(request)
    choice = request.tool_choice
    if choice is None and request.function_call == "none":
        choice = "none"
    if choice == "none":
        return AllowedCalls(withheld=bool(request.tools))
    tools, parallel = _tools(request.tools or []), request.parallel_tool_calls is not False
    if isinstance(choice, Mapping):
        if choice.get("type") == _ALLOWED_TOOLS:
            return _allowed_tools(choice, tools, parallel)
        return AllowedCalls((_named_tool(choice, tools),), required=True, parallel=False)
    if choice is not None and choice not in _TOOL_CHOICES:
        raise RequestRefused(
            f"tool_choice must be one of {', '.join(_TOOL_CHOICES)}, or name a function, not {str(choice)[:64]!r}.",
            field="tool_choice",
        )
    if choice == "required" and not tools:
        raise RequestRefused(
            "tool_choice 'required' needs tools: send tools, or tool_choice 'auto'.", field="tool_choice"
        )
    return AllowedCalls(tools, choice == "required", parallel)


def _function_calls(request: ChatRequest) -> AllowedCalls:
    """Returns the calls of OpenAI's fields from before tools: at most one. Raises RequestRefused with the field."""
    if not request.functions or request.tools or request.tool_choice is not None:
        reason = "belongs to functions" if not request.functions else "and functions exclude tools and tool_choice"
        raise RequestRefused(f"function_call {reason}: send tools and tool_choice instead.", field="function_call")
    try:
        decoded = msgspec.convert(request.functions, list[FunctionDefinition])
    except msgspec.ValidationError as error:
        raise as_refusal(error, list[FunctionDefinition], request.functions, "functions") from None
    tools = _distinct_tools({f"functions[{index}]": each for index, each in enumerate(decoded)})
    choice = request.function_call
    if choice == "none":
        return AllowedCalls(withheld=True)
    if choice in _NO_FUNCTION_CALL:
        return AllowedCalls(tools, parallel=False)
    try:
        name = msgspec.convert(choice, NamedFunction).name
    except msgspec.ValidationError:
        raise RequestRefused(
            "function_call must be 'auto', 'none' or an object with the name of a function.", field="function_call"
        ) from None
    return AllowedCalls((_tool_named(name, tools, "function_call.name"),), required=True, parallel=False)


def _tools(definitions: Sequence[Any]) -> tuple[Tool, ...]:
    for index, definition in enumerate(definitions):
        _check_type(definition, f"tools[{index}].type")
    try:
        decoded = msgspec.convert(definitions, list[ToolDefinition])
    except msgspec.ValidationError as error:
        raise as_refusal(error, list[ToolDefinition], definitions, "tools") from None
    return _distinct_tools({f"tools[{index}].function": each.function for index, each in enumerate(decoded)})


def _distinct_tools(definitions: Mapping[str, FunctionDefinition]) -> tuple[Tool, ...]:
    """Returns the tools of functions by their paths. Raises RequestRefused for a name that occurs twice."""
    tools: dict[str, Tool] = {}
    size = 0
    for path, function in definitions.items():
        name = function.name
        if name in tools:
            raise RequestRefused(f"Two tools are named {name!r}; each needs a name of its own.", field=f"{path}.name")
        parameters = function.parameters or {"properties": {}, "additionalProperties": False}
        if parameters.get("type") not in (None, "object"):
            raise RequestRefused(
                "The type of a function's parameters must be 'object'.", field=f"{path}.parameters.type"
            )
        size += len(msgspec.json.encode(parameters))
        if size > _MAX_SCHEMA_BYTES:
            raise RequestRefused(
                f"tools: the schemas have more than {_MAX_SCHEMA_BYTES} bytes together; send fewer.", field="tools"
            )
        schema = closed_schema({**parameters, "type": "object"})
        tools[name] = Tool(name, schema, strict=function.strict is True, path=f"{path}.parameters")
    return tuple(tools.values())


def _check_type(value: Mapping[str, Any], field: str, *others: str) -> None:
    """Raises RequestRefused for a tool that is not a function, such as one that OpenAI's servers run."""
    kind = value.get("type")
    if isinstance(kind, str) and kind not in ("function", *others):
        supported = " or ".join(map(repr, ("function", *others)))
        raise RequestRefused(f"Tools of type {kind[:32]!r} are not supported, only {supported}.", field=field)


# Keywords that permit or require properties besides those in `properties`.
_EXTRA_PROPERTY_KEYWORDS = {
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
    "patternProperties",
    "unevaluatedProperties",
    "minProperties",
    "if",
    "dependentSchemas",
    "dependencies",
}


def closed_schema(schema: Any, levels: int = MAX_SCHEMA_DEPTH) -> Any:
    """Returns the schema with `additionalProperties: false` in each part that lists properties without that keyword.

    Parts nested deeper than `levels` are unchanged. llama-server closes schemas too: small models otherwise add
    properties without end.
    """
    if not isinstance(schema, Mapping) or not levels:
        return schema
    closed = dict(schema)
    if "items" in closed:
        closed["items"] = closed_schema(closed["items"], levels - 1)
    if not {"properties", "allOf"} & closed.keys():  # a closed branch would forbid the properties of the others
        for key in ("anyOf", "oneOf"):
            if isinstance(branches := closed.get(key), list):
                closed[key] = [closed_schema(each, levels - 1) for each in branches]
    for key in ("$defs", "definitions"):
        if isinstance(parts := closed.get(key), Mapping) and b'"allOf"' not in msgspec.json.encode(schema):
            closed[key] = {name: closed_schema(each, levels - 1) for name, each in parts.items()}
    if isinstance(properties := closed.get("properties"), Mapping):
        closed["properties"] = {name: closed_schema(each, levels - 1) for name, each in properties.items()}
        required = closed.get("required", [])
        listed = isinstance(required, list) and set(map(str, required)) <= properties.keys()
        if listed and not _EXTRA_PROPERTY_KEYWORDS & closed.keys():
            closed.setdefault("additionalProperties", False)
    return closed


def _allowed_tools(choice: Mapping[str, Any], tools: Sequence[Tool], parallel: bool) -> AllowedCalls:
    try:
        allowed = msgspec.convert(choice, AllowedToolsChoice).allowed_tools
    except msgspec.ValidationError as error:
        raise as_refusal(error, AllowedToolsChoice, choice, "tool_choice") from None
    path = "tool_choice.allowed_tools.tools"
    if not allowed.tools:
        raise RequestRefused(f"{path}: the list is empty; name a tool, or use tool_choice 'none'.", field=path)
    names = [each.function.name for each in allowed.tools]
    found = {name: _tool_named(name, tools, f"{path}[{index}].function.name") for index, name in enumerate(names)}
    return AllowedCalls(tuple(found.values()), allowed.mode == "required", parallel)


def _named_tool(choice: Mapping[str, Any], tools: Sequence[Tool]) -> Tool:
    _check_type(choice, "tool_choice.type", _ALLOWED_TOOLS)
    try:
        name = msgspec.convert(choice, NamedToolChoice).function.name
    except msgspec.ValidationError as error:
        raise as_refusal(error, NamedToolChoice, choice, "tool_choice") from None
    return _tool_named(name, tools, "tool_choice.function.name")


def _tool_named(name: str, tools: Sequence[Tool], field: str) -> Tool:
    for tool in tools:
        if tool.name == name:
            return tool
    hint = (
        nearest_hint(name, [tool.name for tool in tools[:_MAX_COMPARED_TOOLS]])
        if tools
        else "; the request has no tools"
    )
    raise RequestRefused(f"No tool is named {name[:64]!r}{hint}.", field=field)
