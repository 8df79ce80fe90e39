"""Chat formats whose calls start with a trigger: one message parser and one message grammar for all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from api.tools.formats.base import AllowedCalls, ChatFormat, MessageConstraints, MessageParser, Tool
from api.tools.formats.lark_builder import CallPattern, LarkBuilder, ReasoningTags, UntaggedCalls
from api.tools.formats.text_buffer import Parse


class TaggedFormat(ChatFormat):
    """A format in which each call, or the section of all calls, starts with one of `triggers` anywhere in the text."""

    triggers: ClassVar[tuple[str, ...]]
    interrupts: ClassVar[tuple[str, ...]] = ()
    """Triggers that also close reasoning."""
    fences: ClassVar[tuple[str, ...]] = ()
    """Triggers that are content if no call follows. Other triggers are dropped if the text ends without a call."""
    separator: ClassVar[str] = "\n"
    """The text between two calls."""
    section_end: ClassVar[str] = ""
    """The marker after the last call if the trigger starts a section of calls; empty if the trigger starts one call."""

    @abstractmethod
    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        """Parses the text after a trigger. Returns False, with nothing emitted, if the text is not a call."""

    @abstractmethod
    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        """Returns the Lark expression of a call of `tool` after the trigger. `index` numbers the tools."""

    @property
    def trigger(self) -> str:
        """The trigger that grammars permit."""
        return self.triggers[0]

    def closing(self, tag: str) -> str:
        """Returns the tag that closes reasoning after the opening tag `tag`."""
        return self.closes

    # ── parser ──

    def parse(self, parser: MessageParser) -> Parse[None]:
        yield from self.parse_reasoning(parser)
        yield from self.parse_answer_start(parser)
        buffer, triggers = parser.buffer, self.triggers if parser.calls.tools else ()
        while (trigger := (yield from buffer.until(triggers, parser.content, texts=self.fences))) is not None:
            buffer.mark(len(trigger))
            if (yield from self.parse_call(parser, trigger)):
                buffer.clear_marks()
            elif buffer.ended and trigger not in self.fences:
                return  # the text ended inside of the call's header
            else:
                buffer.rewind()
                parser.content(buffer.advance(len(trigger)))

    def parse_answer_start(self, parser: MessageParser) -> Parse[None]:
        """Parses calls without a trigger at the start of the answer, in formats that permit such calls."""
        yield from ()

    def parse_reasoning(self, parser: MessageParser) -> Parse[None]:
        """Parses the reasoning if the text starts with reasoning."""
        if not self.opens:
            return
        buffer = parser.buffer
        tag = self.opens[0] if parser.in_reasoning else (yield from buffer.accept(*self.opens))
        if tag is None:
            return
        if not parser.in_reasoning:
            parser.reasoning_tag(tag)
        closing = self.closing(tag)
        end = yield from buffer.until((closing, *(self.interrupts if parser.calls.tools else ())), parser.reasoning)
        if end == closing:
            parser.reasoning_tag(end)
        elif end is not None:
            buffer.mark(len(end))
            buffer.rewind()
        parser.end_reasoning()

    # ── grammar ──

    def grammar(self, lark: LarkBuilder, constraints: MessageConstraints) -> None:
        bodies, calls = self.bodies(lark, constraints.calls), constraints.calls
        if self.section_end:
            if bodies:
                call_list = lark.call_list(bodies, "", calls.parallel)
                bodies = [lark.rule("section", f"{call_list} {lark.text(self.section_end)}")]
            self.message(lark, constraints, bodies, parallel=False)
            return
        # Untagged calls matter only where free text is permitted.
        only_calls = calls.required or constraints.answer
        untagged = None if only_calls else self.untagged(lark, calls)
        bare = self.bare(lark, calls) if only_calls and bodies else ""
        self.message(lark, constraints, bodies, parallel=calls.parallel, untagged=untagged, bare=bare)

    def message(
        self,
        lark: LarkBuilder,
        constraints: MessageConstraints,
        bodies: Sequence[str],
        *,
        parallel: bool,
        untagged: UntaggedCalls | None = None,
        others: Sequence[tuple[str, str]] = (),
        interrupts: Sequence[tuple[str, str]] = (),
        bare: str = "",
    ) -> None:
        """Adds the rules of a message with calls: `trigger` and one of `bodies`, repeated if `parallel`, and calls
        that start otherwise."""
        if not bodies:
            self.message_without_calls(lark, constraints)
            return
        body = lark.rule("body", lark.any_of(bodies))
        required = constraints.calls.required
        calls = CallPattern(self.trigger, body, self.separator, parallel, required, others, untagged, interrupts, bare)
        # Free text may start with a reasoning tag under any template, and the parser then expects reasoning.
        has_free_text = not required and not constraints.answer
        lark.message(calls, self.reasoning_tags(constraints, always=has_free_text), constraints.answer)

    def message_without_calls(self, lark: LarkBuilder, constraints: MessageConstraints) -> None:
        """Adds the rules of a message without calls."""
        triggers = [trigger for trigger in self.triggers if trigger not in self.fences]
        text = lark.text_without(triggers) if constraints.calls.withheld else "TEXT"
        rest = lark.rule("rest", constraints.answer or text)
        lark.root_rule(self.reasoning_tags(constraints), rest, rest)

    def reasoning_tags(self, constraints: MessageConstraints, *, always: bool = False) -> ReasoningTags:
        """Returns the tags of the reasoning that may start the message; no tags if it may not start with reasoning."""
        permitted = self.closes and (always or constraints.may_reason)
        return ReasoningTags(
            [(tag, self.closing(tag)) for tag in self.opens] if permitted else [], constraints.in_reasoning
        )

    def bodies(self, lark: LarkBuilder, calls: AllowedCalls) -> list[str]:
        """Adds one rule for each tool and returns the names of the rules."""
        return [lark.rule(f"tool_{index}", self.body(lark, tool, index)) for index, tool in enumerate(calls.tools)]

    def bare(self, lark: LarkBuilder, calls: AllowedCalls) -> str:
        """Returns the expression of all calls without triggers where calls are required; empty if there are none."""
        return ""

    def untagged(self, lark: LarkBuilder, calls: AllowedCalls) -> UntaggedCalls | None:
        """Returns the patterns of calls without a trigger. Returns None if the format has no such calls."""
        return None
