"""The command line of `paceline serve`, the environment, and the configuration file: of these, the first wins."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from api.config.flags import FLAGS, IGNORED, IGNORED_WITH_VALUE, RENAMED, SECTIONS, Flag, Options
from api.http.decode_errors import nearest, refused
from engine import SIM

_SWITCHES = {
    **dict.fromkeys(("true", "1", "on", "enabled"), True),
    **dict.fromkeys(("false", "0", "off", "disabled"), False),
}
"""What llama-server takes for a switch in the environment."""


class OptionError(Exception):
    """One line about what is wrong with the options, and what would be right."""


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Options:
    """The options. Raises OptionError; prints the help and exits with 0 if `--help` is among the arguments.

    A variable of the environment that is empty sets nothing.
    """
    given, rest = _parser().parse_known_args([_dashes(argument) for argument in arguments])
    if rest:
        raise OptionError(_unknown(rest))
    values: dict[str, Any] = vars(given)
    tables = _file(values.pop("config")) if "config" in values else {}
    for flag in FLAGS:
        if flag.dest in values:
            value = _value(flag, values[flag.dest], flag.spelled)
        elif text := (environment or {}).get(flag.env):
            value = _value(flag, [text] if flag.repeatable else text, flag.env)
        else:
            continue
        tables.setdefault(flag.section, {})[flag.field] = value
    if tables.get("sim", {}).get("on"):
        tables.setdefault("model", {}).setdefault("path", SIM)
    if not tables.get("model", {}).get("path"):
        raise OptionError("no model is given: name a GGUF file with -m")
    return msgspec.convert(tables, Options)


class Parser(argparse.ArgumentParser):
    """Raises OptionError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    """Knows the spellings; values stay text, for msgspec to judge."""
    parser = Parser(
        prog="paceline serve",
        description="Serves a GGUF model to many clients at once, over OpenAI's API.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file with the same settings; flags win over it")
    for section, (subject, _) in SECTIONS.items():
        group = parser.add_argument_group(subject)
        for flag in FLAGS:
            if flag.section == section:
                _add(group, flag)
    for name in IGNORED:
        parser.add_argument(name, action="store_const", const=None, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name in IGNORED_WITH_VALUE:
        parser.add_argument(name, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    variable = f"; env: {flag.env}" if flag.env else ""
    about = f"{flag.help} (default: {flag.default_text}{variable})".replace("%", "%%")
    if flag.switch:
        group.add_argument(
            *flag.names, dest=flag.dest, action=argparse.BooleanOptionalAction, help=about, default=argparse.SUPPRESS
        )
        return
    action = "append" if flag.repeatable else "store"
    group.add_argument(*flag.names, dest=flag.dest, action=action, metavar=flag.sign, help=about)


def _value(flag: Flag, given: Any, where: str) -> object:
    """What the field gets if `given` was typed. Raises OptionError, which begins with `where`."""
    if flag.separated:
        given = [word for text in given for each in text.split(",") if (word := each.strip())]
    if flag.switch:
        given = _SWITCHES.get(given, given)
    try:
        return msgspec.to_builtins(msgspec.convert(_renamed(flag, given, where), flag.type, strict=False))
    except msgspec.ValidationError:
        raise OptionError(f"{where}: expected {flag.expects}, not {given!r}") from None


def _renamed(flag: Flag, given: Any, where: str) -> Any:
    """`given`; if it is a list of what are to be names, by their present ones. Raises OptionError for another."""
    if not flag.choices or not isinstance(given, list):
        return given
    names = [RENAMED.get(name, name) if isinstance(name, str) else name for name in given]
    for name in names:
        if isinstance(name, str) and name not in flag.choices:
            raise OptionError(f"{where}: there is no {name!r}{nearest(name, flag.choices)}")
    return names


def _dashes(argument: str) -> str:
    """llama-server takes underscores for dashes in the names of flags."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _unknown(rest: Sequence[str]) -> str:
    flag = next((argument for argument in rest if argument.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {rest[0]!r}; a model is named with -m"
    names = [name for known in FLAGS for name in known.names] + ["--config", *IGNORED, *IGNORED_WITH_VALUE]
    return f"unknown flag {flag.partition('=')[0]}{nearest(flag.partition('=')[0], names)}"


def _file(name: str) -> dict[str, Any]:
    """The tables of a configuration file, checked but for what the command line may still add."""
    try:
        tables = tomllib.loads(Path(name).read_text("utf-8"))
    except OSError as error:
        raise OptionError(f"--config: cannot read {name}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"--config: {name} is not TOML: {error}") from None
    for table, entries in tables.items():
        if table not in SECTIONS or not isinstance(entries, dict):
            raise OptionError(f"{name}: there is no table [{table}]{nearest(table, SECTIONS)}")
        tables[table] = _entries(entries, table, f"{name}: [{table}]")
    return tables


def _entries(entries: dict[str, Any], table: str, where: str) -> dict[str, Any]:
    """The entries of one table. Raises OptionError, which begins with `where`, for a wrong one."""
    known = {flag.field: flag for flag in FLAGS if flag.section == table}
    checked: dict[str, Any] = {}
    for key, given in entries.items():
        if key not in known:
            raise OptionError(f"{where} has no key {key!r}{nearest(key, known)}")
        checked[key] = _renamed(known[key], given, f"{where} {key}")
        try:
            msgspec.convert(checked[key], known[key].type)
        except msgspec.ValidationError as error:
            raise OptionError(f"{where} {key}: {refused(error)}, not {given!r}") from None
    return checked
