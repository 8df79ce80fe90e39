"""Calls that are a JSON object of a name and arguments, in whatever order."""

from __future__ import annotations

import json

import jiter

from api.tools.formats.base import Calls, Parser, Tool
from api.tools.formats.lark import SPACE, Lark, Untagged, literal
from api.tools.formats.source import Reading

ARGUMENTS = ("arguments", "parameters")
"""Under which of these the arguments may be."""
FENCE = "```"
"""What Markdown has around code, where small models put calls."""
FENCES = (f"{FENCE}json\n", f"{FENCE}\n")
"""How it begins."""
_HEAD = SPACE + SPACE.join((r"[\[,]?", r"\{", '"name"', ":", '"'))
_TAIL = '"' + SPACE + SPACE.join((",", f'"({"|".join(ARGUMENTS)})"', ":"))
"""What `read_untagged` asks for before and after a tool's name."""
_GAP = r"\s{0,8}"
"""White space where nothing else than the call may follow: bounded, or a model loses itself in it."""


def read_object(parser: Parser, *, known: bool = False, id: str = "") -> Reading[bool]:
    """Reads the object of a call and tells it; False if it is none. With `known` the tool must be one that there is."""
    return (yield from _Object(parser, known, id).read())


def read_untagged(parser: Parser) -> Reading[bool]:
    """Reads calls without tags, one after the other or in a list, and tells them. False if there is none."""
    source, begun = parser.source, parser.begun
    source.mark()
    listed = yield from source.takes("[")
    while (yield from _read_bare(parser)):
        source.mark()
        yield from source.takes(",")
    source.rewind()
    if listed and parser.begun > begun:
        yield from source.takes("]")
    return parser.begun > begun


def _read_bare(parser: Parser) -> Reading[bool]:
    """Reads one of them. False if it does not begin with the name of a tool that there is and with arguments: then
    it is JSON of another kind."""
    source = parser.source
    names = tuple(f'"{tool.name}"' for tool in parser.calls.tools)
    keys = tuple(f'"{key}"' for key in ARGUMENTS)
    signs: list[str] = []
    for options in (("{",), ('"name"',), (":",), names, (",",), keys, (":",)):
        sign = yield from source.takes(*options)
        if sign is None:
            return False
        signs.append(sign)
    if not (yield from source.sees("{")):
        return False
    parser.begin(signs[3][1:-1])
    if (yield from source.value(parser.arguments)):
        yield from source.takes("}")
    return True


class _Object:
    """One object. Arguments that come before the name wait for it."""

    def __init__(self, parser: Parser, known: bool, id: str) -> None:
        self._parser, self._known, self._id = parser, known, id
        self._name: str | None = None
        self._waiting: str | None = None
        self._told = False

    def read(self) -> Reading[bool]:
        source = self._parser.source
        if not (yield from source.takes("{")):
            return False
        while True:
            sign = yield from source.takes("}", ",", '"')
            if sign == '"':
                if not (yield from self._member()):
                    return self._name is not None
            elif sign == "}":
                return self._end()
            elif sign is None:
                return self._name is not None

    def _member(self) -> Reading[bool]:
        """Reads a name, of which the quote is read, and its value. False if that cannot be."""
        source = self._parser.source
        key, end = yield from source.collect(('"',))
        if end is None or not (yield from source.takes(":")):
            return False
        if key in ARGUMENTS and self._name is not None and (yield from source.sees("{")):
            self._told = True
            return (yield from source.value(self._parser.arguments))
        parts: list[str] = []
        if not (yield from source.value(parts.append)):
            return False
        text = "".join(parts)
        if key == "name" and self._name is None:
            return self._begin(text)
        if key in ARGUMENTS:
            self._waiting = _decoded(text)
            self._flush()
        return True

    def _begin(self, text: str) -> bool:
        name = _parsed(text)
        if not isinstance(name, str) or not name or (self._known and name not in self._parser.calls):
            return False
        self._name = name
        self._parser.begin(name, self._id)
        self._flush()
        return True

    def _flush(self) -> None:
        if self._name is not None and self._waiting is not None and not self._told:
            self._told = True
            self._parser.arguments(self._waiting)

    def _end(self) -> bool:
        if self._name is None:
            return False
        self._waiting = self._waiting or "{}"
        self._flush()
        return True


def _parsed(text: str) -> object:
    try:
        return jiter.from_json(text.encode(), allow_inf_nan=False)
    except ValueError:
        return None


def _decoded(text: str) -> str:
    """Arguments, out of a JSON string if a model wrapped them in one."""
    value = _parsed(text)
    return value if isinstance(value, str) and isinstance(_parsed(value), dict) else text


def object_body(lark: Lark, tool: Tool, index: int, arguments: str = "arguments") -> str:
    """The grammar of a call's object."""
    head = lark.text(f'{{"name": {json.dumps(tool.name)}, "{arguments}": ')
    return f'{head} {_value(lark, tool, index)} "}}"'


def untagged_calls(lark: Lark, calls: Calls) -> Untagged:
    """The grammar of calls without tags, in whatever layout a model writes JSON."""
    gap, end = lark.rule("GAP", f"/{_GAP}/"), lark.rule("UNTAGGED_END", f"/{_GAP}\\}}/")
    rules = [
        f"{lark.rule(f'NAME_{index}', f'/{literal(tool.name)}{_TAIL}/')} {gap} {_value(lark, tool, index)} {end}"
        for index, tool in enumerate(calls.tools)
    ]
    names, fences = ("|".join(map(literal, texts)) for texts in ([tool.name for tool in calls.tools], FENCES))
    return Untagged(_HEAD, f"({fences})", f"({names}){_TAIL}", rules)


def _value(lark: Lark, tool: Tool, index: int) -> str:
    """A rule of a tool's arguments, for all ways to write its call."""
    return lark.value(f"arguments_{index}", tool.parameters)
