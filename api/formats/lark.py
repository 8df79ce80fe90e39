"""Grammars of messages with calls, in the Lark dialect of llguidance: free text up to a trigger, then what is right."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

ANY = r"(.|\n)*"
"""Any text."""

# As models were shown them: after commas and colons a space, and no other white space to get lost in.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Thought(Struct, frozen=True):
    """How reasoning is written: what may begin it, what ends it, and whether the prompt has begun it already."""

    opens: Sequence[str]
    closes: str
    opened: bool


class Lark:
    """A grammar that is being written."""

    def __init__(self, control: Mapping[str, int]) -> None:
        """`control` are the markers that the vocabulary has as control tokens, which no text can match."""
        self._control = control
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")
        self._rules: dict[str, str] = {}
        self.rule("TEXT", f"/{ANY}/")

    def __str__(self) -> str:
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())

    def rule(self, name: str, body: str) -> str:
        """Adds a rule, unless there is one; its name without options."""
        self._rules.setdefault(name, body)
        return name.partition("[")[0]

    def text(self, text: str) -> str:
        """Exactly this text; control tokens in it are meant as such.

        >>> Lark({"<|call|>": 7}).text("<|call|>f")
        '<[7]> "f"'
        """
        parts = self._split.split(text) if self._control else [text]
        return " ".join(
            f"<[{self._control[part]}]>" if part in self._control else json.dumps(part) for part in parts if part
        )

    def any_of(self, rules: Sequence[str]) -> str:
        """One of these."""
        return "(" + " | ".join(rules) + ")"

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON that is valid by `schema`."""
        return "%json " + json.dumps({**schema, "x-guidance": _SPACING})

    def before(self, name: str, marker: str, text: str = ANY) -> str:
        """A rule of the text up to the first `marker`, and that."""
        if marker in self._control:
            return self.rule(name, f"/{text}/ <[{self._control[marker]}]>")
        return self.rule(f"{name}[lazy]", f"/{text}{literal(marker)}/")

    def message(
        self, trigger: str, bodies: Sequence[str], thought: Thought, required: bool, parallel: bool, joint: str
    ) -> None:
        """The rules of a message whose calls are `trigger` and one of `bodies`, with `joint` between two.

        Reasoning may come first. If calls are required nothing else does; if not, anything may that is no trigger.
        """
        body = self.rule("body", self.any_of(bodies))
        call = self.rule("call", f"{self.text(trigger)} {body}")
        if required:
            more = f"({self.text(joint)} {call})*" if joint else f"{call}*"
            rest = self.rule("rest", f"{call} {more}" if parallel else call)
            self.rule("start", " | ".join(self._thoughts(thought, rest, rest, r"/\s{0,2}/")))
            return
        head = self.before("head", trigger)
        rest = self.rule("rest", f"({head} {body})* TEXT" if parallel else f"TEXT | {head} {body}")
        self.rule("start", " | ".join(self._thoughts(thought, rest, self._unlike(trigger, thought, rest, body), "")))

    def _thoughts(self, thought: Thought, after: str, without: str, space: str) -> list[str]:
        """The alternatives of a message: what comes `after` reasoning, or `without` it."""
        if not thought.closes:
            return [without]
        done = self.before("thought", thought.closes)
        if thought.opened:
            return [f"{done} {space} {after}"]
        return [*(f"{self.text(tag)} {done} {space} {after}" for tag in thought.opens), without]

    def _unlike(self, trigger: str, thought: Thought, rest: str, body: str) -> str:
        """The rest of a message that does not begin with reasoning, which may speak of triggers."""
        tags = [tag for tag in thought.opens if tag not in self._control]
        if not tags or thought.opened:
            return rest
        (tag,) = tags
        first = "(" + "|".join(literal(tag[:size]) + f"[^{literal(tag[size])}]" for size in range(len(tag))) + ")" + ANY
        head = self.before("first", trigger, first)
        begun = f"{self.text(trigger)} {body} | {head} {body}"
        return self.rule("plain", f"/({first})?/ | ({begun}) {rest}")


def literal(text: str) -> str:
    r"""A regular expression of exactly this text, for between slashes.

    >>> literal("</a>\n")
    '<\\/a>\\n'
    """
    return "".join(_ESCAPED.get(sign, sign) for sign in text)


_ESCAPED = {sign: "\\" + sign for sign in r"\/.^$|?*+()[]{}-"} | {"\n": r"\n", "\t": r"\t", '"': '"'}
