"""Grammars of messages with calls, in the Lark dialect of llguidance: free text up to a trigger, then what is right."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from engine import FORM_SIZE, RequestRefused

ANY, SOME = r"(.|\n)*", r"(.|\n)+"
"""Any text, and any but none."""
SPACE = r"[\s\x1c-\x1f]*"
"""What Python takes for white space, as a regular expression."""

# As models were shown them: after commas and colons a space, and no other white space to get lost in.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Thought(Struct, frozen=True):
    """How reasoning is written: each text that may begin it, with what ends it then, and whether the prompt has begun
    it already, with the first of them."""

    tags: Sequence[tuple[str, str]] = ()
    opened: bool = False


class Untagged(Struct, frozen=True):
    """Calls without a trigger, where an answer begins or after a fence. Regular expressions of what they begin with,
    of fences, and of what must follow for there to be such a tool; and for each tool an expression from there on."""

    head: str
    fence: str
    names: str
    calls: Sequence[str]


class Repeated(Struct, frozen=True):
    """Calls: what each begins with and a rule of what follows that, what stands between two, whether there may be
    several, and whether there must be one. If there need not be: other beginnings and what follows them, and calls
    without any. And beginnings that end reasoning, and what follows them."""

    trigger: str
    body: str
    joint: str
    parallel: bool
    required: bool
    others: Sequence[tuple[str, str]] = ()
    untagged: Untagged | None = None
    interrupts: Sequence[tuple[str, str]] = ()


MOST = 32
"""Calls one after the other where nothing else may come: a small model may find no end."""
BREAK = r"/\s{0,2}/"
"""What may follow reasoning."""


class Lark:
    """A grammar that is being written."""

    def __init__(self, special: Mapping[str, int]) -> None:
        """`special` are the markers that the vocabulary has as special tokens, which no text can match."""
        self._special = special
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        self._rules: dict[str, str] = {}
        self._size = 0  # of the schemas so far
        self.rule("TEXT", f"/{ANY}/")

    def __str__(self) -> str:
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())

    def rule(self, name: str, body: str) -> str:
        """Adds a rule, unless there is one; its name without options."""
        self._rules.setdefault(name, body)
        return name.partition("[")[0]

    def text(self, text: str) -> str:
        """Exactly this text; special tokens in it are meant as such.

        >>> Lark({"<|call|>": 7}).text("<|call|>f"), Lark({}).text("")
        ('<[7]> "f"', '""')
        """
        parts = self._split.split(text) if self._special else [text]
        return (
            " ".join(
                f"<[{self._special[part]}]>" if part in self._special else json.dumps(part) for part in parts if part
            )
            or '""'
        )

    def any_of(self, rules: Sequence[str]) -> str:
        """One of these."""
        return "(" + " | ".join(rules) + ")"

    def json(self, schema: Any) -> str:
        """JSON that is valid by `schema`. Raises RequestRefused if the schemas become too large together."""
        text = json.dumps({**schema, "x-guidance": _SPACING} if isinstance(schema, Mapping) else {})
        self._size += len(text)
        # Definitions are repeated where they are referred to: a small request could make what fits no memory.
        if self._size > FORM_SIZE:
            raise RequestRefused(f"The schemas make a grammar of more than {FORM_SIZE} characters; no more are taken.")
        return f"%json {text}"

    def value(self, name: str, schema: Any) -> str:
        """A rule of the same, unless there is one; its name."""
        return name if name in self._rules else self.rule(name, self.json(schema))

    def members(self, name: str, members: Sequence[tuple[str, bool]], joint: str) -> str:
        """These in turn with `joint` between two; those that are not required may be left out."""
        comma, first, more = self.text(joint), '""', '""'
        for place, (member, required) in reversed(list(enumerate(members))):
            one = self.rule(f"{name}_{place}", member)
            first, more = (
                self.rule(f"{name}_{place}_first", f"{one} {more}" if required else f"{one} {more} | {first}"),
                self.rule(f"{name}_{place}_more", f"{comma} {one} {more}{'' if required else f' | {more}'}"),
            )
        return first

    def before(self, name: str, marker: str, text: str = ANY, unless: str = "") -> str:
        """A rule of the text up to the first `marker`, and that; of no text that begins like `unless`."""
        if self._special_in(marker):
            return self.rule(name, f"{self.free(name, text, unless)} {self.text(marker)}")
        return self.rule(f"{name}[lazy]", self.free(name, text + literal(marker), unless))

    def _special_in(self, text: str) -> bool:
        return any(name in text for name in self._special)

    def free(self, name: str, text: str, unless: str) -> str:
        """Text that matches `text` and does not begin like `unless`."""
        if not unless:
            return f"/{text}/"
        return self.rule(f"{name.upper()}_TEXT", f"/{text}/ & ~/({unless}){ANY}/")

    def several(self, bodies: Sequence[str], joint: str, parallel: bool) -> str:
        """One of these after the other with `joint` between two, or just one."""
        one = self.rule("one", self.any_of(bodies))
        return f"{one} {self.more(one, joint, parallel)}"

    def more(self, one: str, joint: str, parallel: bool) -> str:
        """The others that may come after the first one."""
        return f"({self.text(joint)} {one}){{0,{MOST - 1}}}" if parallel else ""

    def without(self, triggers: Sequence[str]) -> str:
        """Any text that has none of these."""
        told = "|".join(literal(trigger) for trigger in triggers if not self._special_in(trigger))
        return self.free("without", ANY, f"{ANY}({told})" if told else "")

    def message(self, calls: Repeated, thought: Thought, answer: str | None) -> None:
        """The rules of a message: reasoning perhaps, then calls, an answer, or any text with calls in it.

        If calls are required nothing else may come; with `answer` either these or that; else any text that is no call.
        """
        if calls.required or answer:
            call = self.rule("call", f"{self.text(calls.trigger)} {calls.body}")
            more = self.more(call, calls.joint, calls.parallel)
            several = f"{call} {more}"
            rest = self.rule("rest", several if calls.required else f"{several} | {answer}")
            self.start(thought, rest, rest, BREAK, self._interrupted(calls, more))
            return
        more = "rest" if calls.parallel else ""
        rest = self._answer("rest", calls)
        without = rest if thought.opened else self._answer("plain", calls, self.opening(thought))
        self.start(thought, rest, without, "", self._interrupted(calls, more))

    def opening(self, thought: Thought) -> str:
        """A regular expression of what begins reasoning; empty if no text does."""
        tags = "|".join(literal(tag) for tag, _ in thought.tags if not self._special_in(tag))
        return f"{SPACE}({tags})" if tags else ""

    def start(
        self, thought: Thought, after: str, without: str, space: str = BREAK, interrupted: Sequence[str] = ()
    ) -> None:
        """The rule of a whole message: what comes `after` reasoning and `space`, or instead of its end, or `without`
        reasoning."""
        ways = [] if thought.opened and thought.tags else [without]
        for index, (tag, closes) in enumerate(thought.tags[:1] if thought.opened else thought.tags):
            ends = (f"{self.before(f'thought_{index}', closes)} {space} {after}", *interrupted)
            begins = "" if thought.opened else self._opened(f"OPEN_{index}", tag)
            ways += [f"{begins} {end}" for end in ends]
        self.rule("start", " | ".join(ways))

    def _opened(self, name: str, tag: str) -> str:
        """What begins reasoning: white space too, but not before special tokens."""
        return self.text(tag) if self._special_in(tag) else self.rule(name, f"/{SPACE}{literal(tag)}/")

    def _interrupted(self, calls: Repeated, more: str) -> list[str]:
        """The ways in which reasoning may end in a call; after that comes `more`."""
        return [
            f"{self.before(f'interrupt_{index}', trigger)} {body} {more}"
            for index, (trigger, body) in enumerate(calls.interrupts)
        ]

    def _answer(self, name: str, calls: Repeated, unless: str = "") -> str:
        """A rule of any text with calls in it that does not begin like `unless`."""
        untagged = calls.untagged
        if untagged is None:
            return self.rule(name, " | ".join(self._texts(name, calls, "", unless)))
        fenced = f"{ANY}{untagged.fence}{untagged.head}"
        more = "rest" if calls.parallel else ""
        found = [f"{call} {more}" for call in untagged.calls]
        self.rule("found", " | ".join([*found, *self._texts("other", calls, fenced, untagged.names)]))
        return self.rule(name, " | ".join(self._texts(name, calls, f"({untagged.head}|{fenced})", unless)))

    def _texts(self, name: str, calls: Repeated, begins: str, unless: str) -> Iterator[str]:
        """The ways to go on with what does not begin like `unless`: to the end, to a call, and to where what `begins`
        calls without a trigger is found. Greedy terminals tell that: with lazy ones every mask would go through the
        whole vocabulary."""
        free = "|".join(filter(None, (begins, unless)))
        yield self.free(name, ANY, free)
        for index, (trigger, body) in enumerate([(calls.trigger, calls.body), *calls.others]):
            head = self.before(f"{name}_head_{index}", trigger, ANY, free)
            yield f"{head} {body} {'rest' if calls.parallel else ''}"
        if begins:
            at = f"/{begins}/ & ~/{begins}{SOME}/{f' & ~/{unless}{ANY}/' if unless else ''}"
            yield f"{self.rule(f'{name.upper()}_FOUND', at)} found"


def literal(text: str) -> str:
    r"""A regular expression of exactly this text, for between slashes.

    >>> literal("</a>\n")
    '<\\/a>\\n'
    """
    return "".join(_ESCAPED.get(sign, sign) for sign in text)


_ESCAPED = {sign: "\\" + sign for sign in r"\/.^$|?*+()[]{}-"} | {"\n": r"\n", "\t": r"\t", '"': '"'}
