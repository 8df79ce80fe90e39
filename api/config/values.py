"""Values of settings: texts from the command line, the environment or a preset, converted to the field's type."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import inspect

from api.config.flags import Flag
from api.config.spelling import MISSING_PROPOSER_TYPES, PROPOSER_TYPE_ALIASES
from api.http.decode_errors import choices_hint, quoted

# Words for booleans, as llama-server spells them.
BOOLEAN_WORDS = {
    **dict.fromkeys(("true", "1", "on", "enabled"), True),
    **dict.fromkeys(("false", "0", "off", "disabled"), False),
}
# Python's stand-ins for bytes of the command line that are not UTF-8.
_NOT_UTF8 = re.compile(r"[\ud800-\udfff]")
# Numbers as llama-server takes them: JSON, whose rules msgspec applies to texts, has no .5, 5. and +1.
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,40}")
_DECIMAL_NUMBER = re.compile(r"[+-]?([0-9]{1,40}\.?|[0-9]{0,40}\.[0-9]{1,40})")


class OptionError(Exception):
    """Invalid options. The message is one line with the option and the expected value."""


def convert_value(flag: Flag, given: Any, source: str) -> object:
    """Returns the value of the flag's field. UNSET means the default.

    `given` is a text, a list of texts for a repeatable flag or one with several values, or a boolean for a switch on
    the command line. `source` names the flag or the variable in errors. Raises OptionError.
    """
    texts = [given] if isinstance(given, str) else [] if isinstance(given, bool) else given
    if any(map(_NOT_UTF8.search, texts)):
        raise OptionError(f"{source}: expected a text in UTF-8, not {given!r:.200}")
    value = _normalized(flag, given, source)
    if value is msgspec.UNSET:
        return value
    try:
        return msgspec.to_builtins(msgspec.convert(value, flag.type, strict=False))
    except msgspec.ValidationError:
        shown = " ".join(given) if flag.arity > 1 else given
        raise OptionError(f"{source}: expected {flag.expects}, not {quoted(shown)}") from None


def _normalized(flag: Flag, given: Any, source: str) -> Any:
    """Returns `given` in the form that msgspec converts, with llama-server's words replaced. UNSET means the default.
    Raises OptionError."""
    if flag.repeatable:
        return resolve_aliases(flag, split_words(flag, given), source)
    if not isinstance(given, str):
        return given
    if given in flag.aliases:
        return flag.aliases[given] or msgspec.UNSET
    if flag.switch:
        return BOOLEAN_WORDS.get(given, given)
    if flag.three_way:
        on = BOOLEAN_WORDS.get(given)
        return {True: "on", False: "off", None: "auto" if given == "-1" else given}[on]
    if isinstance(flag.kind, inspect.FloatType) and _DECIMAL_NUMBER.fullmatch(given):
        return float(given)
    if isinstance(flag.kind, inspect.IntType) and _WHOLE_NUMBER.fullmatch(given):
        return int(given)
    return given


def split_words(flag: Flag, texts: Sequence[str]) -> list[str]:
    """Returns the values in `texts`. A text holds several values if the flag is `comma_separated`."""
    if not flag.comma_separated:
        return list(texts)
    return [word for text in texts for each in text.split(",") if (word := each.strip())]


def resolve_aliases(flag: Flag, given: Any, source: str) -> Any:
    """Returns `given`, with llama-server's names in a list of choices replaced. Raises OptionError for other names."""
    if not flag.choices or not isinstance(given, list):
        return given
    names = [PROPOSER_TYPE_ALIASES.get(name, name) if isinstance(name, str) else name for name in given]
    for name in names:
        if name in MISSING_PROPOSER_TYPES:
            raise OptionError(
                f"{source}: {name} needs inputs of the model's layers, which llama.cpp's C API does not return; use "
                "draft with -md, draft-mtp, or auto"
            )
        if isinstance(name, str) and name not in flag.choices:
            raise OptionError(f"{source}: unknown value {name!r}{choices_hint(name, flag.choices)}")
    return names
