"""Parses the `speculative` field of a request: the proposer types and their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from api.config.spelling import PROPOSER_TYPE_ALIASES
from api.http.decode_errors import as_refusal, choices_hint, nearest_hint
from engine import PROPOSER_TYPES, ProposerType, RequestRefused, Speculation

# A request's `speculative` field.
SpeculativeField = bool | str | dict[str, Any] | None

_TYPES = (*PROPOSER_TYPES, "auto", "none")
_FIELDS = Speculation.__struct_fields__


def parse_speculation(
    field: bool | str | Mapping[str, Any] | None, default_types: Iterable[ProposerType]
) -> Speculation | None:
    """Returns the parameters in a request's `speculative` field. None means that the request has no such field.

    False, or `none` among the types, disables speculation. True, or an object without types, selects
    `default_types`, or all types if there are no default types. Raises RequestRefused, which names the field.
    """
    match field:
        case None:
            return None
        case False:
            return Speculation()
        case True:
            return _parse_object({}, default_types)
        case str():
            return msgspec.convert({"type": _parse_types([field], ["speculative"])}, Speculation)
    return _parse_object({name: value for name, value in field.items() if value is not None}, default_types)


def with_dotted_fields(field: SpeculativeField, dotted: Mapping[str, Any]) -> SpeculativeField:
    """Returns `field` with the values in `dotted` that are not None. Values in an object `field` have priority.

    `n_max` 0, llama-server's spelling of no drafts, and the field false disable speculation.
    """
    given = {name: value for name, value in dotted.items() if value is not None}
    if field is False or not given:
        return field
    if type(given.get("n_max")) is int and given["n_max"] == 0:
        return False
    match field:
        case str():
            return given | {"type": field}
        case dict():
            return given | {name: value for name, value in field.items() if value is not None}
    return given


def _parse_object(fields: dict[str, Any], default_types: Iterable[ProposerType]) -> Speculation:
    for name in fields:
        if name not in _FIELDS:
            path = f"speculative.{name[:64]}"
            raise RequestRefused(f"{path}: there is no such field{nearest_hint(name, _FIELDS)}", field=path)
    match fields.setdefault("type", list(default_types) or "auto"):
        case str(name):
            fields["type"] = _parse_types([name], ["speculative.type"])
        case list(names):
            fields["type"] = _parse_types(names, [f"speculative.type[{index}]" for index in range(len(names))])
    try:
        speculation = msgspec.convert(fields, Speculation)
    except msgspec.ValidationError as error:
        raise as_refusal(error, Speculation, fields, "speculative") from None
    n_min, n_max = speculation.n_min, speculation.n_max
    if n_min is not None and n_max is not None and n_min > n_max:
        raise RequestRefused(
            f"speculative.n_min: {n_min} is above n_max; set it to at most {n_max}.", field="speculative.n_min"
        )
    return speculation


def _parse_types(names: Sequence[object], paths: Sequence[str]) -> list[str]:
    """Returns the proposer types without duplicates, with llama-server's names replaced.

    The list is empty if `names` contains `none`. `paths` are the field paths of the names, for errors.
    """
    types: list[str] = []
    for name, path in zip(names, paths, strict=True):
        if not isinstance(name, str):
            raise RequestRefused(f"{path}: {str(name)[:32]} is not a string; use a proposer type.", field=path)
        types.append(PROPOSER_TYPE_ALIASES.get(name, name))
        if types[-1] not in _TYPES:
            raise RequestRefused(f"{path}: there is no type {name[:64]!r}{choices_hint(name, _TYPES)}", field=path)
    return [] if "none" in types else list(dict.fromkeys(types))
