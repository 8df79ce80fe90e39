"""Grammars of messages with calls, in the Lark dialect of llguidance: free text up to a trigger, then what is right."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from engine import RequestRefused

ANY, SOME = r"(.|\n)*", r"(.|\n)+"
"""Any text, and any but none."""

# As models were shown them: after commas and colons a space, and no other white space to get lost in.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Thought(Struct, frozen=True):
    """How reasoning is written: what may begin it, what ends it, and whether the prompt has begun it already."""

    opens: Sequence[str]
    closes: str
    opened: bool


class Untagged(Struct, frozen=True):
    """Calls without a trigger. Regular expressions of what they begin with where an answer begins, and anywhere, and of
    what must follow for there to be such a tool; and for each tool an expression from there on."""

    first: str
    anywhere: str
    names: str
    calls: Sequence[str]


class Repeated(Struct, frozen=True):
    """Calls: what each begins with, what may follow that, what stands between two, whether there may be several,
    whether there must be one, and those that need no trigger."""

    trigger: str
    bodies: Sequence[str]
    joint: str
    parallel: bool
    required: bool
    untagged: Untagged | None = None


MOST = 32
"""Calls of a message that must be nothing else."""
LARGEST = 2**18
"""Characters of the schemas in a grammar: the engine takes no larger one. Definitions are repeated where they are
referred to, so that a small request could make a grammar that fits no memory."""
_BREAK = r"/\s{0,2}/"


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
        if self._size > LARGEST:
            raise RequestRefused(f"The schemas make a grammar of more than {LARGEST} characters; no more are taken.")
        return f"%json {text}"

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
        if any(name in marker for name in self._special):
            return self.rule(name, f"{self._terminal(name, text, unless)} {self.text(marker)}")
        return self.rule(f"{name}[lazy]", self._terminal(name, text + literal(marker), unless))

    def _terminal(self, name: str, text: str, unless: str) -> str:
        """What matches `text` and does not begin like `unless`."""
        if not unless:
            return f"/{text}/"
        return self.rule(f"{name.upper()}_TEXT", f"/{text}/ & ~/({unless}){ANY}/")

    def message(self, calls: Repeated, thought: Thought, answer: str | None) -> None:
        """The rules of a message: reasoning perhaps, then calls, an answer, or any text with calls in it.

        If calls are required nothing else may come; with `answer` either these or that; else any text that is no call.
        """
        if not calls.bodies:
            rest = self.rule("rest", answer or "TEXT")
            self.rule("start", " | ".join(self._thoughts(thought, rest, rest, _BREAK)))
            return
        body = self.rule("body", self.any_of(calls.bodies))
        call = self.rule("call", f"{self.text(calls.trigger)} {body}")
        if calls.required or answer:
            # Bounded: a small model may find no end, where nothing but another call may come.
            more = f"({self.text(calls.joint)} {call}){{0,{MOST - 1}}}"
            several = f"{call} {more}" if calls.parallel else call
            rest = self.rule("rest", several if calls.required else f"{several} | {answer}")
            self.rule("start", " | ".join(self._thoughts(thought, rest, rest, _BREAK)))
            return
        without = rest = self._answer("rest", calls, body, ANY)
        tags = [tag for tag in thought.opens if tag not in self._special]
        if tags and not thought.opened:
            # It may speak of triggers if it begins with reasoning.
            without = self._answer("plain", calls, body, f"({unlike(tags)}{ANY})?")
        self.rule("start", " | ".join(self._thoughts(thought, rest, without, "")))

    def _answer(self, name: str, calls: Repeated, body: str, text: str) -> str:
        """A rule of any text with calls in it, that begins with what matches `text`."""
        untagged = calls.untagged
        if untagged is None:
            return self.rule(name, " | ".join(self._texts(name, calls, body, text)))
        others = self._texts("other", calls, body, ANY, f"{ANY}{untagged.anywhere}", untagged.names)
        more = "rest" if calls.parallel else ""
        self.rule("found", " | ".join([*(f"{call} {more}" for call in untagged.calls), *others]))
        begins = f"({untagged.first}|{text}{untagged.anywhere})"
        return self.rule(name, " | ".join(self._texts(name, calls, body, text, begins)))

    def _texts(
        self, name: str, calls: Repeated, body: str, text: str, begins: str = "", unless: str = ""
    ) -> Iterator[str]:
        """The ways to go on with what matches `text` and does not begin like `unless`: to the end, to a call, and to
        where what `begins` calls without a trigger is found. Greedy terminals tell that: with lazy ones every mask
        would go through the whole vocabulary."""
        free = "|".join(filter(None, (begins, unless)))
        yield self._terminal(name, text, free)
        yield f"{self.before(f'{name}_head', calls.trigger, text, free)} {body} {'rest' if calls.parallel else ''}"
        if begins:
            at = f"/{begins}/ & ~/{begins}{SOME}/{f' & ~/{unless}{ANY}/' if unless else ''}"
            yield f"{self.rule(f'{name.upper()}_FOUND', at)} found"

    def _thoughts(self, thought: Thought, after: str, without: str, space: str) -> list[str]:
        """The alternatives of a message: what comes `after` reasoning, or `without` it."""
        if not thought.closes:
            return [without]
        done = self.before("thought", thought.closes)
        if thought.opened:
            return [f"{done} {space} {after}"]
        return [*(f"{self.text(tag)} {done} {space} {after}" for tag in thought.opens), without]


def unlike(tags: Sequence[str]) -> str:
    """A regular expression of the shortest texts that no tag begins with.

    >>> unlike(["ab"])
    '([^a]|a[^b])'
    """
    beginnings = sorted({tag[:size] for tag in tags for size in range(len(tag))})
    parts = []
    for begun in beginnings:
        following = sorted({tag[len(begun)] for tag in tags if tag.startswith(begun)})
        parts.append(f"{literal(begun)}[^{''.join(map(literal, following))}]")
    return f"({'|'.join(parts)})"


def literal(text: str) -> str:
    r"""A regular expression of exactly this text, for between slashes.

    >>> literal("</a>\n")
    '<\\/a>\\n'
    """
    return "".join(_ESCAPED.get(sign, sign) for sign in text)


_ESCAPED = {sign: "\\" + sign for sign in r"\/.^$|?*+()[]{}-"} | {"\n": r"\n", "\t": r"\t", '"': '"'}
