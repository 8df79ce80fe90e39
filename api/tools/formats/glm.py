"""GLM 4.5 and later: a name, then keys and values in tags, values as bare text."""

from __future__ import annotations

from api.tools.formats.base import Parser, Tagged, Tool
from api.tools.formats.lark import Lark
from api.tools.formats.parameters import Members, parameter_rules
from api.tools.formats.source import Reading


class Glm(Tagged):
    """<tool_call>f<arg_key>p</arg_key><arg_value>value</arg_value></tool_call>, with line breaks in 4.5."""

    name = "glm"
    signs = ("<arg_key>",)
    triggers = ("<tool_call>",)
    markers = (
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "<think>",
        "</think>",
    )

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        source = parser.source
        name, sign = yield from source.collect(("<arg_key>", "</tool_call>"))
        if sign is None or not name.strip():
            return False
        members = Members(parser, name.strip())
        while sign == "<arg_key>":
            key, end = yield from source.collect(("</arg_key>",))
            if end is None or not (yield from source.takes("<arg_value>")):
                return members.begun
            value = yield from self._value(parser)
            if value is None:
                return True
            members.text(key.strip(), value)
            sign = yield from source.takes("<arg_key>", "</tool_call>")
        if sign is None:
            return members.begun
        members.close()
        return True

    def _value(self, parser: Parser) -> Reading[str | None]:
        """A value; a tag ends it only before what may follow. None if it has no end."""
        source, parts = parser.source, list[str]()
        while (end := (yield from source.until(("</arg_value>", "</tool_call>"), parts.append))) is not None:
            source.mark(len(end))
            if end == "</arg_value>" and (yield from source.sees("<arg_key>", "</tool_call>")) is not None:
                source.drop()
                return "".join(parts)
            if end == "</tool_call>" and (yield from self._last(parser)):  # the value's own end is missing
                source.rewind()
                return "".join(parts)
            source.rewind()
            parts.append(source.skip(len(end)))
        return None

    def _last(self, parser: Parser) -> Reading[bool]:
        """Whether nothing follows but other calls."""
        while not parser.source.rest.strip():
            if parser.source.ended:
                return True
            yield
        return (yield from parser.source.sees("<tool_call>")) is not None

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        rules = parameter_rules(
            lark, tool, index, lambda key, _: f"\n<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>"
        )
        return f"{lark.text(tool.name)} {rules} {lark.text(chr(10) + '</tool_call>')}"
