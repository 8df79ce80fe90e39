"""Mistral: [TOOL_CALLS], then a JSON list of calls, or a name, [ARGS] and arguments; a newer tag for each call."""

from __future__ import annotations

from uuid import uuid4

from api.formats.base import Calls, Parser, Tagged, Tool
from api.formats.lark import Lark, Thought
from api.formats.objects import object_body, read_object
from api.formats.source import Reading


class Mistral(Tagged):
    """[TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]g[ARGS]{...}"""

    name = "mistral"
    signs = ("[ARGS]",)
    triggers = ("[TOOL_CALLS]",)
    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "<think>", "</think>")
    opens = ("[THINK]", "<think>")
    joint = ""

    def think(self, parser: Parser) -> Reading[None]:
        source = parser.source
        tag = (yield from source.takes(*self.opens)) if not parser.opened else "[THINK]"
        if tag is None:
            return
        if not parser.opened:
            parser.tag(tag)
        end = yield from source.until((_CLOSES[tag],), parser.reasoning)
        if end is not None:
            parser.tag(end)
        parser.thought()

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

    def grammar(self, lark: Lark, calls: Calls, *, opened: bool) -> None:
        bodies = [lark.rule(f"tool_{index}", self.body(lark, tool, index)) for index, tool in enumerate(calls.tools)]
        thought = Thought(("[THINK]",), "[/THINK]", opened)
        lark.message("[TOOL_CALLS]", bodies, thought, calls.required, calls.parallel, "")

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        return f"{lark.text(tool.name + '[ARGS]')} {lark.json(tool.parameters)}"


_CLOSES = {"[THINK]": "[/THINK]", "<think>": "</think>"}


class MistralList(Mistral):
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], up to 2024."""

    name = "mistral-list"
    signs = ("[TOOL_CALLS]",)

    def grammar(self, lark: Lark, calls: Calls, *, opened: bool) -> None:
        tools = [lark.rule(f"tool_{index}", self.body(lark, tool, index)) for index, tool in enumerate(calls.tools)]
        one = lark.rule("one", lark.any_of(tools))
        more = f'(", " {one})*' if calls.parallel else ""
        body = lark.rule("list", f'/ ?/ "[" {one} {more} "]"')
        lark.message("[TOOL_CALLS]", [body], Thought((), "", False), calls.required, False, "")

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        return object_body(lark, tool)
