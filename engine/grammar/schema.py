"""JSON schemas before they are compiled, and after that failed: what would be too much, and the keyword to blame."""

from __future__ import annotations

import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec

from engine.grammar.forms import GrammarError

DEPTH = 100
"""Levels of nested objects and lists: the library reads no more than 128, and a schema level takes two or three."""
DIGITS = 10
"""Of an index in a pointer; Python reads no number of thousands."""
MULTIPLES = 2**17
"""What the different `multipleOf` of a schema may add up to, and be multiplied, without the powers of ten in them: the
library goes through all remainders, in some microseconds and 500 bytes each, and nothing bounds it."""
SEARCH = 1.0
"""Seconds for which the keyword to blame is looked for."""

_ONE = (
    *("items", "additionalItems", "unevaluatedItems", "contains", "not", "if", "then", "else"),
    *("additionalProperties", "unevaluatedProperties", "propertyNames"),
)
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "dependentSchemas")

Schema = dict[str, Any]


Path = tuple[str, ...]
"""A JSON pointer in parts: names can be long, and many pointers can begin alike."""


class Place(NamedTuple):
    """A keyword: the way to the schema that has it, that schema, and its name."""

    path: Path
    schema: Schema
    keyword: str

    @property
    def pointer(self) -> str:
        """The JSON pointer to it."""
        return f"{''.join(self.path)}/{_escaped(self.keyword)}"


def parsed(text: bytes) -> Schema:
    """The schema in `text`. Raises GrammarError if it is none, or too deep."""
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # also a number with thousands of digits
        raise GrammarError(f"The schema is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise GrammarError("A schema must be a JSON object.")
    if (depth := depth_of(schema)) > DEPTH:
        raise GrammarError(f"The schema is nested {depth} levels deep; at most {DEPTH} are taken.")
    check_multiples(schema)
    return schema


def embedded(lark: str) -> Iterator[Schema]:
    """The schemas in a grammar in Lark, as far as they are JSON."""
    for found in re.finditer(r"%json\s*(?={)", lark):
        with suppress(ValueError, RecursionError):
            yield json.JSONDecoder().raw_decode(lark, found.end())[0]


def check_multiples(schemas: object) -> None:
    """Raises GrammarError if a text would have to be a multiple of too large a number. Takes a schema, or several that
    are followed together."""
    total, together = 0, 1
    for number in {value for level in levels(schemas) for item in level for value in _multiples(item)}:
        total, together = total + number, math.lcm(together, number)
        if max(total, together) > MULTIPLES:
            raise GrammarError("The schema cannot be followed: its multipleOf is too large, or they are together.")


def _multiples(item: Any) -> Iterator[int]:
    """The number that the item wants a multiple of, without powers of ten."""
    value = item.get("multipleOf") if isinstance(item, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and value and math.isfinite(value):
        yield int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))


def depth_of(value: object) -> int:
    """Levels of nested objects and lists."""
    return sum(1 for _ in levels(value))


def levels(value: object) -> Iterator[list[Any]]:
    """The objects and lists at each level, the outermost first."""
    level: list[Any] = [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        yield level
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]


def blamed(schema: Schema, complaint: str, compiled: Callable[[Schema], str]) -> str | None:
    """The JSON pointer of the keyword because of which `compiled`, which is called with variants of `schema`, answers
    `complaint`; None if it is not found.

    It is the one without which there is no such complaint. Those that the complaint names are tried first, from the
    root on, then the others, from the leaves on; should each of several be enough, it is the first that is named.
    """
    words = set(re.findall(r"[$\w]+", complaint))
    places = list(keywords(schema))
    named = [place for place in places if place.keyword in words]
    until = time.perf_counter() + SEARCH
    for place in [*named, *reversed([place for place in places if place.keyword not in words])]:
        if time.perf_counter() > until:
            break
        if compiled(without(schema, place)) != complaint:
            return place.pointer
    return named[0].pointer if named else None


def keywords(schema: Schema) -> Iterator[Place]:
    """Every keyword that counts, the root's first; in definitions, those that something refers to."""
    seen: set[int] = set()
    queue: deque[tuple[Path, Any]] = deque([((), schema)])
    while queue:
        path, part = queue.popleft()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        yield from (Place(path, part, name) for name in part)
        queue.extend(_below(path, part))
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            queue.append(((reference[1:],), _found(schema, unquote(reference[1:]))))


def _below(path: Path, schema: Schema) -> Iterator[tuple[Path, Any]]:
    for name in _ONE:
        if name in schema:
            yield (*path, f"/{name}"), schema[name]
    for name in _LISTED:
        if isinstance(parts := schema.get(name), list):
            yield from (((*path, f"/{name}/{index}"), part) for index, part in enumerate(parts))
    for name in _NAMED:
        if isinstance(named := schema.get(name), dict):
            yield from (((*path, f"/{name}/{_escaped(key)}"), part) for key, part in named.items())


def _found(schema: Schema, pointer: str) -> Any:
    """What stands at a JSON pointer (RFC 6901); None if nothing does."""
    part: Any = schema
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and name.isdecimal() and len(name) < DIGITS and int(name) < len(part):
            part = part[int(name)]
        else:
            part = part.get(name) if isinstance(part, dict) else None
    return part


def without(schema: Schema, place: Place) -> Schema:
    """A copy of `schema` that lacks one keyword."""
    made: Schema = _copied(schema, lambda part, name: None if part is place.schema and name == place.keyword else name)
    return made


def with_any_of(schema: Schema) -> Schema:
    """`schema` with `anyOf` instead of `oneOf` where that is the same, as no two branches can hold at once: each is an
    object that must have some property, and the texts that may be its value differ. The library knows only simpler
    ones."""
    apart = {
        id(place.schema)
        for place in keywords(schema)
        if place.keyword == "oneOf" and "anyOf" not in place.schema and _told_apart(schema, place.schema["oneOf"])
    }
    if not apart:
        return schema
    made: Schema = _copied(schema, lambda part, name: "anyOf" if name == "oneOf" and id(part) in apart else name)
    return made


def _told_apart(schema: Schema, branches: Any) -> bool:
    if not isinstance(branches, list) or not branches:
        return False
    followed = [_followed(schema, branch) for branch in branches]
    if len({*map(id, followed)}) < len(followed):  # the same twice: and so nothing large is gone through time and again
        return False
    tags = [_tags(branch) for branch in followed]
    shared = set.intersection(*(set(each) for each in tags))
    return any(
        sum(len(each[name]) for each in tags) == len(set[str]().union(*(each[name] for each in tags)))
        for name in shared
    )


def _tags(branch: Any) -> dict[str, set[str]]:
    """Properties that an object must have and whose values are of a few texts, and these."""
    if not isinstance(branch, dict) or branch.get("type") != "object":
        return {}
    properties, required = branch.get("properties"), branch.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    tags: dict[str, set[str]] = {}
    for name in required:
        allowed = properties.get(name) if isinstance(name, str) else None
        if isinstance(allowed, dict):
            values = [allowed["const"]] if "const" in allowed else allowed.get("enum")
            if isinstance(values, list) and all(isinstance(value, str) for value in values):
                tags[name] = set(values)
    return tags


def _followed(schema: Schema, part: Any) -> Any:
    """What `part` refers to, if it does nothing else, or itself."""
    if isinstance(part, dict) and len(part) == 1 and str(part.get("$ref")).startswith("#"):
        return _found(schema, unquote(part["$ref"][1:]))
    return part


def _copied(part: Any, rename: Callable[[Schema, str], str | None]) -> Any:
    """A copy in which every keyword has the name that `rename` says; without it for None."""
    if isinstance(part, list):
        return [_copied(item, rename) for item in part]
    if not isinstance(part, dict):
        return part
    names = [(rename(part, name), value) for name, value in part.items()]
    return {name: _copied(value, rename) for name, value in names if name is not None}


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
