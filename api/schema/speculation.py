"""`speculative` of a request: who is to guess for it, and how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from api.config.flags import RENAMED
from api.http.decode_errors import nearest, refused
from engine import PROPOSER_TYPES, ProposerType, RequestRefused, Speculation

_TYPES = (*PROPOSER_TYPES, "auto", "none")
_FIELDS = Speculation.__struct_fields__


def speculation_of(wish: bool | str | Mapping[str, Any] | None, default: Iterable[ProposerType]) -> Speculation | None:
    """What a request says about guessing; None if it says nothing. Raises RequestRefused, which names the field.

    False, or `none` among the types, is nobody. True, or an object without types, is those of the server's `default`,
    and if they are none, everyone.
    """
    match wish:
        case None:
            return None
        case False:
            return Speculation()
        case True:
            return _made({}, default)
        case str():
            return msgspec.convert({"type": _types([wish], ["speculative"])}, Speculation)
    return _made({name: value for name, value in wish.items() if value is not None}, default)


def _made(wish: dict[str, Any], default: Iterable[ProposerType]) -> Speculation:
    for name in wish:
        if name not in _FIELDS:
            path = f"speculative.{name[:64]}"
            raise RequestRefused(f"{path}: there is no such field{nearest(name, _FIELDS)}", field=path)
    match wish.setdefault("type", list(default) or "auto"):
        case str(name):
            wish["type"] = _types([name], ["speculative.type"])
        case list(names):
            wish["type"] = _types(names, [f"speculative.type[{index}]" for index in range(len(names))])
    try:
        made = msgspec.convert(wish, Speculation)
    except msgspec.ValidationError as error:
        raise refused(error, "speculative") from None
    if made.n_min is not None and made.n_max is not None and made.n_min > made.n_max:
        raise RequestRefused("speculative.n_min is above n_max: no draft could be both", field="speculative.n_min")
    return made


def _types(names: Sequence[object], paths: Sequence[str]) -> list[str]:
    """The types by our names, none of them twice; empty if nobody is to guess."""
    types: list[str] = []
    for name, path in zip(names, paths, strict=True):
        if not isinstance(name, str):
            raise RequestRefused(f"{path}: a type is a text", field=path)
        types.append(RENAMED.get(name, name))
        if types[-1] not in _TYPES:
            raise RequestRefused(f"{path}: there is no type {name[:64]!r}{nearest(name, _TYPES)}", field=path)
    return [] if "none" in types else list(dict.fromkeys(types))
