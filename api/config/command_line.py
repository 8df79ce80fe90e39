"""Parses the options of `paceline serve`: flags override a preset, environment variables and the configuration file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import msgspec

from api.config.arguments import (
    COMMAND_OPTIONS,
    CONFIG_OPTION,
    HELP,
    PRESET_FILE,
    PRESET_NAME,
    PRINTING_OPTIONS,
    CommandOption,
    GivenOption,
    split_arguments,
)
from api.config.config_file import read_config_file
from api.config.flags import FLAGS, HEADINGS, Flag
from api.config.hub import REPOSITORY_NAME, hub_problem, named_model
from api.config.options import Options
from api.config.other_flags import OtherFlag
from api.config.presets import Preset, read_preset
from api.config.refused import REFUSED
from api.config.request_defaults import with_request_defaults
from api.config.shortcuts import SHORTCUTS
from api.config.values import BOOLEAN_WORDS, OptionError, convert_value
from engine import SIMULATED_MODEL

__all__ = ["CommandParser", "OptionError", "parse", "printing_option"]


class _Given(NamedTuple):
    """The value of a setting: a text, a list of texts, or a boolean."""

    value: Any
    source: str
    """Flag, key or variable, for errors."""


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that raises OptionError for invalid arguments instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message.removeprefix("argument "))

    def print_help(self, file: Any = None) -> None:
        # The method of argparse ignores errors of the write.
        (file or sys.stdout).write(self.format_help())


def printing_option(arguments: Sequence[str]) -> CommandOption | None:
    """Returns the first option that prints something instead of serving. None if there is none.

    Raises OptionError if an earlier argument is invalid.
    """
    given = (each.option for each in split_arguments(arguments))
    return next((each for each in given if isinstance(each, CommandOption) and each in PRINTING_OPTIONS), None)


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Options:
    """Returns the options. Raises OptionError; for `--help` prints the help and raises SystemExit(0).

    An empty environment variable counts as unset.
    """
    given = tuple(split_arguments(arguments))
    if any(each.option is HELP for each in given):
        _help_parser().print_help()
        raise SystemExit(0)
    environment = {name: text for name, text in (environment or {}).items() if text}
    command = _command_values(given, environment)
    _refuse_flags(given, environment)
    preset = _read_preset(command)
    settings = _variables(environment)
    for name in SHORTCUTS:
        if name in command:
            settings |= {dest: _shortcut_value(dest, text, name) for dest, text in SHORTCUTS[name].items()}
    if preset:
        _refuse_flags(preset.options, {})
        settings |= _preset_defaults(preset, _collect([*preset.options, *given])) | _collect(preset.options)
    settings |= _collect(given)
    return _options(settings, command.get(CONFIG_OPTION.names[0]))


def _command_values(given: Iterable[GivenOption], environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the values of the command's own options by their first names."""
    variables = {each.names[0]: environment[each.env] for each in COMMAND_OPTIONS if each.env in environment}
    own = {each.option.names[0]: "".join(each.values) for each in given if isinstance(each.option, CommandOption)}
    return variables | own


def _read_preset(command: Mapping[str, str]) -> Preset | None:
    path, name = (command.get(option.names[0]) for option in (PRESET_FILE, PRESET_NAME))
    if path is None and name is not None:
        raise OptionError("--preset names a section of an INI file: name the file with --models-preset")
    return read_preset(path, name) if path else None


def _refuse_flags(given: Iterable[GivenOption], environment: Mapping[str, str]) -> None:
    """Raises OptionError for a refused flag or variable."""
    for name, option, text, on in _refusable(given, environment):
        if on and text not in option.harmless:
            raise OptionError(f"{name}: {option.reason}")


def _refusable(
    given: Iterable[GivenOption], environment: Mapping[str, str]
) -> Iterator[tuple[str, OtherFlag, str | None, bool]]:
    """Yields the name, flag and value of each refused flag or variable, and False for a switch that is off."""
    for each in given:
        if isinstance(each.option, OtherFlag) and each.option.refused:
            yield each.source, each.option, each.values[0] if each.values else None, each.on
    for option in REFUSED:
        if text := environment.get(option.env):
            yield option.env, option, text, option.arity > 0 or BOOLEAN_WORDS.get(text, True)


def _variables(environment: Mapping[str, str]) -> dict[str, _Given]:
    """Returns the settings in environment variables by their flags' dests."""
    return {flag.dest: found for flag in FLAGS if (found := _variable(flag, environment))}


def _variable(flag: Flag, environment: Mapping[str, str]) -> _Given | None:
    # As in llama-server, any value of LLAMA_ARG_NO_X turns the switch of LLAMA_ARG_X off.
    off = flag.env.replace("LLAMA_ARG_", "LLAMA_ARG_NO_", 1) if flag.switch else ""
    if off != flag.env and off in environment:
        return _Given(False, off)
    name = next((name for name in (flag.env, *flag.older_env) if name in environment), None)
    if name is None:
        return None
    text = environment[name]
    return _Given([text] if flag.repeatable else text.split() if flag.arity > 1 else text, name)


def _shortcut_value(dest: str, text: str, source: str) -> _Given:
    repeatable = next(flag.repeatable for flag in FLAGS if flag.dest == dest)
    return _Given([text] if repeatable else text, source)


def _preset_defaults(preset: Preset, settings: Mapping[str, _Given]) -> dict[str, _Given]:
    """Returns the settings that follow from the name of a preset: the model's name, and its repository unless
    `settings` name a model."""
    defaults = {"server.alias": _Given([preset.name], "--preset")}
    if REPOSITORY_NAME.fullmatch(preset.name) and not settings.keys() & {"model.path", "hub.repo", "hub.url"}:
        defaults["hub.repo"] = _Given(preset.name, "--preset")
    return defaults


def _collect(given: Iterable[GivenOption]) -> dict[str, _Given]:
    """Returns the settings by their flags' dests. The last value counts; a repeatable flag has all its values."""
    settings: dict[str, _Given] = {}
    for each in given:
        if not isinstance(flag := each.option, Flag):
            continue
        if flag.switch:
            settings[flag.dest] = _Given(each.on, each.source)
        elif flag.repeatable:
            earlier = settings[flag.dest].value if flag.dest in settings else []
            settings[flag.dest] = _Given([*earlier, *each.values], each.source)
        else:
            settings[flag.dest] = _Given(each.values[0] if flag.arity == 1 else list(each.values), each.source)
    return settings


def _options(settings: Mapping[str, _Given], config_path: str | None) -> Options:
    """Returns the options. `settings` override those of the configuration file. Raises OptionError."""
    tables = read_config_file(config_path) if config_path is not None else {}
    for flag in FLAGS:
        if flag.dest in settings:
            value = convert_value(flag, *settings[flag.dest])
            if value is not msgspec.UNSET:
                tables.setdefault(flag.table, {})[flag.field] = value
    if tables.get("sim", {}).get("on"):
        tables.setdefault("model", {}).setdefault("path", SIMULATED_MODEL)
    if problem := hub_problem(tables) or _draft_problem(tables):
        raise OptionError(problem)
    if name := named_model(tables):
        tables.setdefault("model", {}).setdefault("path", name)
    if not tables.get("model", {}).get("path"):
        raise OptionError("no model is given: name a GGUF file with -m, or a repository with -hf")
    return with_request_defaults(msgspec.convert(tables, Options))


def _draft_problem(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a sentence if both a draft model and MTP layers are requested; otherwise an empty text."""
    if {"draft", "draft-mtp"} <= {*tables.get("speculation", {}).get("types", ())}:
        return (
            "--spec-type draft and draft-mtp cannot be used together, as -md (-hfd) names a draft model or MTP layers: "
            "leave out one of them"
        )
    return ""


# ── help ──


def _help_parser() -> CommandParser:
    """Returns an argparse parser of all settings, which formats the help."""
    parser = CommandParser(
        prog="paceline serve",
        usage="paceline serve -m model.gguf [flags]",
        description="Serves a GGUF model to many clients at once, over OpenAI's API.",
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    for option in COMMAND_OPTIONS:
        value = {"metavar": option.metavar} if option.arity else {"action": "store_true"}
        parser.add_argument(*option.names, help=option.help, **value)  # type: ignore[arg-type]
    for table, heading in HEADINGS.items():
        group = parser.add_argument_group(heading)
        for flag in FLAGS:
            if flag.table == table:
                _add(group, flag)
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    allowed, variable = f"{flag.allowed}; " if flag.allowed else "", f"; env: {flag.env}" if flag.env else ""
    text = f"{flag.help} ({allowed}default: {flag.default_text}{variable})".replace("%", "%%")
    if flag.switch:
        group.add_argument(*flag.names, *flag.listed_off_names, dest=flag.dest, action="store_true", help=text)
        return
    group.add_argument(*flag.names, dest=flag.dest, metavar=flag.metavar, help=text)
