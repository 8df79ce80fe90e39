"""Reads the INI file of `--models-preset`, as llama-server does: each section has the settings of a model."""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from api.config.arguments import SPELLED, GivenOption, split_arguments
from api.config.flags import Flag
from api.config.values import OptionError
from api.http.decode_errors import nearest_hint

# Settings of this section apply to all sections.
_BASE_SECTION = "*"
# Section of the settings before the first header.
_FIRST_SECTION = "default"
# Keys of llama-server's router, which are ignored.
_ROUTER_KEYS = {"version", "load-on-startup", "stop-timeout", "dedup-cache-models"}
_COMMENT = re.compile(r"[ \t]*[;#].*")


class Preset(NamedTuple):
    """The settings of one model."""

    name: str
    options: tuple[GivenOption, ...]


def read_preset(path: str, name: str | None) -> Preset:
    """Returns the section `name`, completed by the section `*`. None means the only section.

    Raises OptionError, also if `name` is None and there are several sections.
    """
    sections = _read_sections(path)
    if name is None:
        if len(sections) != 1:
            listed = ", ".join(sections) or "none"
            raise OptionError(
                f"--models-preset: choose a section with --preset (there are: {listed}); for several models at once, "
                "put llama-swap in front of several servers"
            )
        (name,) = sections
    if name not in sections:
        raise OptionError(f"--preset: {path} has no section [{name}]{nearest_hint(name, sections)}")
    settings = {key: value for key, value in sections[name].items() if key not in _ROUTER_KEYS}
    return Preset(name, tuple(_options(settings, f"{path}: [{name}]")))


def _read_sections(path: str) -> dict[str, Mapping[str, str]]:
    """Returns the settings of each section except `*`, completed by those of `*`. Raises OptionError."""
    parser = configparser.RawConfigParser(delimiters=("=",), strict=False, default_section=_BASE_SECTION)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        lines = [_COMMENT.sub("", line).strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
        parser.read_string("\n".join([f"[{_FIRST_SECTION}]", *lines]), path)
    except OSError as error:
        raise OptionError(f"--models-preset: cannot read {path}: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise OptionError(f"--models-preset: {path} is not INI: {' '.join(str(error).split())}") from None
    own = {name: parser[name] for name in parser.sections()}
    if not set(own[_FIRST_SECTION]) - set(parser.defaults()) - _ROUTER_KEYS:
        del own[_FIRST_SECTION]
    return dict(own)


def _options(settings: Mapping[str, str], source: str) -> Iterator[GivenOption]:
    """Yields the options of the keys, which are flags without dashes or environment variables. Raises OptionError."""
    for key, value in settings.items():
        if key not in _KEYS:
            raise OptionError(f"{source} has no key {key!r}{nearest_hint(key, _KEYS)}")
        name = _KEYS[key]
        option, _ = SPELLED[name]
        words = [name, *value.split()] if option.arity > 1 else [f"{name}={value}"]
        try:
            yield from (given._replace(source=f"{source} {key}") for given in split_arguments(words))
        except OptionError as error:
            raise OptionError(f"{source} {key}: {error}") from None


def _named_keys() -> Iterator[tuple[str, str]]:
    """Yields each key with the spelling of its flag."""
    for option, on in SPELLED.values():
        if on and option.env:
            yield option.env, option.names[-1]
        if isinstance(option, Flag):
            yield from ((variable, option.names[-1]) for variable in option.older_env)
    for name in SPELLED:
        yield name.lstrip("-"), name


# Spelling of the flag that a key names.
_KEYS = dict(_named_keys())
