"""gpt-oss: Harmony, a turn of several messages, each with a channel, some of them calls."""

from __future__ import annotations

import re

from api.tools.formats.base import Format, Parser, Rules, Tool
from api.tools.formats.lark import Lark
from api.tools.formats.source import Reading, Tell

_START, _MESSAGE = "<|start|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")


class Harmony(Format):
    """<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>"""

    name = "harmony"
    signs = ("<|channel|>",)
    markers = (_START, _MESSAGE, *_ENDS, "<|channel|>", "<|constrain|>")
    opens = ()
    closes = ""

    def thinks(self, template: str) -> bool:
        return True  # and messages have to be told from their headers anyway

    def read(self, parser: Parser) -> Reading[None]:
        source = parser.source
        while True:
            source.mark()
            head, end = yield from source.collect((_MESSAGE,))
            if end is None and "<|" not in head and not head.lstrip().startswith("to="):
                source.rewind()  # a text without any messages
                parser.content(source.skip(len(source.rest)))
            source.forget()
            if end is None:
                return
            if not (yield from self._message(parser, head.rpartition(_START)[2])):
                return
            yield from source.takes(_START)

    def _message(self, parser: Parser, head: str) -> Reading[bool]:
        """Reads a message after its header. False at the end of the text."""
        recipient = (_RECIPIENT.findall(head) or [""])[-1]
        channel = (_CHANNEL.findall(head) or ["final"])[-1]
        if recipient.startswith("functions.") and parser.calls.tools:
            parser.begin(recipient.removeprefix("functions."))
            yield from parser.source.value(parser.arguments)
            return (yield from self._body(parser, _ignored))
        if recipient not in ("", "assistant", "all"):
            return (yield from self._body(parser, _ignored))
        if channel != "analysis":
            return (yield from self._body(parser, parser.content))
        parser.tag(f"{head}{_MESSAGE}")
        more = yield from self._body(parser, parser.reasoning)
        parser.tag("<|end|>")
        parser.thought()
        return more

    def _body(self, parser: Parser, tell: Tell) -> Reading[bool]:
        """Tells a message up to its end, which only the next message or nothing follows."""
        source = parser.source
        while (end := (yield from source.until(_ENDS, tell))) is not None:
            while not source.rest and not source.ended:
                yield
            if not source.rest or (yield from source.sees(_START)) is not None:
                return True
            tell(end)
        return False

    def grammar(self, lark: Lark, rules: Rules) -> None:
        said, next_ = lark.before("said", "<|end|>"), lark.text("<|start|>assistant")
        thought = lark.rule("thought", f"{lark.text('<|channel|>analysis<|message|>')} {said} {next_}")
        preamble = lark.rule("preamble", f"{lark.text('<|channel|>commentary<|message|>')} {said} {next_}")
        final = lark.rule("final", f"{lark.text('<|channel|>final<|message|>')} {rules.answer or 'TEXT'}")
        calls = [self._call(lark, tool) for tool in rules.calls.tools]
        if rules.calls.required:
            lark.rule("start", f"{thought}* {lark.any_of(calls)}")
        else:
            lark.rule("start", f"({thought} | {preamble})* {lark.any_of([final, *calls])}")

    def _call(self, lark: Lark, tool: Tool) -> str:
        head = f"<|channel|>commentary to=functions.{tool.name} <|constrain|>json<|message|>"
        other = f" to=functions.{tool.name}<|channel|>commentary <|constrain|>json<|message|>"
        return f"({lark.text(head)} | {lark.text(other)}) {lark.json(tool.parameters)}"


def _ignored(text: str) -> None:
    """For what nobody is to see."""
