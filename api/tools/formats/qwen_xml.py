"""Qwen3-Coder and Qwen3.5: functions and parameters in tags, values as bare text."""

from __future__ import annotations

from api.tools.formats.base import Parser, Rules, Tagged, Tool
from api.tools.formats.lark import Lark
from api.tools.formats.parameters import Members, parameter_rules
from api.tools.formats.source import Reading

_LINE = "\n"
_AFTER: dict[str, tuple[str, ...]] = {
    "</parameter>": ("<parameter=", "</function>", "</tool_call>"),
    "\n<parameter=": (),
    "\n</function>": ("</tool_call>",),
}
"""What may end a value, with what must follow for it to do so."""


class QwenXml(Tagged):
    """<tool_call><function=f><parameter=p>value</parameter></function></tool_call>, the first tag often missing."""

    name = "qwen-xml"
    signs = ("<function=",)
    triggers = ("<tool_call>", "<function=")
    interrupts = ("<tool_call>\n<function=",)
    markers = ("<tool_call>", "</tool_call>", "<think>", "</think>")

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        source = parser.source
        if trigger == "<tool_call>" and not (yield from source.takes("<function=")):
            return False
        name, end = yield from source.collect((">",))
        if end is None or not name.strip():
            return False
        members = Members(parser, name.strip())
        while (sign := (yield from source.takes("<parameter=", "</function>", "</tool_call>"))) == "<parameter=":
            key, end = yield from source.collect((">",))
            if end is None:
                return True
            value = yield from self._value(parser)
            if value is None:
                return True
            members.text(key.strip(), value.removeprefix("\n").removesuffix("\n"))
        if sign is None:
            return members.begun
        members.close()
        if sign == "</function>":
            yield from source.takes("</tool_call>")
        return True

    def _value(self, parser: Parser) -> Reading[str | None]:
        """A value, which may speak of tags: one ends it only before what may follow. None if it has no end."""
        source, parts = parser.source, list[str]()
        while True:
            end = yield from source.until(tuple(_AFTER), parts.append)
            if end is None:
                return None
            after = _AFTER[end]
            source.mark(len(end))
            if not after or (yield from source.sees(*after)) is not None:
                if end == "</parameter>":
                    source.drop()
                else:  # that one is missing
                    source.rewind()
                return "".join(parts)
            source.rewind()
            parts.append(source.skip(len(end)))

    def grammar(self, lark: Lark, rules: Rules) -> None:
        tagged = self.bodies(lark, rules.calls)
        inner = lark.any_of([f"call_{index}" for index in range(len(tagged))])
        others, interrupts = [("<function=", inner)], [(self.interrupts[0], inner)]
        parallel = rules.calls.parallel
        self.message(lark, rules, tagged, parallel=parallel, others=others, interrupts=interrupts)

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        rules = parameter_rules(lark, tool, index, lambda key, _: f"<parameter={key}>\n", "\n</parameter>\n", ">")
        call = lark.rule(f"call_{index}", f"{lark.text(f'{tool.name}>{_LINE}')} {rules} {lark.text('</function>')}")
        return f"{lark.text(f'{_LINE}<function=')} {call} {lark.text(f'{_LINE}</tool_call>')}"
