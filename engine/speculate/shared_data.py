"""The data that the proposers of all requests share, and the files that keep it after the engine has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Protocol

from engine.backend import Vocab
from engine.checksummed import DamagedFile
from engine.config import SpeculationConfig
from engine.contract import ModelError
from engine.speculate.ngram_cache import NgramCacheProposer
from engine.speculate.ngram_counts import COUNTS_FORMAT, NgramCounts
from engine.speculate.ngram_mod import POOL_FORMAT, NgramModProposer, NgramPool, scope_of
from engine.speculate.suffix import SharedOutputs
from engine.speculate.vocabulary import vocabulary_digest

_log = logging.getLogger("paceline.speculation")

# Maximum number of n-grams in the counts of past requests; they take about 55 megabytes.
_MAX_DYNAMIC_NGRAMS = 2**18


class Saved(Protocol):
    """Data that can be saved to a file: `NgramPool` and `NgramCounts`."""

    def save(self, path: Path, vocabulary_digest: bytes) -> None:
        """Writes the data to `path`, whole or not at all. Raises OSError, or DamagedFile if there is another kind of
        file, which then stays."""

    def load(self, path: Path, vocabulary_digest: bytes, n_vocab: int) -> None:
        """Loads the data from `path`. Raises DamagedFile or OSError; the data is then unchanged."""


def check_draft_files(config: SpeculationConfig, vocab: Vocab | None = None) -> None:
    """Raises ModelError if a file that `SharedDraftData.save` would replace is of another kind, or was written for
    another vocabulary than `vocab`. `None` is any vocabulary."""
    files = (
        ("--spec-pool-file", config.pool_file, POOL_FORMAT),
        ("--lookup-cache-dynamic", config.lookup_dynamic, COUNTS_FORMAT),
    )
    for flag, name, format in files:
        if not name:
            continue
        owner = None if vocab is None else vocabulary_digest(vocab)
        try:
            if not Path(name).parent.is_dir():
                raise ModelError(f"{flag}: cannot write {name}: there is no such folder")
            format.check_replaceable(Path(name), owner)
        except DamagedFile as error:
            raise ModelError(f"{flag}: {error}; name another file") from None
        except OSError as error:
            raise ModelError(f"{flag}: cannot read {name}: {error.strerror}") from None


class SharedDraftData:
    """Past outputs, the n-gram pool, and the n-gram counts of past requests and of a corpus; each created at first use.

    Requests with different salts share no data, unless the configuration shares the n-gram pool. The counts of past
    requests are for requests without a salt only. A failure to load a file is logged in one line, and the data then
    starts empty.
    """

    def __init__(self, config: SpeculationConfig, vocab: Vocab) -> None:
        """Loads the files that are named in `config`."""
        self._config = config
        self._vocab = vocab
        self._requests = count()
        if config.pool_file:
            _ = self._pool
        if config.lookup_dynamic or config.lookup_static:
            _ = self._dynamic, self._static

    @cached_property
    def outputs(self) -> SharedOutputs:
        """The outputs of past and running requests."""
        return SharedOutputs(self._config.suffix_tokens, depth=self._config.suffix_depth)

    def mod(self, salt: str, n_min: int, n_max: int) -> NgramModProposer:
        """Returns a request's `ngram-mod` proposer, which uses the n-gram pool in the configured scope."""
        match self._config.pool_scope:
            case "shared":
                scope = scope_of("shared")
            case "salt":
                scope = scope_of(f"salt {salt}")
            case "slot":
                scope = scope_of(f"slot {next(self._requests)}")
        return NgramModProposer(self._pool, scope, n_min, n_max)

    def cache(self, salt: str, n_max: int) -> NgramCacheProposer:
        """Returns a request's `ngram-cache` proposer, which uses the counts of the request, past requests and a
        corpus."""
        return NgramCacheProposer(NgramCounts(limit=0) if salt else self._dynamic, self._static, n_max)

    def save(self) -> None:
        """Writes the files that are named in the configuration. A failure is logged in one line."""
        files: list[tuple[str, Callable[[], Saved]]] = [
            (self._config.pool_file, lambda: self._pool),
            (self._config.lookup_dynamic, lambda: self._dynamic),
        ]
        for name, data in files:
            try:
                if name:
                    data().save(Path(name), self._vocabulary_digest)
            except (OSError, MemoryError, DamagedFile) as error:
                _log.warning("cannot save %s: %s", name, error)

    @cached_property
    def _pool(self) -> NgramPool:
        pool = NgramPool(self._config.mod_match)
        self._load(pool, self._config.pool_file, may_be_missing=True)
        return pool

    @cached_property
    def _dynamic(self) -> NgramCounts:
        counts = NgramCounts(limit=_MAX_DYNAMIC_NGRAMS)
        self._load(counts, self._config.lookup_dynamic, may_be_missing=True)
        return counts

    @cached_property
    def _static(self) -> NgramCounts:
        counts = NgramCounts()
        self._load(counts, self._config.lookup_static, may_be_missing=False)
        return counts

    @cached_property
    def _vocabulary_digest(self) -> bytes:
        return vocabulary_digest(self._vocab)

    def _load(self, data: Saved, name: str, *, may_be_missing: bool) -> None:
        """Loads the file `name` into `data`, or logs a warning. An empty `name` means no file."""
        path = Path(name)
        if not name or (may_be_missing and not path.exists()):
            return
        try:
            data.load(path, self._vocabulary_digest, self._vocab.size)
        except DamagedFile as error:
            _log.warning("%s; starting without it", error)
        except OSError as error:
            _log.warning("cannot read %s: %s; starting without it", name, error.strerror)
