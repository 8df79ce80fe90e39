"""Calls that are a JSON object with the keys for name and arguments in any order."""

from __future__ import annotations

import json

import jiter

from api.tools.formats.base import AllowedCalls, MessageParser, Tool
from api.tools.formats.lark_builder import WHITE_SPACE, LarkBuilder, UntaggedCalls, literal
from api.tools.formats.text_buffer import Parse, TextBuffer

# The keys of the arguments; models write either of them.
ARGUMENT_KEYS = ("arguments", "parameters")
# Starts of Markdown code fences in which small models write calls.
FENCE_STARTS = ("```json\n", "```\n")

# Regular expressions of the texts that `parse_untagged_calls` requires before and after a tool's name.
_BEFORE_NAME = WHITE_SPACE + WHITE_SPACE.join((r"[\[,]?", r"\{", r"\{?", '"name"', ":", '"'))
_AFTER_NAME = '"' + WHITE_SPACE + WHITE_SPACE.join((",", f'"({"|".join(ARGUMENT_KEYS)})"', ":"))
# White space inside of an untagged call, bounded because small models repeat white space without end.
_GAP = r"\s{0,8}"


def parse_call_object(parser: MessageParser, *, known_only: bool = False) -> Parse[bool]:
    """Parses and emits the object of one call. Returns False if the text is not a call.

    With `known_only`, an object with the name of an unknown tool is not a call.
    """
    return (yield from _CallObject(parser, known_only).parse())


def parse_untagged_calls(parser: MessageParser) -> Parse[bool]:
    """Parses and emits calls without tags, one after the other or in a list. Returns False if there is no call."""
    buffer, before = parser.buffer, parser.num_calls
    buffer.mark()
    listed = yield from buffer.accept("[")
    while (yield from _parse_untagged_call(parser)):
        buffer.mark()
        yield from buffer.accept(",")
    buffer.rewind()
    if listed and parser.num_calls > before:
        yield from buffer.accept("]")
    return parser.num_calls > before


def _parse_untagged_call(parser: MessageParser) -> Parse[bool]:
    """Parses one call. Returns False if the text does not start with a known tool's name and arguments: other JSON is
    content."""
    buffer, name = parser.buffer, ""
    names = tuple(f'"{tool.name}"' for tool in parser.calls.tools)
    keys = tuple(f'"{key}"' for key in ARGUMENT_KEYS)
    braces = yield from _accept_braces(buffer)
    if not braces:
        return False
    for options in (('"name"',), (":",), names, (",",), keys, (":",)):
        marker = yield from buffer.accept(*options)
        if marker is None:
            return False
        name = marker[1:-1] if options is names else name
    if not (yield from buffer.peek("{")):
        return False
    parser.begin_call(name)
    if (yield from buffer.value(parser.arguments)):
        for _ in range(braces):
            yield from buffer.accept("}")
    return True


def _accept_braces(buffer: TextBuffer) -> Parse[int]:
    """Moves behind the braces that open a call and returns their number, at most 2.

    The template of Qwen2.5-Coder shows a call as {{"name": ..., "arguments": ...}}, and the model copies the braces.
    """
    count = 0
    while count < 2 and (yield from buffer.accept("{")):
        count += 1
    return count


class _CallObject:
    """Parser of one call's object. Arguments before the name are held back until the name is complete."""

    def __init__(self, parser: MessageParser, known_only: bool) -> None:
        self._parser, self._known_only = parser, known_only
        self._name: str | None = None
        self._held_arguments: str | None = None
        self._has_arguments = False

    def parse(self) -> Parse[bool]:
        buffer = self._parser.buffer
        braces = yield from _accept_braces(buffer)
        if not braces:
            return False
        while True:
            marker = yield from buffer.accept("}", ",", '"')
            if marker == '"':
                if not (yield from self._parse_member()):
                    return self._name is not None
            elif marker == "}":
                if braces > 1:
                    yield from buffer.accept("}")
                return self._end()
            elif marker is None:
                return self._name is not None

    def _parse_member(self) -> Parse[bool]:
        """Parses a member after the first quote of its key. Returns False for malformed or incomplete text."""
        buffer = self._parser.buffer
        key, end = yield from buffer.collect(('"',))
        if end is None or not (yield from buffer.accept(":")):
            return False
        if key in ARGUMENT_KEYS and self._name is not None and (yield from buffer.peek("{")):
            self._has_arguments = True
            return (yield from buffer.value(self._parser.arguments))
        parts: list[str] = []
        if not (yield from buffer.value(parts.append)):
            return False
        text = "".join(parts)
        if key == "name" and self._name is None:
            return self._begin(text)
        if key in ARGUMENT_KEYS:
            self._held_arguments = _unwrapped(text)
            self._flush()
        return True

    def _begin(self, text: str) -> bool:
        name = _json_value(text)
        if not isinstance(name, str) or not name or (self._known_only and name not in self._parser.calls):
            return False
        self._name = name
        self._parser.begin_call(name)
        self._flush()
        return True

    def _flush(self) -> None:
        if self._name is not None and self._held_arguments is not None and not self._has_arguments:
            self._has_arguments = True
            self._parser.arguments(self._held_arguments)

    def _end(self) -> bool:
        if self._name is None:
            return False
        self._held_arguments = self._held_arguments or "{}"
        self._flush()
        return True


def _json_value(text: str) -> object:
    """Returns the decoded JSON. Returns None for malformed JSON."""
    try:
        return jiter.from_json(text.encode(), allow_inf_nan=False)
    except ValueError:
        return None


def _unwrapped(text: str) -> str:
    """Returns the JSON of the arguments, decoded first if the model wrote the object as a JSON string."""
    value = _json_value(text)
    return value if isinstance(value, str) and isinstance(_json_value(value), dict) else text


def call_object(lark: LarkBuilder, tool: Tool, index: int, arguments_key: str = "arguments") -> str:
    """Returns the Lark expression of a call's object."""
    head = lark.text(f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": ')
    return f'{head} {_arguments_rule(lark, tool, index)} "}}"'


def untagged_calls(lark: LarkBuilder, calls: AllowedCalls) -> UntaggedCalls:
    """Returns the patterns of calls without tags, with any white space in the JSON."""
    gap, end = lark.rule("GAP", f"/{_GAP}/"), _untagged_end(lark)
    rules = []
    for index, tool in enumerate(calls.tools):
        name = lark.rule(f"NAME_{index}", f"/{literal(tool.name)}{_AFTER_NAME}/")
        rules.append(f"{name} {gap} {_arguments_rule(lark, tool, index)} {end}")
    names, fences = ("|".join(map(literal, texts)) for texts in ([tool.name for tool in calls.tools], FENCE_STARTS))
    return UntaggedCalls(_BEFORE_NAME, f"({fences})", f"({names}){_AFTER_NAME}", rules)


def bare_calls(lark: LarkBuilder, calls: AllowedCalls, separator: str) -> str:
    """Returns the Lark expression of all calls of a message without tags, bare or in a code fence."""
    objects, end = [], _untagged_end(lark)
    for index, tool in enumerate(calls.tools):
        parts = (r"\{\{?", '"name"', ":", f'"{literal(tool.name)}"', ",", '"arguments"', ":", "")
        head = lark.rule(f"BARE_{index}", f"/{_GAP.join(parts)}/")
        objects.append(f"{head} {_arguments_rule(lark, tool, index)} {end}")
    bare = lark.rule("bare", lark.call_list(objects, separator, calls.parallel))
    fence, fence_end = lark.rule("FENCE", r"/```(json)?\n/"), lark.rule("FENCE_END", r"/\s{0,4}```/")
    return f"{bare} | {fence} {bare} {fence_end}"


def _untagged_end(lark: LarkBuilder) -> str:
    return lark.rule("UNTAGGED_END", f"/{_GAP}\\}}\\}}?/")


def _arguments_rule(lark: LarkBuilder, tool: Tool, index: int) -> str:
    """Returns the rule of a tool's arguments, shared by all notations of the call."""
    return lark.json_rule(f"arguments_{index}", tool.parameters)
