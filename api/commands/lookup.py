"""`paceline lookup build`: counts the n-grams of a corpus into the file of `--lookup-cache-static`."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from msgspec import Struct

from api.config.command_line import CommandParser, OptionError
from api.server.terminal import ProgressBar, print_line
from api.templates.text_tokens import LONG_TEXT_CHARS
from engine import EngineError, build_lookup, open_vocabulary

# Maximum size of a chunk of text; bounds the memory besides the counts.
CHUNK_CHARS = 2**20


class CorpusError(Exception):
    """A file of the corpus cannot be read. The message is one line."""


class _Arguments(Struct, frozen=True):
    corpus: tuple[Path, ...]
    model: Path
    output: Path


def run_lookup_build(arguments: Sequence[str]) -> int:
    """Writes the file and returns the exit code: 1 means that no file was written, 2 that the arguments are invalid.

    The file is replaced as a whole at the end; on failure the old file stays.
    """
    try:
        given = _parse(arguments)
    except OptionError as error:
        print_line(f"paceline lookup build: {error}")
        return 2
    try:
        _check_writable(given.output)
        _build(given)
    except (EngineError, CorpusError) as error:
        print_line(f"paceline: {error}")
    except OSError as error:
        print_line(f"paceline: cannot write {given.output}: {error.strerror}")
    except KeyboardInterrupt:
        print_line("paceline: interrupted; nothing was written")
    else:
        print_line(f"Wrote {given.output}: serve with --spec-type ngram-cache --lookup-cache-static {given.output}")
        return 0
    return 1


def _parse(arguments: Sequence[str]) -> _Arguments:
    parser = CommandParser(prog="paceline lookup build", description=__doc__, allow_abbrev=False)
    parser.add_argument("corpus", nargs="+", type=Path, metavar="corpus.txt", help="UTF-8 text like the served outputs")
    parser.add_argument("-m", "--model", required=True, type=Path, help="GGUF file of the served model")
    parser.add_argument("-o", "--output", required=True, type=Path, help="file to write")
    given = parser.parse_args(arguments)
    return _Arguments(tuple(given.corpus), given.model, given.output)


def _check_writable(path: Path) -> None:
    """Raises OSError if `path` cannot be written. Called before counting, which can take hours."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    tempfile.TemporaryFile(dir=path.parent).close()


def _build(given: _Arguments) -> None:
    corpus = given.corpus
    total, done = sum(map(_size_bytes, corpus)), 0
    label = f"Counting {corpus[0].name if len(corpus) == 1 else f'{len(corpus)} texts'}"
    with open_vocabulary(given.model) as vocab, ProgressBar(label) as bar:

        def progress(counted: int) -> None:
            nonlocal done
            done += counted
            bar.update(min(1.0, done / total))

        build_lookup(vocab, chunks(corpus), given.output, progress)


def _size_bytes(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return file.seek(0, 2)
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from None


def chunks(paths: Iterable[Path]) -> Iterator[str]:
    """Yields the texts in chunks of at most about `CHUNK_CHARS`.

    A chunk ends at a line break, or inside a line after `LONG_TEXT_CHARS`. Raises CorpusError.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                yield from _file_chunks(file)
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}") from None


def _file_chunks(file: TextIO) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    # Long lines are cut because the tokenizer of some models recurses once per character (see `WORKER_STACK_BYTES` in
    # `engine.worker_pool`).
    while line := file.readline(LONG_TEXT_CHARS):
        lines.append(line)
        size += len(line)
        if size >= CHUNK_CHARS or not line.endswith("\n"):
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)
