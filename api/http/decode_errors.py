"""Converts msgspec's validation errors to refusals in plain words, and suggests valid names for unknown ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

import msgspec
from msgspec import UNSET, inspect

from engine import RequestRefused

# Names are cut to this length, because comparing takes quadratic time and clients may send megabytes.
_COMPARED_CHARS = 64
# Names that are less similar than this, on difflib's scale from 0 to 1, are not suggested.
_MIN_SIMILARITY = 0.6
# Longer texts of a client are described in a message, not quoted.
_QUOTED_CHARS = 64
# Numbers from here on are written as powers of two.
_LARGE_NUMBER = 2**31 - 1

# The parts of msgspec's message. The path has names of fields and indices only, no text of the client.
_MESSAGE = re.compile(r"(.*?)(?: - at (`key` in )?`\$([^`]*)`)?", re.DOTALL)
_STEP = re.compile(r"(\w+)|\[(\d+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_WRONG_VALUE = re.compile(r"Expected `|Invalid |\w+ out of range")
_WRONG_TYPE = re.compile(r".*, got `(\w+)`", re.DOTALL)

# msgspec's names of JSON types, in words.
_GIVEN_TYPES = {
    "null": "null",
    "bool": "a boolean",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "array": "a list",
    "object": "an object",
}


def as_refusal(error: msgspec.ValidationError, expected: Any, given: Any, parent: str = "") -> RequestRefused:
    """Returns `error` as a RequestRefused: the field, the expected value in words, and the given value.

    `expected` is the type for which msgspec refused `given`, which is UNSET if the value is not known. `field` is the
    dotted path of the wrong, missing or unknown field, with `parent` as a prefix.

    >>> as_refusal(msgspec.ValidationError("Expected `int`, got `str` - at `$[1]`"), list[int], [1, "x"], "stop")
    RequestRefused("stop[1]: expected a whole number, not 'x'")
    """
    reason, key, path = _parts(error)
    kind, value = _at(_type_info(expected), given, path)
    field = f"{parent}{path}".lstrip(".")
    if found := _MISSING.fullmatch(reason) or _UNKNOWN.fullmatch(reason):
        name = found[1]
        field = f"{field}.{name[:_COMPARED_CHARS]}".lstrip(".")
        if found.re is _MISSING:
            message = f"{field}: the field is missing; expected {describe_type(_member(kind, name))}"
        else:
            message = f"{field}: there is no such field{nearest_hint(name, _field_names(kind))}"
        return RequestRefused(message, field=field)
    if not _WRONG_VALUE.match(reason):  # the message of a `__post_init__`
        return RequestRefused(f"{field}: {reason}" if field else reason, field=field or None)
    if key:
        return RequestRefused(f"{field}: each key must be {describe_type(_key_type(kind))}", field=field or None)
    message = f"{field or 'body'}: expected {describe_type(kind)}"
    if value is not UNSET:
        message += f", not {quoted(value)}"
    elif found := _WRONG_TYPE.fullmatch(reason):
        message += f", not {_GIVEN_TYPES.get(found[1], found[1])}"
    return RequestRefused(message, field=field or None)


def path_of_wrong_type(error: msgspec.ValidationError) -> str | None:
    """Returns the dotted path of the field whose value has a wrong type. Returns None for any other error."""
    reason, _, path = _parts(error)
    return path.lstrip(".") if _WRONG_TYPE.fullmatch(reason) else None


def _parts(error: msgspec.ValidationError) -> tuple[str, bool, str]:
    """Returns the reason, whether the error is in the key of an object, and the path of the value."""
    parts = _MESSAGE.fullmatch(str(error))
    assert parts is not None
    return parts[1], bool(parts[2]), parts[3] or ""


# ── types ──


_type_info = cache(inspect.type_info)


def describe_type(kind: inspect.Type | None) -> str:
    """Returns the values of a type in words, null excepted. None and unsupported types allow any value.

    >>> describe_type(inspect.type_info(float | None))
    'a number'
    """
    match kind:
        case inspect.Metadata():
            return describe_type(kind.type)
        case inspect.UnionType():
            parts = (describe_type(part) for part in kind.types if not isinstance(part, inspect.NoneType))
            return " or ".join(dict.fromkeys(parts))
        case inspect.LiteralType(values=(value,)):
            return repr(value)
        case inspect.LiteralType():
            return "one of " + ", ".join(map(str, kind.values))
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "a whole number" + _range(kind)
        case inspect.FloatType():
            return "a number" + _range(kind)
        case inspect.StrType():
            pattern = f" that matches the regular expression {kind.pattern}" if kind.pattern else ""
            return "a string" + _length(kind.min_length, kind.max_length, "character") + pattern
        case inspect.ListType() | inspect.VarTupleType():
            return "a list" + _length(kind.min_length, kind.max_length, "item")
        case inspect.TupleType():
            return "a list" + _length(len(kind.item_types), len(kind.item_types), "item")
        case inspect.DictType():
            return "an object" + _length(kind.min_length, kind.max_length, "field")
        case inspect.StructType():
            return "an object"
    return "any value"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    least = f" above {_number(kind.gt)}" if kind.gt is not None else ""
    most = f" below {_number(kind.lt)}" if kind.lt is not None else ""
    multiple = f" that is a multiple of {kind.multiple_of:g}" if kind.multiple_of is not None else ""
    if kind.ge is not None and kind.le is not None:
        return f" from {_number(kind.ge)} to {_number(kind.le)}{multiple}"
    if kind.ge is not None:
        least = f" of at least {_number(kind.ge)}"
    if kind.le is not None:
        most = f", up to {_number(kind.le)}" if least else f" of at most {_number(kind.le)}"
    return f"{least}{' and' if least and kind.lt is not None else ''}{most}{multiple}"


def _number(value: float) -> str:
    """Returns the number in digits, or large whole numbers next to a power of two as that power."""
    if abs(value) >= _LARGE_NUMBER and value == int(value):
        size, sign = abs(int(value)), "-" if value < 0 else ""
        for offset, text in ((0, ""), (1, " - 1")):
            if (size + offset).bit_count() == 1 and (not offset or not sign):
                return f"{sign}2^{(size + offset).bit_length() - 1}{text}"
    return f"{value:.10g}"


def _length(least: int | None, most: int | None, unit: str) -> str:
    if least is not None and most is not None:
        return f" of {least} {unit}s" if least == most else f" of {least} to {most} {unit}s"
    if most is not None:
        return f" of at most {most} {unit}s"
    return "" if least is None else f" of at least {least} {unit}{'s' if least != 1 else ''}"


def _at(kind: inspect.Type | None, value: Any, path: str) -> tuple[inspect.Type | None, Any]:
    """Returns the type and the value at `path`; the type is None, or the value is UNSET, if it is not known."""
    for name, index in _STEP.findall(path):
        kind = _member(kind, name) if name else _item(kind, index)
        if name:
            value = value.get(name, UNSET) if isinstance(value, Mapping) else UNSET
        else:
            value = value[int(index)] if isinstance(value, list | tuple) and index.isdecimal() else UNSET
    return kind, value


def _alternatives(kind: inspect.Type | None) -> Iterable[inspect.Type]:
    match kind:
        case None:
            return ()
        case inspect.Metadata():
            return _alternatives(kind.type)
        case inspect.UnionType():
            return [each for part in kind.types for each in _alternatives(part)]
    return (kind,)


def _member(kind: inspect.Type | None, name: str) -> inspect.Type | None:
    """Returns the type of the field `name` of an object."""
    for part in _alternatives(kind):
        for field in part.fields if isinstance(part, inspect.StructType) else ():
            if field.encode_name == name:
                return field.type
    return None


def _item(kind: inspect.Type | None, index: str) -> inspect.Type | None:
    """Returns the type of an item of a list, or of the values of an object without fixed fields, whose index is
    `...`."""
    for part in _alternatives(kind):
        match part:
            case inspect.DictType() if not index.isdecimal():
                return part.value_type
            case inspect.ListType() | inspect.VarTupleType() if index.isdecimal():
                return part.item_type
            case inspect.TupleType() if index.isdecimal():
                return part.item_types[int(index)]
    return None


def _key_type(kind: inspect.Type | None) -> inspect.Type | None:
    return next((part.key_type for part in _alternatives(kind) if isinstance(part, inspect.DictType)), None)


def _field_names(kind: inspect.Type | None) -> list[str]:
    structs = (part for part in _alternatives(kind) if isinstance(part, inspect.StructType))
    return [field.encode_name for struct in structs for field in struct.fields]


# ── texts ──


def quoted(value: object) -> str:
    """Returns a client's value for a message: short values as they are, long ones described.

    >>> quoted(None), quoted("x"), quoted([1, 2]), quoted("x" * 999)
    ('null', "'x'", 'a list of 2 items', 'a string of 999 characters')
    """
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() if value.bit_length() > 4 * _QUOTED_CHARS:
            return "a far larger number" if value > 0 else "a far smaller number"
        case str() if len(value) > _QUOTED_CHARS:
            return f"a string of {len(value)} characters"
        case list() | tuple():
            return f"a list of {len(value)} item{'s' if len(value) != 1 else ''}"
        case Mapping():
            return "an object"
    return repr(value)[: 2 * _QUOTED_CHARS]


def nearest_hint(name: str, valid_names: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown `name`; empty if no valid name is similar. Dashes at the
    start of flags are not compared.

    >>> nearest_hint("sufix", ["draft", "suffix"]), nearest_hint("foo", ["fit"])
    ('; the nearest is suffix', '')
    """
    names = {valid.lstrip("-"): valid for valid in valid_names}
    close = get_close_matches(name.lstrip("-")[:_COMPARED_CHARS], names, n=1, cutoff=_MIN_SIMILARITY)
    return f"; the nearest is {names[close[0]]}" if close else ""


def choices_hint(name: str, valid_names: Iterable[str]) -> str:
    """Returns `nearest_hint`, or a list of all valid names if none is similar to `name`.

    >>> choices_hint("x", ["save", "restore"])
    '; expected one of save, restore'
    """
    names = list(valid_names)
    return nearest_hint(name, names) or f"; expected one of {', '.join(names)}"
