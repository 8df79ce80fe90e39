"""`ngram-mod`: one hash table, shared by all slots, from the last n tokens to the one that followed.

A draft is a chain of look-ups, each one's token rolled into the next one's hash. The idea is llama.cpp's
(common/ngram-mod.cpp); its entries hold only a token, so that any two n-grams with the same index are confused, and
the table is wiped for everybody once it is a quarter full or one slot drafts badly. Here an entry also says which
n-gram it is of, the newest entry takes the place, and nothing is ever wiped.
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

from engine.speculate import files
from engine.speculate.base import NO_DRAFT, Draft
from engine.speculate.files import DamagedFile

ENTRIES = 2**21
"""Entries of a pool, 8 bytes each."""
FEW = 48
"""Up to so many tokens are learnt one by one: arrays have a price of their own."""

_MAGIC = b"PLNGMOD\0"
_WORD = 2**64 - 1
_MULTIPLIER = 6364136223846793005
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_TOKEN = 2**24 - 1
_TAG = _WORD ^ _TOKEN
_USED = 2**24  # the lowest bit of every tag, so that none is 0


def scope_of(name: str) -> int:
    """A scope's number, below 2^64. Scopes with different names never see each other's n-grams."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


class Pool:
    """What followed each n-gram last, by scope: 16 MiB, for any number of slots. Engine thread only.

    The hash of tokens t[0..n) is the sum of t[j] * A^(n-1-j) modulo 2^64, which rolls; with the scope in it, it goes
    through SplitMix64's finaliser. Its low bits are the entry's index, its high 40 the tag. An entry is tag | token,
    with 24 bits for the token, and 0 if nobody used it. A wrong n-gram passes for another once in 2^39 looks at a
    place in use. Newer entries take the place of older ones.
    """

    def __init__(self, n_match: int = 24, entries: int = ENTRIES) -> None:
        assert n_match > 0, "an n-gram has tokens"
        assert entries >= 8, "entries are saved by eights"
        assert entries & (entries - 1) == 0, "an index is some bits of a hash"
        self.n_match = n_match
        self._table = np.zeros(entries, np.uint64)
        self._cells = self._table.data  # one entry: several times as fast as through the array
        self._last = entries - 1
        self._leading = pow(_MULTIPLIER, n_match - 1, 2**64)

    def __len__(self) -> int:
        """Entries in use."""
        return int(np.count_nonzero(self._table))

    def learn(self, scope: int, tokens: Sequence[int], start: int) -> None:
        """Each of `tokens[start:]` followed the n tokens before it, if there are so many; the latest wins."""
        start = max(start, self.n_match)
        if len(tokens) - start > FEW:
            self._learn_many(scope, tokens[start - self.n_match :])
        elif len(tokens) > start:
            self._learn_few(scope, tokens[start - self.n_match :])

    def chain(self, scope: int, tokens: Sequence[int], reach: int) -> list[int]:
        """What may follow `tokens`: one known token after the other, at most `reach`."""
        n, cells, last, leading = self.n_match, self._cells, self._last, self._leading
        if len(tokens) < n:
            return []
        window = list(tokens[-n:])
        bits = _hash(window)
        for at in range(reach):
            mixed = _finalize(bits ^ scope)
            entry = cells[mixed & last]
            if entry & _TAG != mixed & _TAG | _USED:
                break
            token = entry & _TOKEN
            window.append(token)
            bits = (bits - window[at] * leading) * _MULTIPLIER + token & _WORD
        return window[n:]

    def _learn_few(self, scope: int, tokens: Sequence[int]) -> None:
        bits = _hash(tokens[: self.n_match])
        for oldest, token in zip(tokens, tokens[self.n_match :], strict=False):
            mixed = _finalize(bits ^ scope)
            self._cells[mixed & self._last] = mixed & _TAG | _USED | token
            bits = (bits - oldest * self._leading) * _MULTIPLIER + token & _WORD

    def _learn_many(self, scope: int, tokens: Sequence[int]) -> None:
        ids = np.asarray(tokens, np.uint64)
        size = len(ids) - self.n_match
        bits = np.zeros(size, np.uint64)
        for at in range(self.n_match):
            bits *= np.uint64(_MULTIPLIER)
            bits += ids[at : at + size]
        bits ^= np.uint64(scope)
        _finalize_all(bits)
        # Of several values for one index the last is kept.
        indices = (bits & np.uint64(self._last)).astype(np.intp)
        self._table[indices] = bits & np.uint64(_TAG) | np.uint64(_USED) | ids[self.n_match :]

    def save(self, path: Path, vocabulary: bytes) -> None:
        """Writes the entries in use, 8 bytes each and a bit for every place: see `files.write`."""
        used = self._table != 0
        saved = _Saved(self.n_match, np.packbits(used).tobytes(), self._table[used].astype("<u8").tobytes())
        files.write(path, _MAGIC, vocabulary, msgspec.msgpack.encode(saved))

    def load(self, path: Path, vocabulary: bytes, n_vocab: int) -> None:
        """Takes the entries of a file in place of its own.

        Raises DamagedFile, also if the file is of another n or knows a token that is not below `n_vocab`, or OSError;
        then the pool is as it was.
        """
        try:
            saved = msgspec.msgpack.decode(files.read(path, _MAGIC, vocabulary), type=_Saved)
        except msgspec.MsgspecError as error:
            raise DamagedFile(f"{path} is damaged: {error}") from error
        if saved.n_match != self.n_match:
            raise DamagedFile(f"{path} has n-grams of {saved.n_match} tokens, not {self.n_match}")
        if 8 * len(saved.used) != len(self._table):
            raise DamagedFile(f"{path} has a pool of {8 * len(saved.used)} entries, not {len(self._table)}")
        used = np.unpackbits(np.frombuffer(saved.used, np.uint8)).view(np.bool_)
        if len(saved.entries) != 8 * np.count_nonzero(used):
            raise DamagedFile(f"{path} is damaged: it has more or fewer entries than it says")
        entries = np.frombuffer(saved.entries, "<u8").astype(np.uint64)
        if not _valid(entries, n_vocab):
            raise DamagedFile(f"{path} has entries that this vocabulary of {n_vocab} tokens cannot have made")
        self._table[:] = 0
        self._table[used] = entries


class _Saved(Struct, frozen=True):
    n_match: int
    used: bytes
    entries: bytes


class NgramMod:
    """Drafts what the pool says of the last n tokens, and tells it every token at once.

    The pool keeps what was seen when a history is truncated or shifted. The tokens on the two sides of a shift's
    seam are not told to it as neighbours; what is emitted after the shift is learnt as following the history as
    it then is. A wrong entry is overwritten by what was emitted in its place.
    """

    def __init__(self, pool: Pool, scope: int, n_min: int = 48, n_max: int = 64) -> None:
        """A chain of fewer than `n_min` tokens is no draft; none is longer than `n_max`."""
        self._pool = pool
        self._scope = scope
        self._n_min = n_min
        self._n_max = n_max
        self._history = array("i")

    def begin(self, tokens: Sequence[int]) -> None:
        """The history is `tokens`; the pool learns it."""
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        """The pool's chain, if it is long enough: a small `limit` shortens the draft, it does not prevent it."""
        reach = min(self._n_max, max(self._n_min, limit))
        tokens = self._pool.chain(self._scope, self._history[-self._pool.n_match :], reach)
        if not tokens or len(tokens) < self._n_min:
            return NO_DRAFT
        return Draft(tokens[:limit])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """`emitted` follow the history; the pool learns them."""
        before = min(len(self._history), self._pool.n_match)
        self._history.extend(emitted)
        self._pool.learn(self._scope, self._history[-before - len(emitted) :], before)

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens of the history are left."""
        del self._history[length:]

    def shift(self, keep: int, discard: int) -> None:
        """The `discard` tokens after the first `keep` left the history."""
        del self._history[keep : keep + discard]

    def end(self) -> None:
        """Nothing to forget: the pool has it all."""


def _hash(tokens: Sequence[int]) -> int:
    bits = 0
    for token in tokens:
        bits = bits * _MULTIPLIER + token & _WORD
    return bits


def _finalize(bits: int) -> int:
    bits = (bits ^ bits >> 30) * _FIRST & _WORD
    bits = (bits ^ bits >> 27) * _SECOND & _WORD
    return bits ^ bits >> 31


def _finalize_all(bits: NDArray[np.uint64]) -> None:
    """The same for an array, in place."""
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(_FIRST)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(_SECOND)
    bits ^= bits >> np.uint64(31)


def _valid(entries: NDArray[np.uint64], n_vocab: int) -> bool:
    """Whether every entry has a tag and a token below `n_vocab`."""
    tagged = (entries & np.uint64(_USED) != 0).all()
    return bool(tagged and (entries & np.uint64(_TOKEN) < n_vocab).all())
