"""Gemma 4 and FunctionGemma: objects like JSON, with bare keys and strings between quotes of their own."""

from __future__ import annotations

import json
from typing import ClassVar

from api.tools.formats.base import Parser, Tagged, Tool
from api.tools.formats.lark import Lark
from api.tools.formats.notation import Notation
from api.tools.formats.source import Reading
from api.tools.formats.values import raw_json


class Gemma(Tagged):
    """<|tool_call>call:f{p:<|"|>text<|"|>,q:[1,2]}<tool_call|>"""

    name = "gemma"
    signs = ("<|tool_call>",)
    triggers = ("<|tool_call>",)
    end = "<tool_call|>"
    quote = '<|"|>'
    markers: ClassVar[tuple[str, ...]] = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")
    opens: ClassVar[tuple[str, ...]] = ("<|channel>thought",)
    closes = "<channel|>"
    joint = ""

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        source = parser.source
        if not (yield from source.takes("call:")):
            return False
        name, sign = yield from source.collect(("{", self.end))
        if sign != "{" or not name.strip():
            return False
        parser.begin(name.strip())
        if (yield from self._object(parser)):
            yield from source.takes(self.end)
        return True

    def _object(self, parser: Parser) -> Reading[bool]:
        """Tells an object, of which the bracket is read. False if it has no end."""
        source, before = parser.source, "{"
        while not (yield from source.takes("}")):
            key, end = yield from source.collect((":",))
            if end is None:
                return False
            key = key.strip().removeprefix(self.quote).removesuffix(self.quote)
            parser.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            if not (yield from self._value(parser)):
                return False
            yield from source.takes(",")
            before = ", "
        parser.arguments("{}" if before == "{" else "}")
        return True

    def _array(self, parser: Parser) -> Reading[bool]:
        source, before = parser.source, "["
        while not (yield from source.takes("]")):
            parser.arguments(before)
            if not (yield from self._value(parser)):
                return False
            yield from source.takes(",")
            before = ", "
        parser.arguments("[]" if before == "[" else "]")
        return True

    def _value(self, parser: Parser) -> Reading[bool]:
        source = parser.source
        sign = yield from source.takes(self.quote, "{", "[")
        if sign == "{":
            return (yield from self._object(parser))
        if sign == "[":
            return (yield from self._array(parser))
        if sign == self.quote:
            text, end = yield from source.collect((self.quote,))
            if end is not None:
                parser.arguments(json.dumps(text, ensure_ascii=False))
            return end is not None
        parts: list[str] = []
        if not (yield from source.value(parts.append)) or not (text := "".join(parts)):
            return False
        parser.arguments(raw_json(text))
        return True

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        notation = Notation(lark, self.quote, tool.name, tool.parameters, f"n{index}")
        return f"{lark.text(f'call:{tool.name}')} {notation.object(tool.parameters)} {lark.text(self.end)}"


class FunctionGemma(Gemma):
    """<start_function_call>call:f{p:<escape>text<escape>}<end_function_call>"""

    name = "function-gemma"
    signs = ("<start_function_call>",)
    triggers = ("<start_function_call>",)
    end = "<end_function_call>"
    quote = "<escape>"
    markers = ("<start_function_call>", "<end_function_call>", "<escape>")
    opens = ()
    closes = ""
