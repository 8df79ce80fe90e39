"""Reads the TOML file of `--config`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from api.config.flags import FLAGS, HEADINGS
from api.config.values import OptionError, resolve_aliases, split_words
from api.http.decode_errors import choices_hint, describe_type, nearest_hint, quoted


def read_config_file(path: str) -> dict[str, Any]:
    """Returns the tables of a configuration file. Raises OptionError for unknown keys and invalid values."""
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8-sig"))
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
            given = split_words(flags[key], [given])
        checked[key] = resolve_aliases(flags[key], given, f"{source} {key}")
        try:
            msgspec.convert(checked[key], flags[key].type)
        except msgspec.ValidationError:
            flag = flags[key]
            expected = flag.expects if flag.choices or flag.example else describe_type(flag.kind)
            raise OptionError(f"{source} {key}: expected {expected}, not {quoted(given)}") from None
    return checked
