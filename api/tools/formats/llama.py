"""Llama 3: a JSON object, bare or after <|python_tag|>. Llama 4: a list of calls in Python's notation."""

from __future__ import annotations

import ast
import re
from abc import abstractmethod
from typing import ClassVar

from api.tools.formats.base import MessageConstraints, MessageParser, Tool
from api.tools.formats.json_calls import call_object, parse_call_object
from api.tools.formats.lark_builder import ANY_TEXT, LarkBuilder, literal
from api.tools.formats.tagged import TaggedFormat
from api.tools.formats.text_buffer import Parse, TextBuffer
from api.tools.formats.values import properties, to_json, unsupported_name, with_definitions


class _BareFormat(TaggedFormat):
    """A format whose calls may also start the answer without a trigger.

    The grammar is written by hand, because one optional trigger starts all calls.
    """

    bracket: ClassVar[str]
    """The first character of a call without a trigger."""

    def parse_answer_start(self, parser: MessageParser) -> Parse[None]:
        buffer = parser.buffer
        if not parser.calls.tools or not (yield from buffer.peek(self.bracket)):
            return
        buffer.mark()
        if (yield from self.parse_call(parser, "")):
            buffer.clear_marks()
            return
        buffer.rewind()
        parser.content(buffer.advance(len(buffer.rest) - len(buffer.rest.lstrip()) + len(self.bracket)))

    @abstractmethod
    def calls(self, lark: LarkBuilder, constraints: MessageConstraints) -> str:
        """Returns the Lark expression of all calls of a message."""

    def grammar(self, lark: LarkBuilder, constraints: MessageConstraints) -> None:
        if not constraints.calls.tools:
            self.message_without_calls(lark, constraints)
            return
        calls, reasoning = lark.rule("calls", self.calls(lark, constraints)), self.reasoning_tags(constraints)
        if constraints.calls.required or constraints.answer is not None:
            rest = lark.rule("rest", calls if constraints.calls.required else f"{calls} | {constraints.answer}")
            lark.root_rule(reasoning, rest, rest)
            return
        reasoning = self.reasoning_tags(constraints, always=True)
        rest = self._free_answer(lark, "rest", calls)
        lark.root_rule(reasoning, rest, self._free_answer(lark, "plain", calls, lark.opening_pattern(reasoning)))

    def _free_answer(self, lark: LarkBuilder, name: str, calls: str, unless: str = "") -> str:
        """Adds a rule of calls, or of text with optional calls. The text starts neither with `bracket` nor with a match
        of `unless`."""
        text = rf"\s*([^{literal(self.bracket)}\s]{ANY_TEXT})?"  # the parser accepts a call after white space too
        head = lark.text_until(f"{name}_head", self.trigger, text, unless)
        return lark.rule(name, f"{calls} | {lark.free_text(name, text, unless)} | {head} {calls}")


class Llama(_BareFormat):
    """{"name": ..., "parameters": {...}}, several calls separated by semicolons."""

    name = "llama"
    template_substrings = ("<|python_tag|>", '"parameters": dictionary of argument name')
    triggers = ("<|python_tag|>",)
    markers = ("<|python_tag|>", "<think>", "</think>")
    bracket = "{"
    separator = "; "

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        if not (yield from parse_call_object(parser, known_only=not trigger)):
            return False
        while (yield from parser.buffer.accept(";")):
            if not (yield from parse_call_object(parser)):
                break
        return True

    def calls(self, lark: LarkBuilder, constraints: MessageConstraints) -> str:
        return lark.call_list(self.bodies(lark, constraints.calls), self.separator, constraints.calls.parallel)

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        return call_object(lark, tool, index, "parameters")


class Pythonic(_BareFormat):
    """[f(a="b"), g()]. A call is emitted when the text of the call is complete.

    A template of Llama 4 that renders no tools, such as the built-in one, has the format `Generic`.
    """

    name = "pythonic"
    template_substrings = ("<|header_start|>",)
    triggers = ("<|python_start|>",)
    markers = ("<|python_start|>", "<|python_end|>", "<think>", "</think>")
    bracket = "["
    separator = ", "

    def matches(self, template: str) -> bool:
        return super().matches(template) and "tools" in template

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        buffer, before = parser.buffer, parser.num_calls
        if not (yield from buffer.accept("[")):
            return False
        while True:
            name, end = yield from buffer.collect(("(", "]"))
            name = name.strip().lstrip(",").strip()
            if end == "]":
                yield from buffer.accept("<|python_end|>")
                return parser.num_calls > before
            if end is None or name not in parser.calls:
                return parser.num_calls > before
            arguments = yield from _parse_arguments(buffer)
            if arguments is None:
                return parser.num_calls > before
            parser.begin_call(name)
            parser.arguments(arguments)

    def calls(self, lark: LarkBuilder, constraints: MessageConstraints) -> str:
        call_list = lark.call_list(self.bodies(lark, constraints.calls), self.separator, constraints.calls.parallel)
        return f'"[" {call_list} "]"'

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        members = []
        for key, schema, required in properties(tool.parameters, tool.name):
            if re.search(r"[\s=(),]", key):
                raise unsupported_name(tool.name, key)
            value = lark.json(with_definitions(schema, tool.parameters))
            members.append((f"{lark.text(f'{key}=')} {value}", required))
        return f"{lark.text(f'{tool.name}(')} {lark.members(f'm{index}', members, ', ')} {lark.text(')')}"


class _JsonConstants(ast.NodeTransformer):
    """Replaces the names `true`, `false` and `null`, which models mix into Python literals."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


_LITERAL_ERRORS = ValueError, TypeError, SyntaxError, MemoryError, RecursionError


def _parse_arguments(buffer: TextBuffer) -> Parse[str | None]:
    """Parses `a="b", c=1)` and returns the arguments as JSON. Returns None if a value is not a literal. Keys may be any
    text, Python keywords included."""
    values: dict[str, object] = {}
    while not (yield from buffer.accept(")")):
        key, sign = yield from buffer.collect(("=", ")"))
        parts: list[str] = []
        if sign != "=" or not (yield from buffer.value(parts.append, "\"'")):
            return None
        try:
            values[key.strip()] = ast.literal_eval(_JsonConstants().visit(ast.parse("".join(parts), mode="eval")))
        except _LITERAL_ERRORS:
            return None
        yield from buffer.accept(",")
    try:
        return to_json(values)
    except _LITERAL_ERRORS:
        return None
