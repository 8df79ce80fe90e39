"""Qwen3-Coder and Qwen3.5: functions and parameters in tags, with values as bare text."""

from __future__ import annotations

from api.tools.formats.arguments import ArgumentWriter, collect_value, parameter_rules
from api.tools.formats.base import MessageConstraints, MessageParser, Tool
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.tagged import TaggedFormat
from api.tools.formats.text_buffer import Parse

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_LINE = "\n"
# The end markers of a value with their followers (see `collect_value`). Models sometimes omit </parameter>.
_VALUE_ENDS: dict[str, tuple[str, ...]] = {
    _PARAMETER_END: (_PARAMETER, _FUNCTION_END, _CALL_END),
    f"{_LINE}{_PARAMETER}": (),
    f"{_LINE}{_FUNCTION_END}": (_CALL_END,),
}


class QwenXml(TaggedFormat):
    """<tool_call><function=f><parameter=p>value</parameter></function></tool_call>, where <tool_call> may be absent.

    The grammar is written by hand, because calls may also start with <function= or inside of reasoning.
    """

    name = "qwen-xml"
    template_substrings = (_FUNCTION,)
    triggers = (_CALL, _FUNCTION)
    interrupts = (f"{_CALL}{_LINE}{_FUNCTION}",)
    markers = (_CALL, _CALL_END, "<think>", "</think>")

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        buffer = parser.buffer
        if trigger == _CALL and not (yield from buffer.accept(_FUNCTION)):
            return False
        name, end = yield from buffer.collect((">",))
        if end is None or not name.strip():
            return False
        writer = ArgumentWriter(parser, name.strip())
        while (marker := (yield from buffer.accept(_PARAMETER, _FUNCTION_END, _CALL_END))) == _PARAMETER:
            key, end = yield from buffer.collect((">",))
            if end is None:
                return True
            value = yield from collect_value(buffer, _PARAMETER_END, _VALUE_ENDS)
            if value is None:
                return True
            writer.text(key.strip(), value.removeprefix(_LINE).removesuffix(_LINE))
        if marker is None:
            return writer.begun
        writer.close()
        if marker == _FUNCTION_END:
            yield from buffer.accept(_CALL_END)
        return True

    def grammar(self, lark: LarkBuilder, constraints: MessageConstraints) -> None:
        tagged = self.bodies(lark, constraints.calls)
        inner = lark.any_of([f"call_{index}" for index in range(len(tagged))])
        others, interrupts = [(_FUNCTION, inner)], [(self.interrupts[0], inner)]
        parallel = constraints.calls.parallel
        self.message(lark, constraints, tagged, parallel=parallel, others=others, interrupts=interrupts)

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        close = f"{_LINE}{_PARAMETER_END}{_LINE}"
        rules = parameter_rules(lark, tool, index, lambda key, _: f"{_PARAMETER}{key}>{_LINE}", close, ">")
        call = lark.rule(f"call_{index}", f"{lark.text(f'{tool.name}>{_LINE}')} {rules} {lark.text(_FUNCTION_END)}")
        return f"{lark.text(f'{_LINE}{_FUNCTION}')} {call} {lark.text(f'{_LINE}{_CALL_END}')}"
