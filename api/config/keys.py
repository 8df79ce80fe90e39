"""The API keys of the configuration: of `--api-key`, `--api-key-file` and the file of `--keys`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from api.config.server import ServerConfig
from api.config.values import OptionError
from api.http.decode_errors import as_refusal
from api.http.key_ring import ApiKey


class KeyFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of the file: `[[keys]]` in TOML, or the same in JSON. A file without keys is valid."""

    keys: Annotated[tuple[ApiKey, ...], Meta(max_length=100_000)] = ()


def configured_keys(config: ServerConfig) -> tuple[ApiKey, ...]:
    """Returns the keys of the flags and of both files. Keys without an entry in the file of `--keys` have the rights of
    an admin. Raises OptionError for a file that cannot be read or is invalid."""
    listed = read_key_file(config.keys) if config.keys else ()
    texts = {each.key for each in listed}
    lines = read_key_lines(config.api_key_file) if config.api_key_file else ()
    others = dict.fromkeys((*config.api_keys, *lines))
    return (*listed, *(ApiKey(key=key, admin=True) for key in others if key not in texts))


def check_key_files(config: ServerConfig) -> None:
    """Raises OptionError for a file of keys that is invalid or has no keys."""
    files = {"--keys": (config.keys, read_key_file), "--api-key-file": (config.api_key_file, read_key_lines)}
    for flag, (path, read) in files.items():
        if path and not read(path):
            raise OptionError(f"{flag}: {path} has no keys: add one, or leave the flag out")


def read_key_lines(path: str) -> tuple[str, ...]:
    """Returns the keys of the file of `--api-key-file`, one on each line. Raises OptionError."""
    lines = _read("--api-key-file", path).splitlines()
    return tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))


def read_key_file(path: str) -> tuple[ApiKey, ...]:
    """Returns the keys of the file of `--keys`. Raises OptionError that names the entry and what is expected."""
    content = _parse(path)
    try:
        keys = msgspec.convert(content, KeyFile).keys
    except msgspec.ValidationError as error:
        raise OptionError(f"--keys: {path}: {as_refusal(error, KeyFile, content)}") from None
    for field in ("key", "name"):
        seen: dict[str, int] = {}
        for index, each in enumerate(keys):
            if (value := getattr(each, field)) is not None and seen.setdefault(value, index) != index:
                raise OptionError(f"--keys: {path}: keys[{index}].{field} is that of keys[{seen[value]}] as well")
    return keys


def _parse(path: str) -> Any:
    text = _read("--keys", path)
    try:
        return msgspec.json.decode(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (msgspec.DecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"--keys: {path} is neither TOML nor JSON: {error}") from None


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise OptionError(f"{flag}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OptionError(f"{flag}: {path} is not a text in UTF-8") from None
