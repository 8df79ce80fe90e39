"""Mistral: [TOOL_CALLS], name, [ARGS] and arguments for each call. Older models: [TOOL_CALLS] and a JSON list."""

from __future__ import annotations

from uuid import uuid4

from api.tools.formats.base import MessageConstraints, MessageParser, Tool
from api.tools.formats.json_calls import call_object, parse_call_object
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.tagged import TaggedFormat
from api.tools.formats.text_buffer import Parse

_MAX_NAME_CHARS = 256
_CALL, _ARGUMENTS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class Mistral(TaggedFormat):
    """[TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]g[ARGS]{...}

    The parser also accepts the notation of `MistralList`.
    """

    name = "mistral"
    template_substrings = (_ARGUMENTS,)
    triggers = (_CALL,)
    markers = (_CALL, _ARGUMENTS, _ID, "[THINK]", "[/THINK]", "<think>", "</think>")
    opens = ("[THINK]", "<think>")
    closes = "[/THINK]"
    separator = ""

    def closing(self, tag: str) -> str:
        return tag.replace("<", "</").replace("[", "[/")

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        buffer = parser.buffer
        if (yield from buffer.peek("[")):
            return (yield from self._parse_list(parser))
        name, end = yield from buffer.collect((_ID, _ARGUMENTS, "{"))
        id = ""
        if end == _ID:
            id, end = yield from buffer.collect((_ARGUMENTS, "{"))
        if end is None or not name.strip() or len(name) > _MAX_NAME_CHARS:
            return False
        if end == "{":
            buffer.mark(1)
            buffer.rewind()
        parser.begin_call(name.strip(), id.strip())
        yield from buffer.value(parser.arguments)
        return True

    def _parse_list(self, parser: MessageParser) -> Parse[bool]:
        buffer, before = parser.buffer, parser.num_calls
        yield from buffer.accept("[")
        while (yield from parse_call_object(parser)):
            if not (yield from buffer.accept(",")):
                yield from buffer.accept("]")
                break
        return parser.num_calls > before

    def call_id(self, index: int, name: str) -> str:
        return uuid4().hex[:9]  # Mistral's templates refuse ids of another length

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        return f"{lark.text(tool.name + _ARGUMENTS)} {lark.json(tool.parameters)}"


class MistralList(Mistral):
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], of models up to 2024.

    The grammar is written by hand, because one trigger precedes the list of all calls.
    """

    name = "mistral-list"
    template_substrings = (_CALL,)

    def grammar(self, lark: LarkBuilder, constraints: MessageConstraints) -> None:
        body = ""
        if tools := self.bodies(lark, constraints.calls):
            call_list = lark.call_list(tools, ", ", constraints.calls.parallel)
            body = lark.rule("list", f'/ ?/ "[" {call_list} "]"')
        self.message(lark, constraints, [body] if body else [], parallel=False)

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        return call_object(lark, tool, index)
