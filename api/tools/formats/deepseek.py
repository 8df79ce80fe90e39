"""DeepSeek V3 and R1: a name, and arguments in a code block; V3.1: without the block."""

from __future__ import annotations

from api.tools.formats.base import Parser, Rules, Tagged, Tool
from api.tools.formats.lark import Lark
from api.tools.formats.source import Reading

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALLED = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeek(Tagged):
    """<｜tool▁call▁begin｜>f<｜tool▁sep｜>{...}<｜tool▁call▁end｜>, all calls in a section."""

    name = "deepseek"
    signs = (_CALL,)
    triggers = (_BEGIN,)
    markers = (_BEGIN, _END, _CALL, _SEP, _CALLED, "<think>", "</think>")
    joint = ""

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        source, begun = parser.source, parser.begun
        while (sign := (yield from source.takes(_CALL, _END))) == _CALL:
            name, end = yield from source.collect((_SEP,))
            if end is None:
                break
            if not (yield from source.sees("{")):  # the name was a type
                name, end = yield from source.collect(("\n```json",))
                if end is None:
                    break
            parser.begin(name.strip())
            if not (yield from source.value(parser.arguments)):
                break
            yield from source.takes("```")
            if not (yield from source.takes(_CALLED)):
                break
        return sign == _END or parser.begun > begun

    def grammar(self, lark: Lark, rules: Rules) -> None:
        self.section(lark, rules, _END)

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        return f"{lark.text(_CALL + tool.name + _SEP)} {lark.json(tool.parameters)} {lark.text(_CALLED)}"


class DeepSeekBlock(DeepSeek):
    """The older one, with `function` as the type and the arguments in a block of code."""

    name = "deepseek-block"

    def fits(self, template: str) -> bool:
        return super().fits(template) and "```json" in template

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        head, foot = f"{_CALL}function{_SEP}{tool.name}\n```json\n", f"\n```{_CALLED}"
        return f"{lark.text(head)} {lark.json(tool.parameters)} {lark.text(foot)}"
