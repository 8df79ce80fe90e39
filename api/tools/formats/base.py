"""What the formats share: a parser that turns text into deltas, and the protocol of a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from uuid import uuid4

from msgspec import Struct

from api.tools.formats.deltas import Arguments, Begun, Content, Delta, Reasoning
from api.tools.formats.lark import Lark, Repeated, Thought, Untagged
from api.tools.formats.source import Reading, Source


class Tool(Struct, frozen=True):
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any]
    """The JSON schema of its arguments, an object."""


class Calls(Struct, frozen=True):
    """Which calls a message may have."""

    tools: tuple[Tool, ...] = ()
    """Those that may be called; empty if none may."""
    required: bool = False
    """Whether there must be one at least."""
    parallel: bool = True
    """Whether there may be several."""
    withheld: bool = False
    """Whether the model was told of tools none of which may be called."""

    def schema(self, name: str) -> Mapping[str, Any]:
        """The schema of a tool's arguments; of any object if there is no such tool."""
        return next((tool.parameters for tool in self.tools if tool.name == name), {})

    def __contains__(self, name: str) -> bool:
        return any(tool.name == name for tool in self.tools)


class Rules(Struct, frozen=True):
    """What a grammar has to see to."""

    calls: Calls
    thinks: bool = False
    """Whether reasoning may come first."""
    opened: bool = False
    """Whether the prompt has begun it."""
    answer: str | None = None
    """What the answer must be if it is no call, as an expression in Lark; None if it may be any text."""


class Format(ABC):
    """How a family of models writes reasoning and calls. Has no state: a text's is in its parser."""

    name: ClassVar[str]
    signs: ClassVar[tuple[str, ...]]
    """Texts of which the chat template has one if its model writes like this."""
    markers: ClassVar[tuple[str, ...]]
    """What the reader looks for. Where one is a control token, the request has it spelled out."""
    opens: ClassVar[tuple[str, ...]] = ("<think>",)
    """What reasoning begins with, if the prompt did not end with it."""
    closes: ClassVar[str] = "</think>"
    """What ends reasoning; empty if nothing by itself does."""

    @abstractmethod
    def read(self, parser: Parser) -> Reading[None]:
        """Reads a whole message and tells the parser what it is."""

    @abstractmethod
    def grammar(self, lark: Lark, rules: Rules) -> None:
        """Writes the rules of a message, from `start` on. Raises RequestRefused for what cannot be seen to."""

    def fits(self, template: str) -> bool:
        """Whether models with this chat template write like this."""
        return any(sign in template for sign in self.signs)

    def thinks(self, template: str) -> bool:
        """Whether models with this chat template may think before they answer."""
        return any(tag in template for tag in self.opens)

    def identify(self, index: int, name: str) -> str:
        """An id for a call whose text brings none."""
        return f"call_{uuid4().hex[:24]}"

    def opened_by(self, prompt: str) -> bool:
        """Whether a text after `prompt` begins inside of reasoning."""
        return prompt.rstrip().endswith(self.opens) if self.opens else False


class Parser:
    """Reads one message. What the deltas amount to depends on the text alone, not on the pieces it came in.

    White space around reasoning belongs to nothing, nor does white space at the end of the content if there are calls.
    """

    def __init__(self, format: Format, calls: Calls, *, opened: bool = False, split: bool = True) -> None:
        """With `opened` the text begins inside of reasoning. Without `split`, reasoning is content, tags and all."""
        self.calls = calls
        self.opened = opened
        self.split = split
        self.source = Source()
        self.begun = 0
        """Calls so far."""
        self._format = format
        self._deltas: list[Delta] = []
        self._space = ""  # after the content so far; who knows whether more of it follows
        self._thought_space = ""
        self._thought = False
        self._bare = False  # content so far is nothing but white space that follows reasoning
        self._reading = format.read(self)

    def feed(self, text: str) -> list[Delta]:
        """What is certain now that `text` came too."""
        self.source.feed(text)
        return self._go_on()

    def finish(self) -> list[Delta]:
        """The rest, when no more text comes. A call that has not begun by then is not told."""
        self.source.ended = True
        deltas = self._go_on()
        if self._space and not self.begun:
            deltas.append(Content(self._space))
        return deltas

    def _go_on(self) -> list[Delta]:
        next(self._reading, None)
        deltas, self._deltas = self._deltas, []
        return deltas

    # ── what readers tell ──

    def content(self, text: str) -> None:
        """More of the answer."""
        text = self._space + text
        if self._bare:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._bare = False
            self._deltas.append(Content(shown))

    def reasoning(self, text: str) -> None:
        """More of what the model thinks."""
        if not self.split:
            self.content(text)
            return
        text = self._thought_space + text
        if not self._thought:
            text = text.lstrip()
        shown = text.rstrip()
        self._thought_space = text[len(shown) :]
        if shown:
            self._thought = True
            self._deltas.append(Reasoning(shown))

    def tag(self, text: str) -> None:
        """A tag around reasoning."""
        if not self.split:
            self.content(text)

    def thought(self) -> None:
        """The reasoning is over."""
        self._thought_space = ""
        self._bare = self.split

    def begin(self, name: str, id: str = "") -> int:
        """A call begins; its index. There is no way back before it."""
        self.source.forget()
        index, self.begun = self.begun, self.begun + 1
        self._deltas.append(Begun(index, id or self._format.identify(index, name), name))
        return index

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        if text:
            self._deltas.append(Arguments(self.begun - 1, text))


class Tagged(Format):
    """A format in which calls begin with one of `triggers`, wherever they stand."""

    triggers: ClassVar[tuple[str, ...]]
    interrupts: ClassVar[tuple[str, ...]] = ()
    """Triggers that end reasoning too."""
    fences: ClassVar[tuple[str, ...]] = ()
    """Triggers that are text unless a call follows; others are not shown where the text ends before that is known."""

    @abstractmethod
    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        """Reads what follows a trigger. False if it is no call after all, and nothing was told."""

    def read(self, parser: Parser) -> Reading[None]:
        yield from self.think(parser)
        yield from self.first(parser)
        source, triggers = parser.source, self.triggers if parser.calls.tools else ()
        while (trigger := (yield from source.until(triggers, parser.content))) is not None:
            source.mark(len(trigger))
            if (yield from self.call(parser, trigger)):
                source.forget()
            elif source.ended and trigger not in self.fences:
                return  # cut off before it was a call
            else:
                source.rewind()
                parser.content(source.skip(len(trigger)))

    def first(self, parser: Parser) -> Reading[None]:
        """Reads what may only stand where the answer begins."""
        yield from ()

    def think(self, parser: Parser) -> Reading[None]:
        """Reads the reasoning, if there is any."""
        source = parser.source
        if not parser.opened:
            tag = (yield from source.takes(*self.opens)) if self.opens else None
            if tag is None:
                return
            parser.tag(tag)
        ends = (self.closes, *(self.interrupts if parser.calls.tools else ()))
        end = yield from source.until(ends, parser.reasoning)
        if end == self.closes:
            parser.tag(end)
        elif end is not None:
            source.mark(len(end))
            source.rewind()
        parser.thought()

    @property
    def trigger(self) -> str:
        """What calls begin with in grammars."""
        return self.triggers[0]

    joint: ClassVar[str] = "\n"
    """What stands between two calls."""

    def grammar(self, lark: Lark, rules: Rules) -> None:
        # Where nothing but calls or one kind of answer may come, the tags are no trouble.
        untagged = None if rules.calls.required or rules.answer else self.untagged(lark, rules.calls)
        self.message(lark, rules, self.bodies(lark, rules.calls), parallel=rules.calls.parallel, untagged=untagged)

    def message(
        self,
        lark: Lark,
        rules: Rules,
        bodies: Sequence[str],
        *,
        parallel: bool,
        untagged: Untagged | None = None,
        others: Sequence[tuple[str, str]] = (),
        interrupts: Sequence[tuple[str, str]] = (),
    ) -> None:
        """The rules of a message in which `trigger` and one of `bodies` may come, several times if `parallel`, and the
        calls that begin otherwise."""
        if not bodies:
            self.silent(lark, rules)
            return
        body = lark.rule("body", lark.any_of(bodies))
        calls = Repeated(self.trigger, body, self.joint, parallel, rules.calls.required, others, untagged, interrupts)
        # Whoever may say anything may reason, known for it or not, and is read so.
        free = not rules.calls.required and not rules.answer
        lark.message(calls, self.thought(rules, always=free), rules.answer)

    def silent(self, lark: Lark, rules: Rules) -> None:
        """The rules of a message without calls."""
        triggers = [trigger for trigger in self.triggers if trigger not in self.fences]
        text = lark.without(triggers) if rules.calls.withheld else "TEXT"
        rest = lark.rule("rest", rules.answer or text)
        lark.start(self.thought(rules), rest, rest)

    def thought(self, rules: Rules, *, always: bool = False) -> Thought:
        """The reasoning that may come first."""
        may = self.closes and (always or rules.thinks)
        return Thought([(tag, self.closing(tag)) for tag in self.opens] if may else [], rules.opened)

    def closing(self, tag: str) -> str:
        """What ends reasoning that began with `tag`."""
        return self.closes

    def section(self, lark: Lark, rules: Rules, end: str) -> None:
        """The rules of a message in which all calls stand together, between `trigger` and `end`."""
        bodies = []
        if tools := self.bodies(lark, rules.calls):
            several = lark.several(tools, "", rules.calls.parallel)
            bodies = [lark.rule("section", f"{several} {lark.text(end)}")]
        self.message(lark, rules, bodies, parallel=False)

    def bodies(self, lark: Lark, calls: Calls) -> list[str]:
        """A rule for each tool."""
        return [lark.rule(f"tool_{index}", self.body(lark, tool, index)) for index, tool in enumerate(calls.tools)]

    def untagged(self, lark: Lark, calls: Calls) -> Untagged | None:
        """The calls that need no trigger."""
        return None

    @abstractmethod
    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        """What follows the first trigger in a call of `tool`, the `index`-th; may add rules of its own."""
