"""Splits a command line into options and their values, as llama-server reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from api.config.flags import FLAGS, Flag
from api.config.other_flags import OtherFlag
from api.config.refused import REFUSED
from api.config.shortcuts import SHORTCUTS
from api.config.values import BOOLEAN_WORDS, OptionError
from api.config.without_effect import WITHOUT_EFFECT
from api.http.decode_errors import nearest_hint

# A short flag with a number attached, such as -ngl99 or -c4096.
_ATTACHED = re.compile(r"(-[A-Za-z]+)(-?[\d.]+)")


class CommandOption(NamedTuple):
    """An option of the command itself."""

    names: tuple[str, ...]
    arity: int
    """Number of values on the command line."""
    metavar: str
    help: str
    env: str = ""
    """Environment variable; empty if there is none."""


CONFIG_OPTION = CommandOption(("--config",), 1, "FILE", "TOML file with the same settings; flags override it")
PRESET_FILE = CommandOption(
    ("--models-preset",),
    1,
    "FILE",
    "llama-server's INI file with the settings of several models",
    "LLAMA_ARG_MODELS_PRESET",
)
PRESET_NAME = CommandOption(("--preset",), 1, "NAME", "section of --models-preset to serve; flags override it")
HELP = CommandOption(("-h", "--help", "--usage"), 0, "", "print this help and exit")
VERSION = CommandOption(("--version",), 0, "", "print the versions and exit")
LIST_DEVICES = CommandOption(("--list-devices",), 0, "", "print the devices that --device can name and exit")
LIST_CACHE = CommandOption(("-cl", "--cache-list"), 0, "", "print the downloaded models and exit")
COMPLETION = CommandOption(("--completion-bash",), 0, "", "print a completion script for bash and exit")
_SHORTCUT_HELP = "download a well-known model and use its settings; other flags override them"
_SHORTCUTS = tuple(CommandOption((name,), 0, "", _SHORTCUT_HELP) for name in SHORTCUTS)

COMMAND_OPTIONS = (
    CONFIG_OPTION,
    PRESET_FILE,
    PRESET_NAME,
    HELP,
    VERSION,
    LIST_DEVICES,
    LIST_CACHE,
    COMPLETION,
    *_SHORTCUTS,
)
PRINTING_OPTIONS = (VERSION, LIST_DEVICES, LIST_CACHE, COMPLETION)

Option = Flag | OtherFlag | CommandOption

ALL_OPTIONS: tuple[Option, ...] = (*FLAGS, *WITHOUT_EFFECT, *REFUSED, *COMMAND_OPTIONS)


class GivenOption(NamedTuple):
    """An option of a command line or a preset, with its values."""

    option: Option
    source: str
    """The flag's spellings, or the preset's key, for error messages."""
    values: tuple[str, ...]
    on: bool
    """False for a switch that was turned off."""


def _all_names() -> Iterator[tuple[str, tuple[Option, bool]]]:
    """Yields each spelling with its option and True, or with False if the spelling turns a switch off. A later spelling
    replaces an equal earlier one."""
    for flag in FLAGS:
        yield from ((name, (flag, False)) for name in flag.off_names)
    for option in ALL_OPTIONS:
        yield from ((name, (option, True)) for name in option.names)


# Option of every spelling, and whether the spelling turns it on.
SPELLED: Mapping[str, tuple[Option, bool]] = dict(_all_names())


def split_arguments(arguments: Sequence[str]) -> Iterator[GivenOption]:
    """Yields the options of a command line. Raises OptionError for unknown flags and missing values."""
    words = list(arguments)
    while words:
        name, attached = _split_word(words.pop(0))
        option, on = SPELLED[name]
        if option.arity == 0:
            yield _switch(option, name, on, attached, words)
        elif attached is not None and option.arity == 1:
            yield GivenOption(option, _spellings(option), (attached,), True)
        else:
            yield GivenOption(option, _spellings(option), _take_values(option, words), True)


def _split_word(word: str) -> tuple[str, str | None]:
    """Returns the name of an option and the value attached to it. None means no attached value."""
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    if name in SPELLED:
        return name, value if equals else None
    if (found := _ATTACHED.fullmatch(word)) and found[1] in SPELLED and SPELLED[found[1]][0].arity == 1:
        return found[1], found[2]
    if not word.startswith("-"):
        raise OptionError(f"unexpected argument {word!r}; a model is named with -m")
    raise OptionError(f"unknown flag {name}{nearest_hint(name, SPELLED)}")


def _switch(option: Option, name: str, on: bool, attached: str | None, words: list[str]) -> GivenOption:
    """Returns a switch, turned on or off by its spelling and by a word such as `false` after it.

    Raises OptionError for another value after `=`.
    """
    if attached is None and words and words[0] in BOOLEAN_WORDS:
        attached = words.pop(0)
    if attached is None:
        return GivenOption(option, _spellings(option), (), on)
    if attached not in BOOLEAN_WORDS:
        forms = _long_forms(option) if isinstance(option, Flag) else [name]
        raise OptionError(f"{name} takes no value: use {' or '.join(forms)}")
    return GivenOption(option, _spellings(option), (), on == BOOLEAN_WORDS[attached])


def _spellings(option: Option) -> str:
    return "/".join(option.names)


def _long_forms(flag: Flag) -> list[str]:
    """Returns the last long spelling of a switch and the last one that turns it off."""
    groups = ([name for name in names if name.startswith("--")] for names in (flag.names, flag.off_names))
    return [names[-1] for names in groups if names]


def _take_values(option: Option, words: list[str]) -> tuple[str, ...]:
    """Returns the next values, removed from `words`. Raises OptionError if there are too few."""
    if isinstance(option, Flag) and option.three_way and (not words or words[0] in SPELLED):
        return ("on",)
    values = tuple(words[: option.arity])
    if len(values) < option.arity or any(value in SPELLED for value in values):
        count = "one argument" if option.arity == 1 else f"{option.arity} arguments"
        raise OptionError(f"{_spellings(option)}: expected {count}")
    del words[: option.arity]
    return values


def take_option(arguments: Sequence[str], *names: str) -> tuple[str | None, list[str]]:
    """Returns the value of a command's own option, and the other arguments. None means that it is not given.

    Raises OptionError if the option has no value.
    """
    rest, value = list(arguments), None
    for name in names:
        rest = [part for word in rest for part in _parted(word, name)]
    while found := next((name for name in names if name in rest), None):
        index = rest.index(found)
        if index + 1 == len(rest):
            raise OptionError(f"{'/'.join(names)}: expected one argument")
        value = rest[index + 1]
        del rest[index : index + 2]
    return value, rest


def _parted(word: str, name: str) -> tuple[str, ...]:
    return (name, word[len(name) + 1 :]) if word.startswith(f"{name}=") else (word,)
