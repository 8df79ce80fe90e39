"""Parses the options of `paceline serve`: flags override environment variables, which override the file."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from api.config.flags import FLAGS, HEADINGS, Flag
from api.config.options import Options
from api.config.spellings import IGNORED_FLAGS, IGNORED_FLAGS_WITH_VALUE, PROPOSER_TYPE_ALIASES
from api.http.decode_errors import choices_hint, describe_type, nearest_hint, quoted
from engine import SIMULATED_MODEL

# Booleans in environment variables, as llama-server spells them.
_BOOLEANS = {
    **dict.fromkeys(("true", "1", "on", "enabled"), True),
    **dict.fromkeys(("false", "0", "off", "disabled"), False),
}


# argparse's message about `--switch=value`.
_VALUE_OF_A_SWITCH = re.compile(r"argument (\S+): ignored explicit argument .*", re.DOTALL)


class OptionError(Exception):
    """Invalid options. The message is one line with the option and the expected value."""


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that raises OptionError for invalid arguments instead of exiting."""

    def error(self, message: str) -> NoReturn:
        if found := _VALUE_OF_A_SWITCH.fullmatch(message):
            names = found[1].split("/")
            switch = [name for name in names if name.startswith("--")][-2:]
            raise OptionError(f"{(switch or names)[0]} takes no value: use {' or '.join(switch or names)}")
        raise OptionError(message.removeprefix("argument "))


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Options:
    """Returns the options. Raises OptionError; for `--help` prints the help and raises SystemExit(0).

    An empty environment variable counts as unset.
    """
    given, rest = _parser().parse_known_args([_dashed(argument) for argument in arguments])
    if rest:
        raise OptionError(_unknown_argument(rest))
    values: dict[str, Any] = vars(given)
    tables = _read_file(values.pop("config")) if "config" in values else {}
    for flag in FLAGS:
        if flag.dest in values:
            value = _convert(flag, values[flag.dest], flag.spelled)
        elif text := (environment or {}).get(flag.env):
            value = _convert(flag, [text] if flag.repeatable else text, flag.env)
        else:
            continue
        tables.setdefault(flag.table, {})[flag.field] = value
    if tables.get("sim", {}).get("on"):
        tables.setdefault("model", {}).setdefault("path", SIMULATED_MODEL)
    if not tables.get("model", {}).get("path"):
        raise OptionError("no model is given: name a GGUF file with -m")
    return msgspec.convert(tables, Options)


def _parser() -> CommandParser:
    """Returns a parser that leaves values as text; `_convert` checks them."""
    parser = CommandParser(
        prog="paceline serve",
        description="Serves a GGUF model to many clients at once, over OpenAI's API.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same settings; flags override it")
    for table, heading in HEADINGS.items():
        group = parser.add_argument_group(heading)
        for flag in FLAGS:
            if flag.table == table:
                _add(group, flag)
    for name in IGNORED_FLAGS:
        parser.add_argument(name, action="store_const", const=None, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name in IGNORED_FLAGS_WITH_VALUE:
        parser.add_argument(name, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    allowed, variable = f"{flag.allowed}; " if flag.allowed else "", f"; env: {flag.env}" if flag.env else ""
    text = f"{flag.help} ({allowed}default: {flag.default_text}{variable})".replace("%", "%%")
    if flag.switch:
        group.add_argument(
            *flag.names, dest=flag.dest, action=argparse.BooleanOptionalAction, help=text, default=argparse.SUPPRESS
        )
        return
    action = "append" if flag.repeatable else "store"
    group.add_argument(*flag.names, dest=flag.dest, action=action, metavar=flag.metavar, help=text)


def _convert(flag: Flag, given: Any, source: str) -> object:
    """Returns the value of the flag's field.

    `given` is a text, a list of texts for a repeatable flag, or a boolean for a switch on the command line. `source`
    names the flag or the variable in errors. Raises OptionError.
    """
    if flag.repeatable:
        given = _words(flag, given)
    if flag.switch:
        given = _BOOLEANS.get(given, given)
    try:
        return msgspec.to_builtins(msgspec.convert(_resolve_aliases(flag, given, source), flag.type, strict=False))
    except msgspec.ValidationError:
        raise OptionError(f"{source}: expected {flag.expects}, not {quoted(given)}") from None


def _words(flag: Flag, texts: Sequence[str]) -> list[str]:
    """Returns the values in `texts`, of which each may hold several if the flag allows commas between them."""
    if not flag.comma_separated:
        return list(texts)
    return [word for text in texts for each in text.split(",") if (word := each.strip())]


def _resolve_aliases(flag: Flag, given: Any, source: str) -> Any:
    """Returns `given`, with llama-server's names in a list of choices replaced. Raises OptionError for other names."""
    if not flag.choices or not isinstance(given, list):
        return given
    names = [PROPOSER_TYPE_ALIASES.get(name, name) if isinstance(name, str) else name for name in given]
    for name in names:
        if isinstance(name, str) and name not in flag.choices:
            raise OptionError(f"{source}: unknown value {name!r}{choices_hint(name, flag.choices)}")
    return names


def _dashed(argument: str) -> str:
    """Returns the argument with the underscores of a flag's name as dashes. llama-server accepts both."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _unknown_argument(rest: Sequence[str]) -> str:
    flag = next((argument for argument in rest if argument.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {rest[0]!r}; a model is named with -m"
    name = flag.partition("=")[0]
    names = [name for known in FLAGS for name in known.names]
    return f"unknown flag {name}{nearest_hint(name, [*names, '--config', *IGNORED_FLAGS, *IGNORED_FLAGS_WITH_VALUE])}"


def _read_file(path: str) -> dict[str, Any]:
    """Returns the tables of a configuration file. Raises OptionError for unknown keys and invalid values."""
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise OptionError(f"--config: cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"--config: {path} is not TOML: {error}") from None
    for table, entries in tables.items():
        if table not in HEADINGS or not isinstance(entries, dict):
            raise OptionError(f"{path}: unknown table [{table}]{choices_hint(table, HEADINGS)}")
        tables[table] = _check_table(entries, table, f"{path}: [{table}]")
    return tables


def _check_table(entries: dict[str, Any], table: str, source: str) -> dict[str, Any]:
    """Returns the checked entries of one table. Raises OptionError whose message starts with `source`."""
    flags = {flag.field: flag for flag in FLAGS if flag.table == table}
    checked: dict[str, Any] = {}
    for key, given in entries.items():
        if key not in flags:
            raise OptionError(f"{source} has no key {key!r}{nearest_hint(key, flags)}")
        if flags[key].repeatable and isinstance(given, str):
            given = _words(flags[key], [given])
        checked[key] = _resolve_aliases(flags[key], given, f"{source} {key}")
        try:
            msgspec.convert(checked[key], flags[key].type)
        except msgspec.ValidationError:
            flag = flags[key]
            expected = flag.expects if flag.choices else describe_type(flag.kind)
            raise OptionError(f"{source} {key}: expected {expected}, not {quoted(given)}") from None
    return checked
