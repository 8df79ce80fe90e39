"""Configures the log by the options: level, form and destinations."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from api.config.server import LogConfig
from api.http.request_context import RequestContext

# Levels by `--verbosity`; larger numbers are as the last.
_LEVELS = (logging.CRITICAL + 1, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
# `--verbosity` from which the native library writes its thousands of lines per load.
_NATIVE_VERBOSITY = 5

_COLORS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}


def configure_logging(config: LogConfig, *, verbose: bool = False) -> None:
    """Replaces the handlers of the log by those of `config`. `verbose` is at least the verbosity 4. Raises OSError
    if the log file cannot be opened."""
    verbosity = max(config.verbosity, len(_LEVELS) - 1) if verbose else config.verbosity
    level = _LEVELS[min(verbosity, len(_LEVELS) - 1)]
    handlers = [logging.NullHandler()] if config.disable else _handlers(config)
    logging.basicConfig(level=max(level, logging.WARNING), handlers=handlers, force=True)
    logging.getLogger("paceline").setLevel(level)
    native_level = logging.DEBUG if verbosity >= _NATIVE_VERBOSITY else max(level, logging.INFO)
    logging.getLogger("paceline.native").setLevel(native_level)


def _handlers(config: LogConfig) -> list[logging.Handler]:
    stream = sys.stdout if config.jsonl else sys.stderr
    console = logging.StreamHandler(stream)
    console.setFormatter(_formatter(config, colored=_is_colored(config, stream)))
    if not config.file:
        return [console]
    file = logging.FileHandler(config.file, encoding="utf-8")
    file.setFormatter(_formatter(config, colored=False))
    return [console, file]


def _is_colored(config: LogConfig, stream: TextIO) -> bool:
    return stream.isatty() if config.colors == "auto" else config.colors == "on"


def _formatter(config: LogConfig, *, colored: bool) -> logging.Formatter:
    if config.jsonl:
        return JSONFormatter()
    parts = ["%(asctime)s"] * config.timestamps + ["%(levelname)s"] * config.prefix + ["%(message)s"]
    return ColoredFormatter(" ".join(parts)) if colored else logging.Formatter(" ".join(parts))


class ColoredFormatter(logging.Formatter):
    """Colors the levels of warnings and errors."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line without the traceback."""
        if color := _COLORS.get(record.levelno):
            record = logging.makeLogRecord({**vars(record), "levelname": f"{color}{record.levelname}\x1b[0m"})
        return super().formatMessage(record)


class JSONFormatter(logging.Formatter):
    """Writes a JSON object with llama-server's keys, for a request its data as `request`, and with the traceback of an
    error as `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns one line."""
        line: dict[str, Any] = {
            "type": "log",
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        match record.args:
            case (RequestContext() as context,):
                line["request"] = context.log_fields()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
