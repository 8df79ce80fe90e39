"""What the requests of one engine share for guessing, and the files in which it outlives the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Protocol

from engine.backend import Vocab
from engine.config import SpeculationConfig
from engine.speculate.cache import NgramCache, NgramCounts
from engine.speculate.files import DamagedFile
from engine.speculate.mod import NgramMod, Pool, scope_of
from engine.speculate.suffix import SharedOutputs

log = logging.getLogger("paceline.speculation")

REMEMBERED = 2**18
"""N-grams that the counts of past requests may have: about 70 megabytes."""


class Kept(Protocol):
    """What can be kept in a file: `engine.speculate.mod.Pool` and `engine.speculate.cache.NgramCounts`."""

    def save(self, path: Path, vocabulary: bytes) -> None:
        """Writes the file, whole or not at all."""

    def load(self, path: Path, vocabulary: bytes, n_vocab: int) -> None:
        """Reads it, or raises DamagedFile or OSError with nothing changed."""


def key_of(vocab: Vocab) -> bytes:
    """32 bytes that are equal only for vocabularies in which every token id means the same."""
    spelled = blake2b(digest_size=32)
    for token in range(vocab.size):
        spelled.update(vocab.text(token).encode("utf-8", "replace") + b"\0")
    return spelled.digest()


class Shared:
    """Past outputs, the pool of n-grams and their counts; each is made when somebody first wants it.

    Only requests of equal salt learn from each other; the counts of past requests are for those without a salt.
    A file that cannot be used is named in one line of the log, and what it should have held starts empty.
    """

    def __init__(self, config: SpeculationConfig, vocab: Vocab) -> None:
        self._config = config
        self._vocab = vocab
        self._requests = count()
        if config.pool_file:
            _ = self._pool
        if config.lookup_dynamic or config.lookup_static:
            _ = self._dynamic, self._static

    @cached_property
    def outputs(self) -> SharedOutputs:
        """What requests said."""
        return SharedOutputs(self._config.suffix_tokens, depth=self._config.suffix_depth)

    def mod(self, salt: str, n_min: int, n_max: int) -> NgramMod:
        """A request's proposer over the pool."""
        match self._config.pool_scope:
            case "shared":
                scope = scope_of("shared")
            case "salt":
                scope = scope_of(f"salt {salt}")
            case "slot":
                scope = scope_of(f"slot {next(self._requests)}")
        return NgramMod(self._pool, scope, n_min, n_max)

    def cache(self, salt: str, n_max: int) -> NgramCache:
        """A request's proposer over its own counts, those of past requests and those of a corpus."""
        return NgramCache(NgramCounts(limit=0) if salt else self._dynamic, self._static, n_max)

    def save(self) -> None:
        """Writes the files that were named, each whole or, with a line in the log, not at all."""
        files: list[tuple[str, Callable[[], Kept]]] = [
            (self._config.pool_file, lambda: self._pool),
            (self._config.lookup_dynamic, lambda: self._dynamic),
        ]
        for name, kept in files:
            try:
                if name:
                    kept().save(Path(name), self._key)
            except (OSError, MemoryError) as error:
                log.warning("cannot save %s: %s", name, error)

    @cached_property
    def _pool(self) -> Pool:
        pool = Pool(self._config.mod_match)
        self._load(pool, self._config.pool_file, new=True)
        return pool

    @cached_property
    def _dynamic(self) -> NgramCounts:
        counts = NgramCounts(limit=REMEMBERED)
        self._load(counts, self._config.lookup_dynamic, new=True)
        return counts

    @cached_property
    def _static(self) -> NgramCounts:
        counts = NgramCounts()
        self._load(counts, self._config.lookup_static, new=False)
        return counts

    @cached_property
    def _key(self) -> bytes:
        return key_of(self._vocab)

    def _load(self, kept: Kept, name: str, *, new: bool) -> None:
        """Fills `kept` from a file, if one is named; `new` says that it need not exist yet."""
        path = Path(name)
        if not name or (new and not path.exists()):
            return
        try:
            kept.load(path, self._key, self._vocab.size)
        except DamagedFile as error:
            log.warning("%s; starting without it", error)
        except OSError as error:
            log.warning("cannot read %s: %s; starting without it", name, error.strerror)
