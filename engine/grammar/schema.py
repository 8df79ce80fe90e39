"""JSON schemas for the compiler: limits, replacement of `oneOf`, and the search for the keyword that causes an
error."""

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

import msgspec

from engine.grammar.pointer import escape, pointer_of, resolve, resolve_reference
from engine.grammar.spec import GrammarError

# Maximum levels of nested objects and lists. The library accepts 128; each nested subschema takes two or three levels.
MAX_SCHEMA_DEPTH = 100
# Maximum of the sum and of the least common multiple of the different `multipleOf` values in a schema, each without its
# powers of ten. The library visits all remainders, which take microseconds and 500 bytes each, without a limit.
MAX_MULTIPLES = 2**17
# Maximum time of the search for the keyword that causes an error.
SEARCH_SECONDS = 1.0

# Keywords whose value is a schema (`_SCHEMA_`), a list of schemas (`_LIST_`) or an object of schemas (`_OBJECT_`).
_SCHEMA_KEYWORDS = (
    *("items", "additionalItems", "unevaluatedItems", "contains", "not", "if", "then", "else"),
    *("additionalProperties", "unevaluatedProperties", "propertyNames"),
)
_LIST_KEYWORDS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_OBJECT_KEYWORDS = ("properties", "patternProperties", "dependentSchemas")
# Keywords without which a schema loses most of its form. The search for the cause of an error removes them last.
_FORMING = frozenset((*_SCHEMA_KEYWORDS, *_LIST_KEYWORDS, *_OBJECT_KEYWORDS, "required")) - {"not", "if", "oneOf"}

# The types of JSON Schema.
JSON_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")

Schema = dict[str, Any]

# The parts of a JSON pointer. They are joined only on demand, as names can be long and pointers share prefixes.
PointerParts = tuple[str, ...]


class SchemaKeyword(NamedTuple):
    """A keyword in a schema or subschema."""

    parts: PointerParts
    """JSON pointer of the subschema that contains the keyword."""
    schema: Schema
    """The subschema that contains the keyword."""
    name: str

    @property
    def pointer(self) -> str:
        """JSON pointer of the keyword."""
        return f"{''.join(self.parts)}/{escape(self.name)}"


def parse_schema(text: bytes) -> Schema:
    """Returns the schema in `text`. Raises GrammarError if `text` is not a JSON object or the schema is nested too
    deep."""
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: a number with thousands of digits
        raise GrammarError(f"The schema is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise GrammarError("A schema must be a JSON object.")
    if (depth := nesting_depth(schema)) > MAX_SCHEMA_DEPTH:
        raise GrammarError(f"The schema is nested {depth} levels deep; at most {MAX_SCHEMA_DEPTH} are allowed.")
    return schema


def embedded_schemas(lark: str) -> Iterator[Schema]:
    """Yields the JSON schemas in a Lark grammar (`%json {...}`), except those that are not valid JSON."""
    for found in re.finditer(r"%json\s*(?={)", lark):
        with suppress(ValueError, RecursionError):
            yield json.JSONDecoder().raw_decode(lark, found.end())[0]


def check_multiples(schemas: object) -> None:
    """Raises GrammarError if the values of `multipleOf` exceed `MAX_MULTIPLES` in a schema, or in all schemas of a list
    together."""
    total, common = 0, 1
    for number in {value for level in levels(schemas) for item in level for value in _multiples(item)}:
        total, common = total + number, math.lcm(common, number)
        if max(total, common) > MAX_MULTIPLES:
            raise GrammarError("The schema cannot be followed: its multipleOf is too large, or they are together.")


def _multiples(item: Any) -> Iterator[int]:
    """Yields the digits of `multipleOf` in `item` as an integer, without trailing zeros. Yields nothing if `item` has
    no valid `multipleOf`."""
    value = item.get("multipleOf") if isinstance(item, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and value and math.isfinite(value):
        yield int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))


def unknown_types(schema: Schema) -> list[str]:
    """Returns the JSON pointers of each `type` that JSON Schema does not define, so that no value is valid."""
    return [each.pointer for each in keywords(schema) if each.name == "type" and not _is_type(each.schema["type"])]


def _is_type(value: Any) -> bool:
    return all(isinstance(each, str) and each in JSON_TYPES for each in (value if isinstance(value, list) else [value]))


def nesting_depth(value: object) -> int:
    """Returns the number of levels of nested objects and lists in `value`."""
    return sum(1 for _ in levels(value))


def levels(value: object) -> Iterator[list[Any]]:
    """Yields the list of all objects and lists of each level, the outermost level first."""
    level: list[Any] = [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        yield level
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]


def unusable_keyword(schema: Schema, error: str, error_of: Callable[[Schema], str]) -> str | None:
    """Returns the JSON pointer of the keyword that causes `error`; None if no keyword is found.

    The cause is a keyword without which the schema has another error or none. `error_of` returns the error of a variant
    of `schema`; an empty string if there is none. Keywords that occur in `error` are removed first, from the root down,
    then the other keywords, from the leaves up, and last the keywords that contain others. If no removal changes the
    error, which can have several causes, returns the first keyword that occurs in `error`.
    """
    words = set(re.findall(r"[$\w]+", error))
    found = list(keywords(schema))
    named = [keyword for keyword in found if keyword.name in words and keyword.name not in _FORMING]
    others = [keyword for keyword in found if keyword.name not in words and keyword.name not in _FORMING]
    forming = [keyword for keyword in found if keyword.name in _FORMING]
    deadline = time.perf_counter() + SEARCH_SECONDS
    for keyword in [*named, *reversed(others), *reversed(forming)]:
        if time.perf_counter() > deadline:
            break
        if error_of(without_keyword(schema, keyword)) != error:
            return keyword.pointer
    return named[0].pointer if named else None


def keywords(schema: Schema) -> Iterator[SchemaKeyword]:
    """Yields every keyword that has an effect, those of the root first. Definitions have an effect only if a `$ref`
    refers to them."""
    seen: set[int] = set()
    queue: deque[tuple[PointerParts, Any]] = deque([((), schema)])
    while queue:
        parts, value = queue.popleft()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        yield from (SchemaKeyword(parts, value, name) for name in value)
        queue.extend(_subschemas(parts, value))
        if (pointer := pointer_of(value.get("$ref"))) is not None:
            queue.append(((pointer,), resolve(schema, pointer)))


def _subschemas(parts: PointerParts, schema: Schema) -> Iterator[tuple[PointerParts, Any]]:
    for name in _SCHEMA_KEYWORDS:
        if name in schema:
            yield (*parts, f"/{name}"), schema[name]
    for name in _LIST_KEYWORDS:
        if isinstance(listed := schema.get(name), list):
            yield from (((*parts, f"/{name}/{index}"), value) for index, value in enumerate(listed))
    for name in _OBJECT_KEYWORDS:
        if isinstance(named := schema.get(name), dict):
            yield from (((*parts, f"/{name}/{escape(key)}"), value) for key, value in named.items())


def without_keyword(schema: Schema, keyword: SchemaKeyword) -> Schema:
    """Returns a copy of `schema` that lacks one keyword."""
    copy: Schema = renamed(schema, lambda part, name: None if part is keyword.schema and name == keyword.name else name)
    return copy


def one_of_as_any_of(schema: Schema) -> Schema:
    """Returns a copy of `schema` in which `anyOf` replaces each `oneOf` whose branches exclude each other, as the
    library supports only simple `oneOf`. Returns `schema` itself if it has no such `oneOf`."""
    disjoint = {
        id(keyword.schema)
        for keyword in keywords(schema)
        if keyword.name == "oneOf" and "anyOf" not in keyword.schema and _are_disjoint(schema, keyword.schema["oneOf"])
    }
    if not disjoint:
        return schema
    copy: Schema = renamed(schema, lambda part, name: "anyOf" if name == "oneOf" and id(part) in disjoint else name)
    return copy


def _are_disjoint(schema: Schema, branches: Any) -> bool:
    """Returns True if all branches share a discriminator, and no two branches permit the same value of it."""
    if not isinstance(branches, list) or not branches:
        return False
    resolved = [_dereferenced(schema, branch) for branch in branches]
    if len({*map(id, resolved)}) < len(
        resolved
    ):  # branches with one definition overlap; a large definition is not visited again
        return False
    discriminators = [_discriminators(branch) for branch in resolved]
    shared = set.intersection(*(set(each) for each in discriminators))
    return any(
        sum(len(each[name]) for each in discriminators)
        == len(set[str]().union(*(each[name] for each in discriminators)))
        for name in shared
    )


def _discriminators(branch: Any) -> dict[str, set[str]]:
    """Returns the discriminators of an object schema: its required properties that permit only listed strings, each
    with these strings."""
    if not isinstance(branch, dict) or branch.get("type") != "object":
        return {}
    properties, required = branch.get("properties"), branch.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    found: dict[str, set[str]] = {}
    for name in required:
        allowed = properties.get(name) if isinstance(name, str) else None
        if isinstance(allowed, dict):
            values = [allowed["const"]] if "const" in allowed else allowed.get("enum")
            if isinstance(values, list) and all(isinstance(value, str) for value in values):
                found[name] = set(values)
    return found


def _dereferenced(schema: Schema, part: Any) -> Any:
    """Returns the value to which `part` refers if `$ref` is the only keyword of `part`; otherwise returns `part`."""
    if isinstance(part, dict) and len(part) == 1 and pointer_of(part.get("$ref")) is not None:
        return resolve_reference(schema, part["$ref"])
    return part


def renamed(part: Any, rename: Callable[[Schema, str], str | None]) -> Any:
    """Returns a copy of `part` in which each key has the name that `rename` returns. Drops keys for which it returns
    None."""
    if isinstance(part, list):
        return [renamed(item, rename) for item in part]
    if not isinstance(part, dict):
        return part
    names = [(rename(part, name), value) for name, value in part.items()]
    return {name: renamed(value, rename) for name, value in names if name is not None}


def subschemas_replaced(schema: Schema, replace: Callable[[Schema], Any]) -> Any:
    """Returns a copy of `schema` in which `replace` was applied to the schema and to each subschema that has an effect,
    the outer ones first."""
    return _replaced(schema, {id(keyword.schema) for keyword in keywords(schema)}, replace)


def _replaced(part: Any, ids: set[int], replace: Callable[[Schema], Any]) -> Any:
    if isinstance(part, list):
        return [_replaced(item, ids, replace) for item in part]
    if not isinstance(part, dict):
        return part
    new = replace(part) if id(part) in ids else part
    return {name: _replaced(value, ids, replace) for name, value in new.items()} if isinstance(new, dict) else new
