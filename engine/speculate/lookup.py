"""Builds the file of corpus counts that `ngram-cache` loads, like llama.cpp's `llama-lookup-create`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine.backend import Vocab
from engine.speculate.ngram_counts import count_corpus
from engine.speculate.vocabulary import vocabulary_digest


def build_lookup(vocab: Vocab, texts: Iterable[str], path: Path, progress: Callable[[int], None]) -> None:
    """Writes the n-gram counts of `texts` to `path`. Calls `progress` with the UTF-8 bytes of each counted text.

    Raises OSError if the file cannot be written; an earlier file then stays.
    """

    def tokens() -> Iterator[list[int]]:
        for text in texts:
            yield vocab.tokenize(text, special=False)
            progress(len(text.encode("utf-8", "replace")))

    count_corpus(tokens()).save(path, vocabulary_digest(vocab))
