"""Grammars of messages with tool calls, in llguidance's Lark dialect: free text up to a trigger, then a valid call."""

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
# White space permitted after reasoning, bounded as small models repeat line breaks.
AFTER_REASONING = r"/\s{0,2}/"
# Consecutive calls where nothing else is permitted, as small models may repeat calls without end.
MAX_CALLS = 32

# JSON as chat templates show it: a space after commas and colons. Flexible white space lets small models repeat it.
_JSON_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class ReasoningTags(Struct, frozen=True):
    """The reasoning that may come first: pairs of opening and closing tags."""

    tags: Sequence[tuple[str, str]] = ()
    opened: bool = False
    """True if the prompt ends with the first opening tag."""


class UntaggedCalls(Struct, frozen=True):
    """Calls without a trigger, at the start of the answer or after a code fence. All fields but the last are regular
    expressions."""

    head: str
    """The text of a call up to the tool's name."""
    fence: str
    """The code fences."""
    names: str
    """The names of tools and the text after them; without a match the text is no call."""
    calls: Sequence[str]
    """For each tool, the expression of a call from the name on."""


class CallPattern(Struct, frozen=True):
    """The calls of a message."""

    trigger: str
    """The text before each call."""
    body: str
    """The expression after the trigger."""
    separator: str
    parallel: bool
    required: bool
    others: Sequence[tuple[str, str]] = ()
    """More triggers with the expressions after them. Unused if calls are required."""
    untagged: UntaggedCalls | None = None
    """Calls without a trigger. Unused if calls are required."""
    interrupts: Sequence[tuple[str, str]] = ()
    """Triggers that close reasoning, with the expressions after them."""


class LarkBuilder:
    """Collects the rules of one grammar; `str` returns the grammar's text."""

    def __init__(self, special: Mapping[str, int]) -> None:
        """`special` maps the markers that are special tokens to their ids. No text matches a special token."""
        self._special = special
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        self._rules: dict[str, str] = {}
        self._schema_chars = 0
        self.rule("TEXT", f"/{ANY_TEXT}/")

    def __str__(self) -> str:
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())

    # ── expressions ──

    def rule(self, name: str, body: str) -> str:
        """Adds a rule unless the name is taken. Returns the name without its options in brackets."""
        self._rules.setdefault(name, body)
        return name.partition("[")[0]

    def text(self, text: str) -> str:
        """Returns the expression of exactly this text, with markers that are special tokens as tokens.

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
        """Returns the alternative of these expressions."""
        return "(" + " | ".join(expressions) + ")"

    def json(self, schema: Any) -> str:
        """Returns the expression of JSON valid by `schema`. Raises RequestRefused if all schemas together exceed
        `MAX_GRAMMAR_BYTES`."""
        text = json.dumps({**schema, "x-guidance": _JSON_SPACING} if isinstance(schema, Mapping) else {})
        self._schema_chars += len(text)
        # Each reference repeats its definition, so a small request could grow beyond the memory.
        if self._schema_chars > MAX_GRAMMAR_BYTES:
            raise RequestRefused(
                f"The schemas make a grammar of more than {MAX_GRAMMAR_BYTES} characters, the maximum: "
                "use fewer tools or smaller schemas."
            )
        return f"%json {text}"

    def json_rule(self, name: str, schema: Any) -> str:
        """Adds a rule of JSON valid by `schema` unless the name is taken, and returns the name."""
        return name if name in self._rules else self.rule(name, self.json(schema))

    def members(self, name: str, members: Sequence[tuple[str, bool]], separator: str) -> str:
        """Returns the expression of (expression, required) members in order; optional members may be absent."""
        comma, first, more = self.text(separator), '""', '""'
        for place, (member, required) in reversed(list(enumerate(members))):
            one = self.rule(f"{name}_{place}", member)
            first, more = (
                self.rule(f"{name}_{place}_first", f"{one} {more}" if required else f"{one} {more} | {first}"),
                self.rule(f"{name}_{place}_more", f"{comma} {one} {more}{'' if required else f' | {more}'}"),
            )
        return first

    def several(self, bodies: Sequence[str], separator: str, parallel: bool) -> str:
        """Returns the expression of one of `bodies`, or of up to `MAX_CALLS` of them if `parallel`."""
        one = self.rule("one", self.any_of(bodies))
        return f"{one} {self._repeated(one, separator, parallel)}"

    def before(self, name: str, marker: str, text: str = ANY_TEXT, unless: str = "") -> str:
        """Adds a rule of `text` up to and including the first `marker`, without texts that start like `unless`."""
        if self._has_special(marker):
            return self.rule(name, f"{self.free(name, text, unless)} {self.text(marker)}")
        return self.rule(f"{name}[lazy]", self.free(name, text + literal(marker), unless))

    def free(self, name: str, text: str, unless: str) -> str:
        """Returns the expression of text that matches `text` and does not start like `unless`."""
        if not unless:
            return f"/{text}/"
        return self.rule(f"{name.upper()}_TEXT", f"/{text}/ & ~/({unless}){ANY_TEXT}/")

    def without(self, triggers: Sequence[str]) -> str:
        """Returns the expression of any text without these triggers."""
        excluded = "|".join(literal(trigger) for trigger in triggers if not self._has_special(trigger))
        return self.free("without", ANY_TEXT, f"{ANY_TEXT}({excluded})" if excluded else "")

    def opening(self, reasoning: ReasoningTags) -> str:
        """Returns the regular expression of text that opens reasoning, empty if only special tokens do."""
        tags = "|".join(literal(tag) for tag, _ in reasoning.tags if not self._has_special(tag))
        return f"{WHITE_SPACE}({tags})" if tags else ""

    # ── whole messages ──

    def message(self, calls: CallPattern, reasoning: ReasoningTags, answer: str | None) -> None:
        """Adds the rules of a message: optional reasoning, then calls, an answer, or free text with calls in it.

        Required calls exclude everything else. With `answer` the message is either calls or `answer`.
        """
        if calls.required or answer:
            call = self.rule("call", f"{self.text(calls.trigger)} {calls.body}")
            more = self._repeated(call, calls.separator, calls.parallel)
            several = f"{call} {more}"
            rest = self.rule("rest", several if calls.required else f"{several} | {answer}")
            self.start(reasoning, rest, rest, AFTER_REASONING, self._interrupted(calls, more))
            return
        more = "rest" if calls.parallel else ""
        rest = self._free_answer("rest", calls)
        without = rest if reasoning.opened else self._free_answer("plain", calls, self.opening(reasoning))
        self.start(reasoning, rest, without, "", self._interrupted(calls, more))

    def start(
        self,
        reasoning: ReasoningTags,
        after: str,
        without: str,
        space: str = AFTER_REASONING,
        interrupted: Sequence[str] = (),
    ) -> None:
        """Adds the root rule: reasoning, `space` and `after`; or reasoning that ends in one of `interrupted`; or
        `without`, unless the prompt opened the reasoning."""
        ways = [] if reasoning.opened and reasoning.tags else [without]
        for index, (tag, closes) in enumerate(reasoning.tags[:1] if reasoning.opened else reasoning.tags):
            ends = (f"{self.before(f'thought_{index}', closes)} {space} {after}", *interrupted)
            begins = "" if reasoning.opened else self._opening_tag(f"OPEN_{index}", tag)
            ways += [f"{begins} {end}" for end in ends]
        self.rule("start", " | ".join(ways))

    def _has_special(self, text: str) -> bool:
        return any(name in text for name in self._special)

    def _repeated(self, one: str, separator: str, parallel: bool) -> str:
        """Returns the expression of the calls after the first call."""
        return f"({self.text(separator)} {one}){{0,{MAX_CALLS - 1}}}" if parallel else ""

    def _opening_tag(self, name: str, tag: str) -> str:
        """Returns the expression of an opening tag, after optional white space unless the tag has a special token."""
        return self.text(tag) if self._has_special(tag) else self.rule(name, f"/{WHITE_SPACE}{literal(tag)}/")

    def _interrupted(self, calls: CallPattern, more: str) -> list[str]:
        """Returns the expressions of reasoning that ends in a call, followed by `more`."""
        return [
            f"{self.before(f'interrupt_{index}', trigger)} {body} {more}"
            for index, (trigger, body) in enumerate(calls.interrupts)
        ]

    def _free_answer(self, name: str, calls: CallPattern, unless: str = "") -> str:
        """Adds a rule of free text with calls in it that does not start like `unless`."""
        untagged = calls.untagged
        if untagged is None:
            return self.rule(name, " | ".join(self._continuations(name, calls, "", unless)))
        fenced = f"{ANY_TEXT}{untagged.fence}{untagged.head}"
        more = "rest" if calls.parallel else ""
        found = [f"{call} {more}" for call in untagged.calls]
        self.rule("found", " | ".join([*found, *self._continuations("other", calls, fenced, untagged.names)]))
        return self.rule(name, " | ".join(self._continuations(name, calls, f"({untagged.head}|{fenced})", unless)))

    def _continuations(self, name: str, calls: CallPattern, begins: str, unless: str) -> Iterator[str]:
        """Yields the continuations of free text that does not start like `unless`: up to the end, up to a trigger, and
        up to `begins`, the start of an untagged call.

        Untagged calls are matched by greedy terminals: with lazy ones each mask would visit the whole vocabulary.
        """
        free = "|".join(filter(None, (begins, unless)))
        yield self.free(name, ANY_TEXT, free)
        for index, (trigger, body) in enumerate([(calls.trigger, calls.body), *calls.others]):
            head = self.before(f"{name}_head_{index}", trigger, ANY_TEXT, free)
            yield f"{head} {body} {'rest' if calls.parallel else ''}"
        if begins:
            at = f"/{begins}/ & ~/{begins}{NON_EMPTY_TEXT}/{f' & ~/{unless}{ANY_TEXT}/' if unless else ''}"
            yield f"{self.rule(f'{name.upper()}_FOUND', at)} found"


def literal(text: str) -> str:
    r"""Returns a regular expression of exactly this text, for use between slashes.

    >>> literal("</a>\n")
    '<\\/a>\\n'
    """
    return "".join(_ESCAPED.get(sign, sign) for sign in text)


_ESCAPED = {sign: "\\" + sign for sign in r"\/.^$|?*+()[]{}-"} | {"\n": r"\n", "\t": r"\t", '"': '"'}
