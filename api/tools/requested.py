"""The tools of a chat request: which calls its answer may have, and how templates are told of tools and calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jiter
import msgspec
from msgspec import Meta, Struct

from api.http.decode_errors import nearest, refused
from api.schema.requests import ChatRequest
from api.tools.formats import Calls, Tool, described
from engine import SCHEMA_DEPTH, RequestRefused

Message = dict[str, Any]
"""A message as templates know it."""


class Function(Struct):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern=r"^[\w.:/-]{1,128}\Z")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments are valid either way."""


class ToolRequest(Struct):
    """A tool as OpenAI's API describes it."""

    function: Function
    type: str = "function"


class NamedFunction(Struct):
    """A function by its name."""

    name: str


class NamedTool(Struct):
    """The tool that must be called."""

    function: NamedFunction
    type: str = "function"


CHOICES = ("auto", "none", "required")
LIKE = 64
"""Tools among which the one is looked for that was probably meant: comparing names takes time."""


def calls_of(request: ChatRequest) -> Calls:
    """Which calls the answer may and must have. Raises RequestRefused, which names the field."""
    if request.functions or request.function_call is not None:
        raise RequestRefused(
            "functions and function_call are what tools and tool_choice were called before; send those.",
            field="functions" if request.functions else "function_call",
        )
    choice = request.tool_choice
    if choice == "none":
        return Calls(withheld=bool(request.tools))
    tools = _tools(request.tools or [])
    if isinstance(choice, Mapping):
        tools = (_chosen(choice, tools),)
    elif choice is not None and choice not in CHOICES:
        raise RequestRefused(
            f"tool_choice is {', '.join(CHOICES)} or names a function, not {str(choice)[:64]!r}.", field="tool_choice"
        )
    required = choice == "required" or isinstance(choice, Mapping)
    if required and not tools:
        raise RequestRefused("tool_choice 'required' needs tools.", field="tool_choice")
    return Calls(tools, required, request.parallel_tool_calls is not False and not isinstance(choice, Mapping))


def _tools(asked: Sequence[Any]) -> tuple[Tool, ...]:
    try:
        requests = msgspec.convert(asked, list[ToolRequest])
    except msgspec.ValidationError as error:
        raise refused(error, "tools") from None
    found: dict[str, Tool] = {}
    for index, each in enumerate(requests):
        if each.type != "function":
            raise RequestRefused(
                f"Tools of type {each.type[:32]!r} are not supported, only 'function'.", field=f"tools[{index}].type"
            )
        name = each.function.name
        if name in found:
            raise RequestRefused(f"Two tools are named {name!r}.", field=f"tools[{index}].function.name")
        parameters = each.function.parameters or {"properties": {}, "additionalProperties": False}
        if parameters.get("type", "object") != "object":
            raise RequestRefused(
                "The parameters of a function are an object: their type must be 'object'.",
                field=f"tools[{index}].function.parameters.type",
            )
        found[name] = Tool(name, closed({"type": "object", **parameters}))
    return tuple(found.values())


def closed(schema: Any, levels: int = SCHEMA_DEPTH) -> Any:
    """The schema without other properties than it names, where it names some and does not say: as with llama-server,
    since a small model finds no end of others."""
    if not isinstance(schema, Mapping) or not levels:
        return schema
    made = dict(schema)
    if "items" in made:
        made["items"] = closed(made["items"], levels - 1)
    if not {"properties", "allOf"} & made.keys():  # else what one branch names another would forbid
        for key in ("anyOf", "oneOf"):
            if isinstance(branches := made.get(key), list):
                made[key] = [closed(each, levels - 1) for each in branches]
    for key in ("$defs", "definitions"):
        if isinstance(parts := made.get(key), Mapping) and b'"allOf"' not in msgspec.json.encode(schema):
            made[key] = {name: closed(each, levels - 1) for name, each in parts.items()}
    if isinstance(properties := made.get("properties"), Mapping):
        made["properties"] = {name: closed(each, levels - 1) for name, each in properties.items()}
        required = made.get("required", [])
        if not _ELSEWHERE & made.keys() and isinstance(required, list) and set(map(str, required)) <= properties.keys():
            made.setdefault("additionalProperties", False)
    return made


_ELSEWHERE = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "unevaluatedProperties", "minProperties"}
"""Where properties may be named, or wanted, besides."""


def _chosen(choice: Mapping[str, Any], tools: Sequence[Tool]) -> Tool:
    try:
        name = msgspec.convert(choice, NamedTool).function.name
    except msgspec.ValidationError as error:
        raise refused(error, "tool_choice") from None
    for tool in tools:
        if tool.name == name:
            return tool
    hint = nearest(name, [tool.name for tool in tools[:LIKE]]) if tools else "; there are none"
    raise RequestRefused(f"No tool is named {name[:64]!r}{hint}.", field="tool_choice.function.name")


# ── for templates ──


def offered(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that a template is told of, also if none may be called, as vLLM and llama-server tell of them: earlier
    messages may have calls of them, and the prompt goes on as it began."""
    return request.tools or None


def with_objects(message: Message) -> Message:
    """The message with the arguments of its calls as objects, which most templates write as JSON by themselves."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = jiter.from_json(function["arguments"].encode() or b"{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def taught(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, system: bool) -> list[Message]:
    """The messages for a template that knows no tools: a system text describes them, or the beginning of what the user
    says first if the template knows no `system` either."""
    first, text = messages[0], described(tools)
    if first["role"] in ("system", "developer"):
        return [{**first, "content": _extended(first["content"], text)}, *messages[1:]]
    if not system and first["role"] == "user":
        return [{**first, "content": _preceded(first["content"], text)}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def as_text(message: Message) -> Message:
    """The message for a template that knows no calls: these and their results are text."""
    if calls := message.get("tool_calls"):
        texts = [_text_of(_with_object(call)["function"]) for call in calls]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**rest, "content": _extended(message["content"], "\n".join(texts))}
    if message["role"] == "tool":
        return {"role": "user", "content": _wrapped(message["content"])}
    return message


def _text_of(function: Mapping[str, Any]) -> str:
    call = {"name": function.get("name"), "arguments": function.get("arguments", {})}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _wrapped(content: Any) -> Any:
    before, after = "<tool_response>\n", "\n</tool_response>"
    if isinstance(content, str):
        return before + content + after
    return [{"type": "text", "text": before}, *content, {"type": "text", "text": after}]


def _extended(content: Any, text: str) -> Any:
    """Content with a text after it."""
    if isinstance(content, str):
        return f"{content}\n\n{text}" if content else text
    return [*content, {"type": "text", "text": text}]


def _preceded(content: Any, text: str) -> Any:
    """Content with a text before it."""
    if isinstance(content, str):
        return f"{text}\n\n{content}"
    return [{"type": "text", "text": text}, *content]
