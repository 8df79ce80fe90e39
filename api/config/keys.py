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
    """The content of the file: `[[keys]]` in TOML, or the same in JSON."""

    keys: Annotated[tuple[ApiKey, ...], Meta(min_length=1, max_length=100_000)]


def configured_keys(config: ServerConfig) -> tuple[ApiKey, ...]:
    """Returns all keys. Those without an entry in the file have the rights of an admin. Raises OptionError."""
    listed = read_key_file(config.keys) if config.keys else ()
    texts = {each.key for each in listed}
    return (*listed, *(ApiKey(key=key, admin=True) for key in dict.fromkeys(config.api_keys) if key not in texts))


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
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise OptionError(f"--keys: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OptionError(f"--keys: {path} is not a text in UTF-8") from None
    try:
        return msgspec.json.decode(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (msgspec.DecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"--keys: {path} is neither TOML nor JSON: {error}") from None
