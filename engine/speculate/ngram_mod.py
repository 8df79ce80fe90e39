"""`ngram-mod`: one hash table for all slots, which maps n tokens to the token that last followed them.

A draft is a chain of look-ups: the hash of each look-up includes the tokens found before. The method is llama.cpp's
(common/ngram-mod.cpp), with two differences. llama.cpp's entries contain only a token, so n-grams with the same index
are confused; here an entry also contains a tag of its n-gram. llama.cpp clears the table for all slots once it is a
quarter full or the drafts of one slot are poor; here the newest entry replaces an older one, and the table is never
cleared.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engine.checksummed import DamagedFile
from engine.speculate.proposer import NO_DRAFT, Draft
from engine.speculate.vocabulary import token_file_format
from engine.splitmix import WORD_MASK, finalize, finalize_array

# An entry takes 8 bytes.
POOL_ENTRIES = 2**21
# Up to this many tokens are added in a Python loop, which is then faster than numpy.
MAX_LOOP_TOKENS = 48

POOL_FORMAT = token_file_format(b"PLNGMOD\0")
_MULTIPLIER = 6364136223846793005
_TOKEN_MASK = 2**24 - 1
_TAG_MASK = WORD_MASK ^ _TOKEN_MASK
# The lowest bit of a tag is set in every used entry, so that no used entry is 0.
_USED = 2**24


def scope_of(name: str) -> int:
    """Returns the number, 0 to 2^64 - 1, of the scope `name`. A proposer finds only n-grams of its own scope."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


class NgramPool:
    """A table of the token that last followed each n-gram, by scope: 16 MiB for any number of slots.

    Belongs to the engine thread.

    The hash of tokens t[0..n) is the rolling sum of t[j] * A^(n-1-j) modulo 2^64, combined with the scope by XOR and
    passed through SplitMix64's finaliser. Its low bits are the entry's index, its high 40 bits the tag. An entry is
    `tag | token`, with 24 bits for the token; 0 is an empty entry. The probability that a look-up mistakes the entry of
    another n-gram with the same index for its own is 2^-39.
    """

    def __init__(self, n_match: int = 24, entries: int = POOL_ENTRIES) -> None:
        assert n_match > 0, "an n-gram has tokens"
        assert entries >= 8, "a saved byte has the bits of eight entries"
        assert entries & (entries - 1) == 0, "an index is the low bits of a hash"
        self.n_match = n_match
        self._table = np.zeros(entries, np.uint64)
        # A view of the same memory: reading one entry of a memoryview is much faster than of an array.
        self._entries = self._table.data
        self._index_mask = entries - 1
        self._leading = pow(_MULTIPLIER, n_match - 1, 2**64)

    def __len__(self) -> int:
        """The number of used entries."""
        return int(np.count_nonzero(self._table))

    def add(self, scope: int, tokens: Sequence[int], start: int) -> None:
        """Adds an entry for each of `tokens[start:]` with at least `n_match` tokens before it."""
        start = max(start, self.n_match)
        if len(tokens) - start > MAX_LOOP_TOKENS:
            self._add_array(scope, tokens[start - self.n_match :])
        elif len(tokens) > start:
            self._add_loop(scope, tokens[start - self.n_match :])

    def chain(self, scope: int, tokens: Sequence[int], limit: int) -> list[int]:
        """Returns at most `limit` tokens that successive look-ups find after `tokens`, up to the first miss."""
        n, entries, index_mask, leading = self.n_match, self._entries, self._index_mask, self._leading
        if len(tokens) < n:
            return []
        window = list(tokens[-n:])
        bits = _hash(window)
        for at in range(limit):
            mixed = finalize(bits ^ scope)
            entry = entries[mixed & index_mask]
            if entry & _TAG_MASK != mixed & _TAG_MASK | _USED:
                break
            token = entry & _TOKEN_MASK
            window.append(token)
            bits = (bits - window[at] * leading) * _MULTIPLIER + token & WORD_MASK
        return window[n:]

    def _add_loop(self, scope: int, tokens: Sequence[int]) -> None:
        bits = _hash(tokens[: self.n_match])
        for oldest, token in zip(tokens, tokens[self.n_match :], strict=False):
            mixed = finalize(bits ^ scope)
            self._entries[mixed & self._index_mask] = mixed & _TAG_MASK | _USED | token
            bits = (bits - oldest * self._leading) * _MULTIPLIER + token & WORD_MASK

    def _add_array(self, scope: int, tokens: Sequence[int]) -> None:
        ids = np.asarray(tokens, np.uint64)
        size = len(ids) - self.n_match
        bits = np.zeros(size, np.uint64)
        for at in range(self.n_match):
            bits *= np.uint64(_MULTIPLIER)
            bits += ids[at : at + size]
        bits ^= np.uint64(scope)
        finalize_array(bits)
        # Of several values for one index, numpy's assignment keeps the last.
        indices = (bits & np.uint64(self._index_mask)).astype(np.intp)
        self._table[indices] = bits & np.uint64(_TAG_MASK) | np.uint64(_USED) | ids[self.n_match :]

    def save(self, path: Path, vocabulary_digest: bytes) -> None:
        """Writes the used entries, 8 bytes each, and a bit for each index. Raises OSError; see `FileFormat.write`."""
        used = self._table != 0
        saved = _Saved(self.n_match, np.packbits(used).tobytes(), self._table[used].astype("<u8").tobytes())
        POOL_FORMAT.write(path, vocabulary_digest, msgspec.msgpack.encode(saved))

    def load(self, path: Path, vocabulary_digest: bytes, n_vocab: int) -> None:
        """Replaces all entries by those of a file.

        Raises OSError, or DamagedFile if the file is damaged, has another `n_match` or number of entries, or has a
        token that is not below `n_vocab`. The pool is then unchanged.
        """
        try:
            saved = msgspec.msgpack.decode(POOL_FORMAT.read(path, vocabulary_digest), type=_Saved)
        except msgspec.MsgspecError as error:
            raise DamagedFile(f"{path} is damaged: {error}") from error
        if saved.n_match != self.n_match:
            raise DamagedFile(f"{path} has n-grams of {saved.n_match} tokens, not {self.n_match}")
        if 8 * len(saved.used) != len(self._table):
            raise DamagedFile(f"{path} has a pool of {8 * len(saved.used)} entries, not {len(self._table)}")
        used = np.unpackbits(np.frombuffer(saved.used, np.uint8)).view(np.bool_)
        if len(saved.entries) != 8 * np.count_nonzero(used):
            raise DamagedFile(f"{path} is damaged: the number of its entries is wrong")
        entries = np.frombuffer(saved.entries, "<u8").astype(np.uint64)
        if not _valid(entries, n_vocab):
            raise DamagedFile(f"{path} has entries that do not fit this vocabulary of {n_vocab} tokens")
        self._table[:] = 0
        self._table[used] = entries


class _Saved(Struct, frozen=True):
    """The payload of the file."""

    n_match: int
    used: bytes
    entries: bytes


class NgramModProposer:
    """Drafts the pool's chain of tokens after the last n tokens, and adds each token of its request to the pool.

    Entries stay in the pool when the history is truncated or shifted. A shift adds no entries across the gap; tokens
    emitted later are added after the shifted history. An emitted token that differs from an entry replaces the entry.
    """

    def __init__(self, pool: NgramPool, scope: int, n_min: int = 48, n_max: int = 64) -> None:
        """A chain of fewer than `n_min` tokens gives no draft. A draft has at most `n_max` tokens."""
        self._pool = pool
        self._scope = scope
        self._n_min = n_min
        self._n_max = n_max
        self._history = array("i")

    def begin(self, tokens: Sequence[int]) -> None:
        """Adds the prompt to the pool."""
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        """Returns the first `limit` tokens of the chain. `n_min` applies to the chain, not to the returned draft."""
        length = min(self._n_max, max(self._n_min, limit))
        tokens = self._pool.chain(self._scope, self._history[-self._pool.n_match :], length)
        if not tokens or len(tokens) < self._n_min:
            return NO_DRAFT
        return Draft(tokens[:limit])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history and adds them to the pool."""
        before = min(len(self._history), self._pool.n_match)
        self._history.extend(emitted)
        self._pool.add(self._scope, self._history[-before - len(emitted) :], before)

    def truncate(self, length: int) -> None:
        """Removes all but the first `length` tokens of the history."""
        del self._history[length:]

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep` from the history."""
        del self._history[keep : keep + discard]

    def end(self) -> None:
        """Does nothing: the pool outlives the request."""


def _hash(tokens: Sequence[int]) -> int:
    bits = 0
    for token in tokens:
        bits = bits * _MULTIPLIER + token & WORD_MASK
    return bits


def _valid(entries: NDArray[np.uint64], n_vocab: int) -> bool:
    """Returns True if every entry has a tag and a token below `n_vocab`."""
    tagged = (entries & np.uint64(_USED) != 0).all()
    return bool(tagged and (entries & np.uint64(_TOKEN_MASK) < n_vocab).all())
