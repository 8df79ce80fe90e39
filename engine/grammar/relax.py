"""The part of a JSON schema that a grammar enforces.

`simplified` drops keywords without effect; `relax_schema` also drops those that no grammar can follow, and lists them;
`rewritten` expresses some of the others by keywords that the library follows. The first two keep every JSON pointer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

import msgspec

from engine.grammar.schema import (
    JSON_TYPES,
    Schema,
    SchemaKeyword,
    check_multiples,
    keywords,
    one_of_as_any_of,
    renamed,
    subschemas_replaced,
)
from engine.grammar.spec import GrammarError

# Formats that the library enforces. Any other format is an annotation, as JSON Schema permits.
ENFORCED_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
# Keywords that describe a value and restrict nothing. The library treats `$schema` with https as unknown; without it,
# it follows the keywords of all drafts.
_ANNOTATIONS = frozenset(
    (
        *("$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("contentMediaType", "contentEncoding", "contentSchema", "$vocabulary", "$dynamicAnchor", "$recursiveAnchor"),
    )
)
# Keywords without an effect on values: annotations, and the places of definitions.
_INERT = _ANNOTATIONS | {"$defs", "definitions", "$id", "id", "$anchor"}
# Keywords whose value null is a value. For every other keyword null means that the keyword is absent.
_NULLABLE = frozenset(("const", "default", "examples"))
# Keywords that act together with another keyword only.
_COMPANIONS = {
    **dict.fromkeys(("then", "else"), "if"),
    **dict.fromkeys(("minContains", "maxContains"), "contains"),
}
# Keywords that no grammar follows in general, as a list of all values or an intersection would be needed.
_NOT_FOLLOWED = frozenset(
    (
        *("not", "if", "contains", "uniqueItems", "propertyNames", "dependencies", "dependentRequired"),
        *("dependentSchemas", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
        *("minProperties", "maxProperties"),
    )
)
# Keywords that apply schemas to the same value, so that other properties than those of `properties` may be evaluated.
_IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas", "dependencies", "not")
# Maximum bytes of the copies of `additionalProperties` that replace one `propertyNames`.
_MAX_COPIED_BYTES = 2**13
# The keyword that marks a `oneOf` whose branches may overlap; `rewritten` makes it an `anyOf`.
_OVERLAPPING = "x-overlapping-one-of"
# A schema in a Lark grammar as group 1, or a comment, literal or regular expression, which is skipped.
_LARK_PART = re.compile(r"""//[^\n]*|"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|(%json\s*)(?={)""")


class RelaxedSchema(NamedTuple):
    """A schema without the keywords that are not enforced, and the JSON pointers of these keywords."""

    schema: Schema
    unenforced: tuple[str, ...]


def relax_schema(schema: Schema, *, strict: bool) -> RelaxedSchema:
    """Returns the part of `schema` that a grammar can follow. With `strict` only keywords without effect are dropped.

    >>> relax_schema({"type": "array", "uniqueItems": True, "minItems": 1}, strict=False)
    RelaxedSchema(schema={'type': 'array', 'minItems': 1}, unenforced=('/uniqueItems',))
    """
    schema = simplified(schema)
    if strict:
        return RelaxedSchema(schema, ())
    dropped = [each for each in keywords(schema) if each.name in _NOT_FOLLOWED and not _can_be_rewritten(each)]
    try:
        check_multiples(schema)
    except GrammarError:
        dropped += [each for each in keywords(schema) if each.name == "multipleOf"]
    return RelaxedSchema(_without(schema, dropped), tuple(each.pointer for each in dropped))


def drop_keyword(relaxed: RelaxedSchema, pointer: str) -> RelaxedSchema | None:
    """Returns `relaxed` without the keyword at `pointer`; None if no keyword is there. A `oneOf` becomes an `anyOf`."""
    found = next((each for each in keywords(relaxed.schema) if each.pointer == pointer), None)
    if found is None:
        return None
    unenforced = (*relaxed.unenforced, pointer)
    branches = found.schema[found.name]
    if found.name == "oneOf" and isinstance(branches, list) and branches and _OVERLAPPING not in found.schema:
        marked = subschemas_replaced(
            relaxed.schema, lambda part: {**part, _OVERLAPPING: True} if part is found.schema else part
        )
        return RelaxedSchema(marked, unenforced)
    return RelaxedSchema(_without(relaxed.schema, [found]), unenforced)


def simplified(schema: Schema) -> Schema:
    """Returns `schema` without the keywords that restrict nothing. The values that it permits stay the same."""
    return _without(schema, [each for each in keywords(schema) if _has_no_effect(each)])


def rewritten(schema: Schema) -> Schema:
    """Returns `schema` in keywords that the library follows: `anyOf` for a `oneOf` without overlap, `false` for
    `not: {}`, types for `not` of a type, and properties for the names that `propertyNames` lists."""
    copy: Schema = subschemas_replaced(one_of_as_any_of(schema), _rewritten_part)
    return copy


def rewritten_lark(text: str) -> str:
    """Returns a Lark grammar with its JSON schemas (`%json {...}`) simplified and rewritten. A schema that is not valid
    JSON, or that permits no value, is unchanged."""
    parts, end = [], 0
    for found in _LARK_PART.finditer(text):
        if found[1] is None or found.start() < end:
            continue
        try:
            schema, after = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            continue
        if followable := rewritten(simplified(schema)):
            parts += [text[end : found.end()], json.dumps(followable)]
            end = after
    return "".join((*parts, text[end:]))


def _without(schema: Schema, dropped: Iterable[SchemaKeyword]) -> Schema:
    """Returns a copy of `schema` that lacks keywords, each with its companions."""
    names = {(id(each.schema), each.name) for each in dropped}
    if not names:
        return schema
    copy: Schema = renamed(
        schema,
        lambda part, name: None if {(id(part), name), (id(part), _COMPANIONS.get(name))} & names else name,
    )
    return copy


# ── keywords without effect ──


def permits_everything(schema: Any) -> bool:
    """Returns True if `schema` has no keyword that restricts values.

    >>> permits_everything({"title": "any"}), permits_everything({"type": "string"})
    (True, False)
    """
    return schema is True or (isinstance(schema, dict) and schema.keys() <= _INERT)


def _has_no_effect(keyword: SchemaKeyword) -> bool:
    schema, name = keyword.schema, keyword.name
    value = schema[name]
    if name in _ANNOTATIONS or (value is None and name not in _NULLABLE):
        return True
    if (companion := _COMPANIONS.get(name)) is not None:
        return schema.get(companion) is None
    test = _EFFECTLESS.get(name)
    return test is not None and test(value, schema)


def _is_annotation(value: Any, schema: Schema) -> bool:
    return isinstance(value, str) and value not in ENFORCED_FORMATS


def _permits_all_names(value: Any, schema: Schema) -> bool:
    """Returns True if every string, and so every name, is valid by `value`."""
    if not isinstance(value, dict):
        return value is True
    kinds = value.get("type", "string")
    strings = kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    return strings and permits_everything({name: each for name, each in value.items() if name != "type"})


def _is_always_unique(value: Any, schema: Schema) -> bool:
    most = schema.get("maxItems")
    return value is False or (_is_count(most) and most <= 1)


def _always_contains(value: Any, schema: Schema) -> bool:
    least: Any = schema.get("minContains", 1)
    enough: Any = schema.get("minItems")
    satisfied = permits_everything(value) and _is_count(enough) and _is_count(least) and enough >= least
    return schema.get("maxContains") is None and (least == 0 or satisfied)


def _excludes_nothing(value: Any, schema: Schema) -> bool:
    return value is False or (isinstance(value, dict) and "not" in value and permits_everything(value["not"]))


def _has_no_consequence(value: Any, schema: Schema) -> bool:
    return all(schema.get(name) is None or permits_everything(schema[name]) for name in ("then", "else"))


def _has_no_dependency(value: Any, schema: Schema) -> bool:
    return isinstance(value, dict) and all(each == [] or permits_everything(each) for each in value.values())


def _is_reached_by_required(value: Any, schema: Schema) -> bool:
    return _is_count(value) and value <= len(_required_names(schema))


def _required_names(schema: Schema) -> set[str]:
    required = schema.get("required")
    return {each for each in required if isinstance(each, str)} if isinstance(required, list) else set()


def _exceeds_properties(value: Any, schema: Schema) -> bool:
    known = schema.get("properties")
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    return closed and isinstance(known, dict) and _is_count(value) and value >= len(known)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


# For each keyword, the test that is true for a value with which the keyword restricts nothing in its schema.
_EFFECTLESS: dict[str, Callable[[Any, Schema], bool]] = {
    "format": _is_annotation,
    "propertyNames": _permits_all_names,
    "uniqueItems": _is_always_unique,
    "contains": _always_contains,
    "not": _excludes_nothing,
    "if": _has_no_consequence,
    "dependencies": _has_no_dependency,
    "dependentRequired": _has_no_dependency,
    "dependentSchemas": _has_no_dependency,
    "unevaluatedProperties": lambda value, schema: permits_everything(value),
    "unevaluatedItems": lambda value, schema: permits_everything(value),
    "patternProperties": lambda value, schema: value == {},
    "pattern": lambda value, schema: value == "",
    "minProperties": _is_reached_by_required,
    "maxProperties": _exceeds_properties,
}


# ── keywords that others express ──


def _can_be_rewritten(keyword: SchemaKeyword) -> bool:
    """Returns True if `rewritten` expresses the keyword by others, or the library follows it in this schema."""
    part = keyword.schema
    match keyword.name:
        case "not":
            return permits_everything(part["not"]) or _complement(part) is not None
        case "propertyNames":
            return _listed_names(part) is not None or _name_pattern(part) is not None
        case "minProperties" | "maxProperties":
            known = part.get("properties")
            return not isinstance(known, dict) or known.keys() <= _required_names(part)
        case "unevaluatedProperties":
            return part["unevaluatedProperties"] is False and not any(name in part for name in _IN_PLACE)
    return False


def _rewritten_part(part: Schema) -> Any:
    """Returns one subschema in keywords that the library follows."""
    if "not" in part and permits_everything(part["not"]):
        return False
    if "not" in part and (types := _complement(part)) is not None:
        part = {**_omitting(part, "not"), "type": types}
    if "propertyNames" in part and (names := _listed_names(part)) is not None:
        part = _with_listed_properties(part, names)
    elif "propertyNames" in part and (pattern := _name_pattern(part)) is not None:
        patterns = {pattern: part.get("additionalProperties", True)}
        part = {**_omitting(part, "propertyNames"), "patternProperties": patterns, "additionalProperties": False}
    if part.get("unevaluatedProperties") is False and not any(name in part for name in _IN_PLACE):
        part = {"additionalProperties": False, **_omitting(part, "unevaluatedProperties")}
    if _OVERLAPPING in part:
        part = _with_any_of(part)
    return part


def _complement(part: Schema) -> list[str] | None:
    """Returns the types that remain if `not` has no keyword but `type`. Returns None if another form is needed."""
    excluded = part["not"]
    if not isinstance(excluded, dict) or not permits_everything(_omitting(excluded, "type")):
        return None
    kinds, allowed = _type_list(excluded.get("type")), _type_list(part.get("type", list(JSON_TYPES)))
    if not kinds or not allowed or ("integer" in kinds and "number" not in kinds and "number" in allowed):
        return None
    excluded_kinds = {*kinds, "integer"} if "number" in kinds else {*kinds}
    return [kind for kind in allowed if kind not in excluded_kinds] or None


def _type_list(value: Any) -> list[str]:
    """Returns the valid types in the value of `type`; empty if one of them is invalid."""
    listed = value if isinstance(value, list) else [value]
    return listed if all(kind in JSON_TYPES for kind in listed) else []


def _listed_names(part: Schema) -> list[str] | None:
    """Returns the names that `propertyNames` lists; None if it has another form, or the schema other properties."""
    names = part["propertyNames"]
    if not isinstance(names, dict) or part.get("patternProperties"):
        return None
    listed = names.get("enum", [names["const"]] if "const" in names else None)
    rest = {name: value for name, value in names.items() if name not in ("enum", "const")}
    known = part.get("properties") or {}
    if not isinstance(listed, list) or not _permits_all_names(rest, {}) or not isinstance(known, dict):
        return None
    strings = [name for name in listed if isinstance(name, str)]
    copied = msgspec.json.encode(part.get("additionalProperties"))
    if len(copied) * len(strings) > _MAX_COPIED_BYTES or b'"propertyNames"' in copied:
        return None
    return strings if known.keys() <= {*strings} else None


def _name_pattern(part: Schema) -> str | None:
    """Returns the pattern of the names; None if `propertyNames` has another form, or the schema other properties."""
    names = part["propertyNames"]
    if not isinstance(names, dict) or part.get("properties") or part.get("patternProperties"):
        return None
    pattern, rest = names.get("pattern"), {name: value for name, value in names.items() if name != "pattern"}
    return pattern if isinstance(pattern, str) and _permits_all_names(rest, {}) else None


def _with_listed_properties(part: Schema, names: list[str]) -> Schema:
    """Returns `part` with the other properties of a map as properties, one for each name."""
    other = part.get("additionalProperties", True)
    properties = dict(part.get("properties") or {})
    for name in names:
        properties.setdefault(name, other)
    return {**_omitting(part, "propertyNames"), "properties": properties, "additionalProperties": False}


def _with_any_of(part: Schema) -> Schema:
    """Returns `part` with `anyOf` instead of `oneOf`."""
    if _OVERLAPPING not in part or "oneOf" not in part:
        return part
    branches = {"anyOf": part["oneOf"]}
    rest = _omitting(part, "oneOf", _OVERLAPPING)
    if "anyOf" not in rest:
        return {**rest, **branches}
    others = rest.get("allOf")
    return {**rest, "allOf": [*(others if isinstance(others, list) else ()), branches]}


def _omitting(part: Mapping[str, Any], *names: str) -> Schema:
    return {name: value for name, value in part.items() if name not in names}
