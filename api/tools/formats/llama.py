"""Llama 3: a JSON object, bare or after <|python_tag|>. Llama 4: a list of calls as Python writes them."""

from __future__ import annotations

import ast
import re
from abc import abstractmethod
from typing import ClassVar

from api.tools.formats.base import Parser, Rules, Tagged, Tool
from api.tools.formats.lark import ANY, Lark, literal
from api.tools.formats.objects import object_body, read_object
from api.tools.formats.source import Reading, Source
from api.tools.formats.values import properties, unwritable, with_definitions, written


class Bare(Tagged):
    """A format in which a call may also stand at the very beginning, without a trigger."""

    bare: ClassVar[str]
    """What a bare call begins with."""

    def first(self, parser: Parser) -> Reading[None]:
        source = parser.source
        if not parser.calls.tools or not (yield from source.sees(self.bare)):
            return
        source.mark()
        if (yield from self.call(parser, "")):
            source.forget()
            return
        source.rewind()
        parser.content(source.skip(len(source.rest) - len(source.rest.lstrip()) + len(self.bare)))

    @abstractmethod
    def calls(self, lark: Lark, rules: Rules) -> str:
        """All calls of a message."""

    def grammar(self, lark: Lark, rules: Rules) -> None:
        if not rules.calls.tools:
            self.silent(lark, rules)
            return
        calls, thought = lark.rule("calls", self.calls(lark, rules)), self.thought(rules)
        if rules.calls.required or rules.answer is not None:
            rest = lark.rule("rest", calls if rules.calls.required else f"{calls} | {rules.answer}")
            lark.start(thought, rest, rest)
            return
        thought = self.thought(rules, always=True)
        rest, plain = self._answer(lark, "rest", calls), self._answer(lark, "plain", calls, lark.opening(thought))
        lark.start(thought, rest, plain)

    def _answer(self, lark: Lark, name: str, calls: str, unless: str = "") -> str:
        """A rule of calls, or of text that does not begin like them or like `unless`, perhaps with calls in it."""
        text = rf"\s*([^{literal(self.bare)}\s]{ANY})?"  # the reader takes a call for one after white space too
        head = lark.before(f"{name}_head", self.trigger, text, unless)
        return lark.rule(name, f"{calls} | {lark.free(name, text, unless)} | {head} {calls}")


class Llama(Bare):
    """{"name": ..., "parameters": {...}}, several with semicolons between them."""

    name = "llama"
    signs = ("<|python_tag|>", '"parameters": dictionary of argument name')
    triggers = ("<|python_tag|>",)
    markers = ("<|python_tag|>", "<think>", "</think>")
    bare = "{"
    joint = "; "

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        if not (yield from read_object(parser, known=not trigger)):
            return False
        while (yield from parser.source.takes(";")):
            if not (yield from read_object(parser)):
                break
        return True

    def calls(self, lark: Lark, rules: Rules) -> str:
        return lark.several(self.bodies(lark, rules.calls), "; ", rules.calls.parallel)

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        return object_body(lark, tool, index, "parameters")


class Pythonic(Bare):
    """[f(a="b"), g()]; each call is told once it is complete."""

    name = "pythonic"
    signs = ("<|header_start|>",)
    triggers = ("<|python_start|>",)
    markers = ("<|python_start|>", "<|python_end|>", "<think>", "</think>")
    bare = "["

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        source, begun = parser.source, parser.begun
        if not (yield from source.takes("[")):
            return False
        while True:
            name, end = yield from source.collect(("(", "]"))
            name = name.strip().lstrip(",").strip()
            if end == "]":
                yield from source.takes("<|python_end|>")
                return parser.begun > begun
            if end is None or name not in parser.calls:
                return parser.begun > begun
            arguments = yield from _arguments(source)
            if arguments is None:
                return parser.begun > begun
            parser.begin(name)
            parser.arguments(arguments)

    def calls(self, lark: Lark, rules: Rules) -> str:
        return f'"[" {lark.several(self.bodies(lark, rules.calls), ", ", rules.calls.parallel)} "]"'

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        members = []
        for key, schema, required in properties(tool.parameters, tool.name):
            if re.search(r"[\s=(),]", key):
                raise unwritable(tool.name, key)
            value = lark.json(with_definitions(schema, tool.parameters))
            members.append((f"{lark.text(f'{key}=')} {value}", required))
        return f"{lark.text(f'{tool.name}(')} {lark.members(f'm{index}', members, ', ')} {lark.text(')')}"


class _Literals(ast.NodeTransformer):
    """JSON's names of what Python calls otherwise."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


def _arguments(source: Source) -> Reading[str | None]:
    """Reads `a="b", c=1)`; its JSON, or None if that is no list of named literals. Names may be any, also Python's."""
    values: dict[str, object] = {}
    while not (yield from source.takes(")")):
        key, sign = yield from source.collect(("=", ")"))
        parts: list[str] = []
        if sign != "=" or not (yield from source.value(parts.append, "\"'")):
            return None
        try:
            values[key.strip()] = ast.literal_eval(_Literals().visit(ast.parse("".join(parts), mode="eval")))
        except _UNREADABLE:
            return None
        yield from source.takes(",")
    try:
        return written(values)
    except _UNREADABLE:
        return None


_UNREADABLE = ValueError, TypeError, SyntaxError, MemoryError, RecursionError
