"""`paceline lookup build`: counts a corpus for ngram-cache into the file that `--lookup-cache-static` takes."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from msgspec import Struct

from api.config.command_line import OptionError, Parser
from api.server.terminal import Bar, say
from api.templates.prompts import LONG
from engine import EngineError, build_lookup, open_vocabulary

PIECE = 2**20
"""Characters that are counted at once: however long the corpus is, this and the counts are all that is in memory."""


class Unreadable(Exception):
    """The corpus cannot be read; the text is one line."""


class Job(Struct, frozen=True):
    """What is to be counted, by which model's tokens, and where to."""

    texts: tuple[Path, ...]
    model: Path
    output: Path


def build(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 1 if there is no file in the end, 2 if the arguments make no sense.

    The file is written whole or not at all; one that was there before stays until then.
    """
    try:
        job = _job(arguments)
    except OptionError as error:
        say(f"paceline lookup build: {error}")
        return 2
    try:
        _check(job.output)
        _count(job)
    except (EngineError, Unreadable) as error:
        say(f"paceline: {error}")
    except OSError as error:
        say(f"paceline: cannot write {job.output}: {error.strerror}")
    except KeyboardInterrupt:
        say("paceline: interrupted; nothing was written")
    else:
        say(f"Wrote {job.output}: serve with --spec-type ngram-cache --lookup-cache-static {job.output}")
        return 0
    return 1


def _job(arguments: Sequence[str]) -> Job:
    parser = Parser(prog="paceline lookup build", description=__doc__, allow_abbrev=False)
    parser.add_argument("texts", nargs="+", type=Path, metavar="corpus.txt", help="UTF-8 texts like those to come")
    parser.add_argument("-m", "--model", required=True, type=Path, help="GGUF file of the model that is to be served")
    parser.add_argument("-o", "--output", required=True, type=Path, help="the file to write")
    given = parser.parse_args(arguments)
    return Job(tuple(given.texts), given.model, given.output)


def _check(output: Path) -> None:
    """Raises OSError if the file could not be written, before hours are spent on what it is to hold."""
    if output.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    tempfile.TemporaryFile(dir=output.parent).close()


def _count(job: Job) -> None:
    total = sum(map(_size, job.texts))
    done = 0
    words = f"Counting {job.texts[0].name if len(job.texts) == 1 else f'{len(job.texts)} texts'}"
    with open_vocabulary(job.model) as vocab, Bar(words) as bar:

        def progress(read: int) -> None:
            nonlocal done
            done += read
            bar.show(min(1.0, done / total))

        build_lookup(vocab, pieces(job.texts), job.output, progress)


def _size(path: Path) -> int:
    """Bytes."""
    try:
        with path.open("rb") as file:
            return file.seek(0, 2)
    except OSError as error:
        raise Unreadable(f"cannot read {path}: {error.strerror}") from None


def pieces(paths: Iterable[Path]) -> Iterator[str]:
    """The texts in pieces that end where a line does, and inside of lines only if these are longer than `LONG`.

    Raises Unreadable.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                yield from _pieces(file)
        except OSError as error:
            raise Unreadable(f"cannot read {path}: {error.strerror}") from None


def _pieces(file: TextIO) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    # A line has to end somewhere: some models make the library recurse for each character (see `STACK` in `life`).
    while line := file.readline(LONG):
        lines.append(line)
        size += len(line)
        if size >= PIECE or not line.endswith("\n"):
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)
