"""Mistral: [TOOL_CALLS], then a JSON list of calls, or a name, [ARGS] and arguments; a newer tag for each call."""

from __future__ import annotations

from uuid import uuid4

from api.tools.formats.base import Parser, Rules, Tagged, Tool
from api.tools.formats.lark import Lark
from api.tools.formats.objects import object_body, read_object
from api.tools.formats.source import Reading


class Mistral(Tagged):
    """[TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]g[ARGS]{...}"""

    name = "mistral"
    signs = ("[ARGS]",)
    triggers = ("[TOOL_CALLS]",)
    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "<think>", "</think>")
    opens = ("[THINK]", "<think>")
    closes = "[/THINK]"
    joint = ""

    def think(self, parser: Parser) -> Reading[None]:
        source = parser.source
        tag = (yield from source.takes(*self.opens)) if not parser.opened else "[THINK]"
        if tag is None:
            return
        if not parser.opened:
            parser.tag(tag)
        end = yield from source.until((self.closing(tag),), parser.reasoning)
        if end is not None:
            parser.tag(end)
        parser.thought()

    def closing(self, tag: str) -> str:
        return tag.replace("<", "</").replace("[", "[/")

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        source = parser.source
        if (yield from source.sees("[")):
            return (yield from self._list(parser))
        name, end = yield from source.collect(("[CALL_ID]", "[ARGS]", "{"))
        id = ""
        if end == "[CALL_ID]":
            id, end = yield from source.collect(("[ARGS]", "{"))
        if end is None or not name.strip() or len(name) > 256:
            return False
        if end == "{":
            source.mark(1)
            source.rewind()
        parser.begin(name.strip(), id.strip())
        yield from source.value(parser.arguments)
        return True

    def _list(self, parser: Parser) -> Reading[bool]:
        source, begun = parser.source, parser.begun
        yield from source.takes("[")
        while (yield from read_object(parser)):
            if not (yield from source.takes(",")):
                yield from source.takes("]")
                break
        return parser.begun > begun

    def identify(self, index: int, name: str) -> str:
        return uuid4().hex[:9]  # the template refuses others

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        return f"{lark.text(tool.name + '[ARGS]')} {lark.json(tool.parameters)}"


class MistralList(Mistral):
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], up to 2024."""

    name = "mistral-list"
    signs = ("[TOOL_CALLS]",)

    def grammar(self, lark: Lark, rules: Rules) -> None:
        body = ""
        if tools := self.bodies(lark, rules.calls):
            several = lark.several(tools, ", ", rules.calls.parallel)
            body = lark.rule("list", f'/ ?/ "[" {several} "]"')
        self.message(lark, rules, [body] if body else [], parallel=False)

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        return object_body(lark, tool, index)
