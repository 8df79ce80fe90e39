"""The command line of `paceline serve`, and the configuration file that it may name. The command line wins."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from api.flags import FLAGS, IGNORED, SECTIONS, Flag, Options
from api.schema import refused


class OptionError(Exception):
    """One line about what is wrong with the options, and what would be right."""


def parse(arguments: Sequence[str]) -> Options:
    """The options. Raises OptionError; prints the help and exits with 0 if `--help` is among the arguments."""
    given, rest = _parser().parse_known_args([_dashes(argument) for argument in arguments])
    if rest:
        raise OptionError(_unknown(rest))
    values: dict[str, Any] = vars(given)
    tables = _file(values.pop("config")) if "config" in values else {}
    for flag in FLAGS:
        if flag.dest in values:
            tables.setdefault(flag.section, {})[flag.field] = _value(flag, values[flag.dest])
    if not tables.get("model", {}).get("path"):
        raise OptionError("no model is given: name a GGUF file with -m")
    return msgspec.convert(tables, Options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    """Knows the spellings; values stay text, for msgspec to judge."""
    parser = _Parser(
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
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    about = f"{flag.help} (default: {flag.default_text})".replace("%", "%%")
    if flag.switch:
        group.add_argument(
            *flag.names, dest=flag.dest, action=argparse.BooleanOptionalAction, help=about, default=argparse.SUPPRESS
        )
        return
    action = "append" if flag.repeatable else "store"
    group.add_argument(*flag.names, dest=flag.dest, action=action, metavar=flag.sign, help=about)


def _value(flag: Flag, given: object) -> object:
    try:
        return msgspec.to_builtins(msgspec.convert(given, flag.type, strict=False))
    except msgspec.ValidationError:
        raise OptionError(f"{flag.spelled}: expected {flag.expects}, not {given!r}") from None


def _dashes(argument: str) -> str:
    """llama-server takes underscores for dashes in the names of flags."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _unknown(rest: Sequence[str]) -> str:
    flag = next((argument for argument in rest if argument.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {rest[0]!r}; a model is named with -m"
    names = [name for known in FLAGS for name in known.names] + ["--config", *IGNORED]
    return f"unknown flag {flag.partition('=')[0]}{_nearest(flag.partition('=')[0], names)}"


def _nearest(word: str, words: Iterable[str]) -> str:
    close = get_close_matches(word, list(words), n=1, cutoff=0.0)
    return f"; the nearest is {close[0]}" if close else ""


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
            raise OptionError(f"{name}: there is no table [{table}]{_nearest(table, SECTIONS)}")
        known = {flag.field: flag for flag in FLAGS if flag.section == table}
        for key, value in entries.items():
            if key not in known:
                raise OptionError(f"{name}: [{table}] has no key {key!r}{_nearest(key, known)}")
            try:
                msgspec.convert(value, known[key].type)
            except msgspec.ValidationError as error:
                raise OptionError(f"{name}: [{table}] {key}: {refused(error)}, not {value!r}") from None
    return tables
