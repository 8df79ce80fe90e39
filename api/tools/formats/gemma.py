"""Gemma 4 and FunctionGemma: objects like JSON, with bare keys and a token as the quote of strings."""

from __future__ import annotations

from typing import ClassVar

from api.tools.formats.base import MessageParser, Tool
from api.tools.formats.gemma_grammar import GemmaGrammar
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.tagged import TaggedFormat
from api.tools.formats.text_buffer import Parse
from api.tools.formats.values import json_or_string, json_string


class Gemma(TaggedFormat):
    """<|tool_call>call:f{p:<|"|>text<|"|>,q:[1,2]}<tool_call|>"""

    name = "gemma"
    template_substrings = ("<|tool_call>",)
    triggers = ("<|tool_call>",)
    end = "<tool_call|>"
    quote = '<|"|>'
    markers: ClassVar[tuple[str, ...]] = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")
    opens: ClassVar[tuple[str, ...]] = ("<|channel>thought",)
    closes = "<channel|>"
    separator = ""

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        buffer = parser.buffer
        if not (yield from buffer.accept("call:")):
            return False
        name, marker = yield from buffer.collect(("{", self.end))
        if marker != "{" or not name.strip():
            return False
        parser.begin_call(name.strip())
        if (yield from self._parse_object(parser)):
            yield from buffer.accept(self.end)
        return True

    def _parse_object(self, parser: MessageParser) -> Parse[bool]:
        """Parses an object after its bracket and emits the object as JSON. Returns False if the text ends first."""
        buffer, before = parser.buffer, "{"
        while not (yield from buffer.accept("}")):
            key, end = yield from buffer.collect((":",))
            if end is None:
                return False
            key = key.strip().removeprefix(self.quote).removesuffix(self.quote)
            parser.arguments(f"{before}{json_string(key)}: ")
            if not (yield from self._parse_value(parser)):
                return False
            yield from buffer.accept(",")
            before = ", "
        parser.arguments("{}" if before == "{" else "}")
        return True

    def _parse_array(self, parser: MessageParser) -> Parse[bool]:
        buffer, before = parser.buffer, "["
        while not (yield from buffer.accept("]")):
            parser.arguments(before)
            if not (yield from self._parse_value(parser)):
                return False
            yield from buffer.accept(",")
            before = ", "
        parser.arguments("[]" if before == "[" else "]")
        return True

    def _parse_value(self, parser: MessageParser) -> Parse[bool]:
        buffer = parser.buffer
        marker = yield from buffer.accept(self.quote, "{", "[")
        if marker == "{":
            return (yield from self._parse_object(parser))
        if marker == "[":
            return (yield from self._parse_array(parser))
        if marker == self.quote:
            text, end = yield from buffer.collect((self.quote,))
            if end is not None:
                parser.arguments(json_string(text))
            return end is not None
        parts: list[str] = []
        if not (yield from buffer.value(parts.append)) or not (text := "".join(parts)):
            return False
        parser.arguments(json_or_string(text))
        return True

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        grammar = GemmaGrammar(lark, self.quote, tool.name, tool.parameters, f"n{index}")
        return f"{lark.text(f'call:{tool.name}')} {grammar.object(tool.parameters)} {lark.text(self.end)}"


class FunctionGemma(Gemma):
    """<start_function_call>call:f{p:<escape>text<escape>}<end_function_call>"""

    name = "function-gemma"
    template_substrings = ("<start_function_call>",)
    triggers = ("<start_function_call>",)
    end = "<end_function_call>"
    quote = "<escape>"
    markers = ("<start_function_call>", "<end_function_call>", "<escape>")
    opens = ()
    closes = ""
