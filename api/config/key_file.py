"""Reads the API keys of `--api-key-file`."""

from __future__ import annotations

from pathlib import Path

from msgspec import structs

from api.config.keys import read_key_file
from api.config.options import Options
from api.config.values import OptionError


def with_key_file(options: Options) -> Options:
    """Returns the options with the keys of the file besides those on the command line. Raises OptionError for a file
    without keys, with which the server would be open, and for an invalid file of `--keys`."""
    if options.server.keys:
        read_key_file(options.server.keys)
    path = options.server.api_key_file
    if not path:
        return options
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise OptionError(f"--api-key-file: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OptionError(f"--api-key-file: {path} is not a text in UTF-8") from None
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise OptionError(f"--api-key-file: {path} has no keys: write one key on each line")
    server = structs.replace(options.server, api_keys=(*options.server.api_keys, *keys))
    return structs.replace(options, server=server)
