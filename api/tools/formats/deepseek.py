"""DeepSeek V3 and R1: a name, and the arguments in a code block. V3.1: a name and bare JSON arguments."""

from __future__ import annotations

from api.tools.formats.base import MessageParser, Tool
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.tagged import TaggedFormat
from api.tools.formats.text_buffer import Parse

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_BLOCK, _BLOCK_END = "\n```json", "```"


class DeepSeek(TaggedFormat):
    """<｜tool▁call▁begin｜>f<｜tool▁sep｜>{...}<｜tool▁call▁end｜>, with all calls in one section.

    The parser accepts this variant and `DeepSeekBlock`, each of which has a grammar of its own.
    """

    name = "deepseek"
    template_substrings = (_CALL,)
    triggers = (_BEGIN,)
    section_end = _END
    markers = (_BEGIN, _END, _CALL, _SEP, _CALL_END, "<think>", "</think>")
    separator = ""

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        buffer, before = parser.buffer, parser.num_calls
        while (marker := (yield from buffer.accept(_CALL, _END))) == _CALL:
            name, end = yield from buffer.collect((_SEP,))
            if end is None:
                break
            if not (yield from buffer.peek("{")):  # the block variant, in which a type precedes the name
                name, end = yield from buffer.collect((_BLOCK,))
                if end is None:
                    break
            parser.begin_call(name.strip())
            if not (yield from buffer.value(parser.arguments)):
                break
            yield from buffer.accept(_BLOCK_END)
            if not (yield from buffer.accept(_CALL_END)):
                break
        return marker == _END or parser.num_calls > before

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        return f"{lark.text(_CALL + tool.name + _SEP)} {lark.json(tool.parameters)} {lark.text(_CALL_END)}"


class DeepSeekBlock(DeepSeek):
    """The variant of V3 and R1: the type `function`, the name, and the arguments in a code block."""

    name = "deepseek-block"

    def matches(self, template: str) -> bool:
        return super().matches(template) and "```json" in template

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        head, foot = f"{_CALL}function{_SEP}{tool.name}{_BLOCK}\n", f"\n{_BLOCK_END}{_CALL_END}"
        return f"{lark.text(head)} {lark.json(tool.parameters)} {lark.text(foot)}"
