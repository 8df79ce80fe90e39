"""Llama 3: a JSON object, bare or after <|python_tag|>. Llama 4: a list of calls as Python writes them."""

from __future__ import annotations

import ast

from api.formats.base import Parser, Rules, Tagged, Tool
from api.formats.lark import Lark
from api.formats.objects import object_body, read_object
from api.formats.source import Reading
from api.formats.values import properties, with_definitions, written


class Bare(Tagged):
    """A format in which a call may also stand at the very beginning, without a trigger."""

    bare: str
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

    def grammar(self, lark: Lark, rules: Rules) -> None:
        if not rules.calls.tools:
            self.message(lark, rules, [], parallel=False)
            return
        call = lark.rule("call", lark.any_of(self.bodies(lark, rules.calls)))
        calls = f'{call} ("; " {call})*' if rules.calls.parallel else call
        if rules.calls.required:
            lark.rule("start", calls)
        elif rules.answer is not None:
            lark.rule("start", f"{calls} | {rules.answer}")
        else:
            text = r"\s*([^{\s](.|\n)*)?"  # the reader takes a call for one after white space too
            tag = lark.before("head", "<|python_tag|>", text)
            lark.rule("start", f"/{text}/ | {calls} | {tag} {calls}")

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
            source.mark(1)
            source.rewind()
            parts: list[str] = []
            if not (yield from source.value(parts.append, "\"'")):
                return parser.begun > begun
            arguments = _arguments("".join(parts))
            if arguments is None:
                return parser.begun > begun
            parser.begin(name)
            parser.arguments(arguments)

    def grammar(self, lark: Lark, rules: Rules) -> None:
        if not rules.calls.tools:
            self.message(lark, rules, [], parallel=False)
            return
        call = lark.rule("call", lark.any_of(self.bodies(lark, rules.calls)))
        more = f'(", " {call})*' if rules.calls.parallel else ""
        calls = f'"[" {call} {more} "]"'
        answer = r"/\s*([^\[\s](.|\n)*)?/" if rules.answer is None else rules.answer
        lark.rule("start", calls if rules.calls.required else f"{calls} | {answer}")

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        members = []
        for key, schema, required in properties(tool.parameters, tool.name):
            value = lark.json(with_definitions(schema, tool.parameters))
            members.append((f"{lark.text(f'{key}=')} {value}", required))
        return f"{lark.text(f'{tool.name}(')} {lark.members(f'm{index}', members, ', ')} {lark.text(')')}"


class _Literals(ast.NodeTransformer):
    """JSON's names of what Python calls otherwise."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


def _arguments(text: str) -> str | None:
    """The JSON of `(a="b", c=1)`; None if that is no list of named literals."""
    try:
        call = _Literals().visit(ast.parse(f"f{text}", mode="eval")).body
        assert isinstance(call, ast.Call), "a name and brackets are a call"
        if call.args or any(each.arg is None for each in call.keywords):
            return None
        values = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        return written(values)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
