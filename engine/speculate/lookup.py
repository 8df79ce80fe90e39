"""Counts of a corpus for `ngram-cache`, as a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine.backend import Vocab
from engine.speculate.cache import count
from engine.speculate.shared import key_of


def build_lookup(vocab: Vocab, texts: Iterable[str], path: Path, progress: Callable[[int], None]) -> None:
    """Counts the n-grams of `texts` into the file at `path`; `progress` hears the UTF-8 bytes of each text done.

    Raises OSError if it cannot be written; then what was there is unchanged.
    """

    def tokens() -> Iterator[list[int]]:
        for text in texts:
            yield vocab.tokenize(text, special=False)
            progress(len(text.encode("utf-8", "replace")))

    count(tokens()).save(path, key_of(vocab))
