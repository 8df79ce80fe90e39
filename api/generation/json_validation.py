"""Checks a finished JSON text against a whole JSON schema, within limits of time and without any access to files or
networks."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import msgspec

from engine import resolve_reference

# Maximum of the number of values in a schema, its references expanded, times the characters of the text. The validator
# holds the GIL, and takes about 50 ns for each of these.
MAX_VALIDATION_WORK = 2**22
# Maximum steps back of one match of a pattern with look-around.
_BACKTRACK_LIMIT = 10_000
# Keywords whose meaning later drafts changed, in compact JSON.
_OLD_KEYWORDS = (b'"items":[', b'"dependencies":', b'"additionalItems":')


def satisfies_schema(text: str, schema: dict[str, Any]) -> bool | None:
    """Returns whether the JSON in `text` is valid by `schema`. Formats are annotations.

    Returns None if that cannot be told: `text` is no JSON, such as a truncated output; or the schema is invalid, refers
    to itself or to another document, or takes too long.
    """
    try:
        value = msgspec.json.decode(text)
        if _expanded_size(schema, schema, {}) * len(text) > MAX_VALIDATION_WORK:
            return None
        return _validator(schema).is_valid(value)
    # RecursionError: nested values, or a schema that refers to itself. ValueError: an invalid schema.
    except (msgspec.DecodeError, ValueError, RecursionError, jsonschema_rs.ReferencingError):
        return None


def _expanded_size(part: Any, root: dict[str, Any], sizes: dict[str, int]) -> int:
    """Returns the number of values in a part of a schema, each reference replaced by its definition. Raises
    RecursionError if a definition refers to itself. `sizes` has the sizes of definitions."""
    if isinstance(part, list):
        return 1 + sum(_expanded_size(each, root, sizes) for each in part)
    if not isinstance(part, dict):
        return 1
    size = 1 + sum(_expanded_size(each, root, sizes) for each in part.values())
    if isinstance(reference := part.get("$ref"), str):
        if reference not in sizes:
            sizes[reference] = -1
            sizes[reference] = _expanded_size(resolve_reference(root, reference), root, sizes)
        if sizes[reference] < 0:
            raise RecursionError
        size += sizes[reference]
    return size


def _validator(schema: dict[str, Any]) -> jsonschema_rs.Validator:
    """Returns a validator. Raises ValueError for an invalid schema."""
    encoded = msgspec.json.encode(schema)
    old = any(keyword in encoded for keyword in _OLD_KEYWORDS)
    draft = jsonschema_rs.Draft7Validator if old else jsonschema_rs.Draft202012Validator
    try:
        return draft(
            schema, validate_formats=False, retriever=_refuse_document, pattern_options=jsonschema_rs.RegexOptions()
        )
    except ValueError:  # a pattern with look-around, which only the other engine has
        options = jsonschema_rs.FancyRegexOptions(backtrack_limit=_BACKTRACK_LIMIT)
        return draft(schema, validate_formats=False, retriever=_refuse_document, pattern_options=options)


def _refuse_document(uri: str) -> Any:
    raise ValueError(f"{uri[:64]} is another document")
