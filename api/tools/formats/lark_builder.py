"""Builds grammars of messages with tool calls in llguidance's Lark dialect: free text, a trigger, then a valid call."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from engine import MAX_GRAMMAR_BYTES, RequestRefused

ANY_TEXT, NON_EMPTY_TEXT = r"(.|\n)*", r"(.|\n)+"
# The white space that `str.strip` removes, as a regular expression.
WHITE_SPACE = r"[\s\x1c-\x1f]*"
# White space permitted after reasoning, bounded because small models repeat line breaks.
AFTER_REASONING = r"/\s{0,2}/"
# White space permitted between calls and after the last one: many models emit a line break before the token that ends
# the turn. Bounded because small models repeat line breaks.
_CALL_GAP = r"/\s{1,4}/"
# Maximum calls in a row where only calls are permitted, because small models may repeat calls without end.
MAX_CALLS = 32

# JSON in the layout of chat templates: one space after commas and colons. Flexible white space is not permitted,
# because small models repeat it without end.
_JSON_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class ReasoningTags(Struct, frozen=True):
    """The pairs of opening and closing tags of the reasoning with which a message may start."""

    tags: Sequence[tuple[str, str]] = ()
    in_reasoning: bool = False
    """True if the prompt ends with the first opening tag."""


class UntaggedCalls(Struct, frozen=True):
    """Calls without a trigger, at the start of the answer or after a code fence. All fields except `calls` are regular
    expressions."""

    head: str
    """A call up to the tool's name."""
    fence: str
    """The code fences."""
    names: str
    """A tool's name and the text after it. Text after `head` that does not match is not a call."""
    calls: Sequence[str]
    """The Lark expression of a call from the name on, one for each tool."""


class CallPattern(Struct, frozen=True):
    """The patterns of the calls in a message. Expressions are Lark expressions."""

    trigger: str
    """The text before each call."""
    body: str
    """The expression after the trigger."""
    separator: str
    parallel: bool
    required: bool
    others: Sequence[tuple[str, str]] = ()
    """Further triggers, each with the expression after it. Unused if calls are required."""
    untagged: UntaggedCalls | None = None
    """Calls without a trigger. Unused if calls are required."""
    interrupts: Sequence[tuple[str, str]] = ()
    """Triggers that close reasoning, each with the expression after it."""
    bare: str = ""
    """The expression of all calls of a message without triggers. Used only if calls are required or the alternative is
    an answer in a given form. Empty if the format has none."""


class LarkBuilder:
    """Collects the rules of one grammar. `str(builder)` is the grammar's text. Methods return Lark expressions."""

    def __init__(self, special: Mapping[str, int]) -> None:
        """`special` maps the markers that are special tokens to their ids. A regular expression never matches them."""
        self._special = special
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        self._rules: dict[str, str] = {}
        self._schema_chars = 0
        self.rule("TEXT", f"/{ANY_TEXT}/")

    def __str__(self) -> str:
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())

    # ── expressions ──

    def rule(self, name: str, body: str) -> str:
        """Adds a rule unless the name exists. Returns the name without options in brackets, such as `[lazy]`."""
        self._rules.setdefault(name, body)
        return name.partition("[")[0]

    def text(self, text: str) -> str:
        """Returns the expression that matches exactly `text`. Special tokens in `text` are matched as tokens.

        >>> LarkBuilder({"<|call|>": 7}).text("<|call|>f"), LarkBuilder({}).text("")
        ('<[7]> "f"', '""')
        """
        parts = self._split.split(text) if self._special else [text]
        return (
            " ".join(
                f"<[{self._special[part]}]>" if part in self._special else json.dumps(part) for part in parts if part
            )
            or '""'
        )

    def any_of(self, expressions: Sequence[str]) -> str:
        """Returns the expression that matches one of `expressions`."""
        return "(" + " | ".join(expressions) + ")"

    def json(self, schema: Any) -> str:
        """Returns the expression of JSON valid by `schema`. Raises RequestRefused if all schemas together exceed
        `MAX_GRAMMAR_BYTES`."""
        text = json.dumps({**schema, "x-guidance": _JSON_SPACING} if isinstance(schema, Mapping) else {})
        self._schema_chars += len(text)
        # Each reference repeats its definition, so a small request could become a grammar larger than the memory.
        if self._schema_chars > MAX_GRAMMAR_BYTES:
            raise RequestRefused(
                f"The schemas make a grammar of more than {MAX_GRAMMAR_BYTES} characters, the maximum: "
                "use fewer tools or smaller schemas."
            )
        return f"%json {text}"

    def json_rule(self, name: str, schema: Any) -> str:
        """Adds a rule of JSON valid by `schema` unless the name exists, and returns the name."""
        return name if name in self._rules else self.rule(name, self.json(schema))

    def members(self, name: str, members: Sequence[tuple[str, bool]], separator: str) -> str:
        """Returns the expression of `members` in order, each an expression and whether the member is required."""
        comma, first, more = self.text(separator), '""', '""'
        for index, (member, required) in reversed(list(enumerate(members))):
            one = self.rule(f"{name}_{index}", member)
            first, more = (
                self.rule(f"{name}_{index}_first", f"{one} {more}" if required else f"{one} {more} | {first}"),
                self.rule(f"{name}_{index}_more", f"{comma} {one} {more}{'' if required else f' | {more}'}"),
            )
        return first

    def call_list(self, bodies: Sequence[str], separator: str, parallel: bool) -> str:
        """Returns the expression of one call of `bodies`, or of up to `MAX_CALLS` calls if `parallel`.

        A separator of white space stands for any other, as models vary it.
        """
        one = self.rule("one", self.any_of(bodies))
        return f"{one} {self._more_calls(one, separator, parallel)}"

    def text_until(self, name: str, marker: str, text: str = ANY_TEXT, unless: str = "") -> str:
        """Adds a rule of `text` up to and including the first `marker`. Text that starts with a match of `unless` is
        excluded. `text` and `unless` are regular expressions."""
        if self._has_special(marker):
            return self.rule(name, f"{self.free_text(name, text, unless)} {self.text(marker)}")
        return self.rule(f"{name}[lazy]", self.free_text(name, text + literal(marker), unless))

    def free_text(self, name: str, text: str, unless: str) -> str:
        """Returns the expression of text that matches `text` and does not start with a match of `unless`."""
        if not unless:
            return f"/{text}/"
        return self.rule(f"{name.upper()}_TEXT", f"/{text}/ & ~/({unless}){ANY_TEXT}/")

    def text_without(self, triggers: Sequence[str]) -> str:
        """Returns the expression of any text that contains none of `triggers`."""
        excluded = "|".join(literal(trigger) for trigger in triggers if not self._has_special(trigger))
        return self.free_text("without", ANY_TEXT, f"{ANY_TEXT}({excluded})" if excluded else "")

    def opening_pattern(self, reasoning: ReasoningTags) -> str:
        """Returns the regular expression of the opening tags; empty if all of them contain special tokens."""
        tags = "|".join(literal(tag) for tag, _ in reasoning.tags if not self._has_special(tag))
        return f"{WHITE_SPACE}({tags})" if tags else ""

    # ── whole messages ──

    def message(self, calls: CallPattern, reasoning: ReasoningTags, answer: str | None) -> None:
        """Adds the rules of a message: optional reasoning, then calls, an answer, or free text that contains calls.

        If calls are required, nothing else is permitted. With `answer` the message is either calls or `answer`.
        """
        if calls.required or answer:
            call = self.rule("call", f"{self.text(calls.trigger)} {calls.body}")
            more = self._more_calls(call, calls.separator, calls.parallel)
            call_lists = f"{call} {more}"
            if calls.bare:
                call_lists += f" | {calls.bare}"
            rest = self.rule("rest", call_lists if calls.required else f"{call_lists} | {answer}")
            self.root_rule(reasoning, rest, rest, AFTER_REASONING, self._interrupted(calls, more))
            return
        more = "rest" if calls.parallel else ""
        rest = self._free_answer("rest", calls)
        without = rest if reasoning.in_reasoning else self._free_answer("plain", calls, self.opening_pattern(reasoning))
        self.root_rule(reasoning, rest, without, "", self._interrupted(calls, more))

    def root_rule(
        self,
        reasoning: ReasoningTags,
        after: str,
        without: str,
        space: str = AFTER_REASONING,
        interrupted: Sequence[str] = (),
    ) -> None:
        """Adds the root rule with up to three alternatives: reasoning, `space` and `after`; reasoning that ends in one
        of `interrupted`; and, unless the prompt ends inside of the reasoning, `without`."""
        alternatives = [] if reasoning.in_reasoning and reasoning.tags else [without]
        for index, (tag, closes) in enumerate(reasoning.tags[:1] if reasoning.in_reasoning else reasoning.tags):
            ends = (f"{self.text_until(f'thought_{index}', closes)} {space} {after}", *interrupted)
            begins = "" if reasoning.in_reasoning else self._opening_tag(f"OPEN_{index}", tag)
            alternatives += [f"{begins} {end}" for end in ends]
        self.rule("start", " | ".join(alternatives))

    def _has_special(self, text: str) -> bool:
        return any(name in text for name in self._special)

    def _more_calls(self, one: str, separator: str, parallel: bool) -> str:
        """Returns the expression of the text after the first call: further calls, then white space.

        Without `parallel` it is empty, so that the output ends by itself.
        """
        if not parallel:
            return ""
        gap = f"{self.rule('CALL_GAP', _CALL_GAP)}?"
        return f"({self.text(separator) if separator.strip() else gap} {one}){{0,{MAX_CALLS - 1}}} {gap}"

    def _opening_tag(self, name: str, tag: str) -> str:
        """Returns the expression of an opening tag. White space may precede a tag without special tokens."""
        return self.text(tag) if self._has_special(tag) else self.rule(name, f"/{WHITE_SPACE}{literal(tag)}/")

    def _interrupted(self, calls: CallPattern, more: str) -> list[str]:
        """Returns the expressions of reasoning that a call ends, each followed by `more`."""
        return [
            f"{self.text_until(f'interrupt_{index}', trigger)} {body} {more}"
            for index, (trigger, body) in enumerate(calls.interrupts)
        ]

    def _free_answer(self, name: str, calls: CallPattern, unless: str = "") -> str:
        """Adds a rule of free text that contains calls and does not start with a match of `unless`."""
        untagged = calls.untagged
        if untagged is None:
            return self.rule(name, " | ".join(self._continuations(name, calls, "", unless)))
        fenced = f"{ANY_TEXT}{untagged.fence}{untagged.head}"
        more = "rest" if calls.parallel else ""
        found = [f"{call} {more}" for call in untagged.calls]
        self.rule("found", " | ".join([*found, *self._continuations("other", calls, fenced, untagged.names)]))
        return self.rule(name, " | ".join(self._continuations(name, calls, f"({untagged.head}|{fenced})", unless)))

    def _continuations(self, name: str, calls: CallPattern, begins: str, unless: str) -> Iterator[str]:
        """Yields the alternatives of free text that does not start with a match of `unless`.

        The text reaches to the end, to a trigger, or to the start of an untagged call, a match of `begins`. Untagged
        calls are matched by greedy terminals, because masks of lazy ones take a pass over the whole vocabulary.
        """
        free = "|".join(filter(None, (begins, unless)))
        yield self.free_text(name, ANY_TEXT, free)
        for index, (trigger, body) in enumerate([(calls.trigger, calls.body), *calls.others]):
            head = self.text_until(f"{name}_head_{index}", trigger, ANY_TEXT, free)
            yield f"{head} {body} {'rest' if calls.parallel else ''}"
        if begins:
            at = f"/{begins}/ & ~/{begins}{NON_EMPTY_TEXT}/{f' & ~/{unless}{ANY_TEXT}/' if unless else ''}"
            yield f"{self.rule(f'{name.upper()}_FOUND', at)} found"


def literal(text: str) -> str:
    r"""Returns the regular expression that matches exactly `text`, for use between slashes.

    >>> literal("</a>\n")
    '<\\/a>\\n'
    """
    return "".join(_ESCAPED.get(char, char) for char in text)


_ESCAPED = {char: "\\" + char for char in r"\/.^$|?*+()[]{}-"} | {"\n": r"\n", "\t": r"\t", '"': '"'}
