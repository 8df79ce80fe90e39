"""Counts of the tokens that followed n-grams of 1 to 4 tokens, for `ngram-cache`, and their file."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.checksummed import DamagedFile
from engine.speculate.vocabulary import token_file_format

NGRAM_SIZES = (1, 2, 3, 4)
# Drafting looks up only bigrams in the counts of a corpus.
STATIC_NGRAM_SIZES = (2,)
# With a limit on n-grams, the followers of each n-gram are limited to this many distinct tokens: almost any token can
# follow a short n-gram.
MAX_FOLLOWERS = 256

TOKEN_BITS = 24
TOKEN_MASK = 2**TOKEN_BITS - 1

COUNTS_FORMAT = token_file_format(b"PLNGCNT\0")
# The key of an n-gram is a number in base 2^24 + 403, whose digits are the token ids plus 1; the digit 0 means no
# token. Unlike with a power of two, all tokens change the low bits, which a dict uses first.
_BASE = 16777619
_POWERS = tuple(_BASE**size for size in range(NGRAM_SIZES[-1]))
_ONE_COUNT = 2**TOKEN_BITS


class Followers:
    """Counts of the tokens that followed an n-gram."""

    __slots__ = ("counts", "top", "top_count", "total")

    def __init__(self, token: int, count: int) -> None:
        self.counts = {token: count}
        self.total = self.top_count = count
        self.top = token

    def add(self, token: int, count: int) -> None:
        """Adds `count` to the count of `token`."""
        self.total += count
        count += self.counts.get(token, 0)
        self.counts[token] = count
        if count >= self.top_count and (count > self.top_count or token < self.top):
            self.top_count, self.top = count, token

    def remove(self, token: int) -> None:
        """Subtracts 1 from the count of `token`. The total must be at least 2."""
        self.total -= 1
        self.counts[token] -= 1
        if not self.counts[token]:
            del self.counts[token]
        if token == self.top:
            self.top_count = max(self.counts.values())
            self.top = min(token for token, count in self.counts.items() if count == self.top_count)


# The keys of n-grams, and for each the token that followed it.
KeyedTokens: TypeAlias = tuple[Sequence[int], Sequence[int]]
# Followers of an n-gram. A single follower, the usual case, is stored as count * 2^24 + token, which takes a third of
# the memory and time of a `Followers`.
PackedFollowers: TypeAlias = int | Followers


def suffix_keys(tokens: Sequence[int]) -> list[int]:
    """Returns the keys of the n-grams at the end of `tokens`, shortest first."""
    keys, key = [], 0
    for power, token in zip(_POWERS, reversed(tokens), strict=False):
        key += (token + 1) * power
        keys.append(key)
    return keys


def ngram_keys(history: Sequence[int], start: int, sizes: Sequence[int] = NGRAM_SIZES) -> KeyedTokens:
    """Returns the keys of the n-grams directly before each of `history[start:]`, and these tokens, ordered by size."""
    if len(history) - start == 1:  # the usual case, six times as fast
        preceding = suffix_keys(history[max(0, start - sizes[-1]) : start])
        keys = [key for size, key in enumerate(preceding, 1) if size in sizes]
        return keys, [history[start]] * len(keys)
    found: list[int] = []
    followed: list[int] = []
    keys = [0] * (len(history) - start)
    for size in range(1, min(sizes[-1] + 1, len(history))):
        if start < size:  # the first tokens have no n-gram of this size before them
            keys, start = keys[size - start :], size
        power = _POWERS[size - 1]
        before = history[start - size : len(history) - size]
        keys = [key + (token + 1) * power for key, token in zip(keys, before, strict=True)]
        if size in sizes:
            found += keys
            followed += history[start:]
    return found, followed


def unpacked(followers: PackedFollowers) -> dict[int, int]:
    """Returns the counts by token as a read-only dict."""
    return {followers & TOKEN_MASK: followers >> TOKEN_BITS} if isinstance(followers, int) else followers.counts


def _halved(followers: PackedFollowers) -> dict[int, int]:
    """Returns the halves of the counts, rounded down, that are above 0; if there are none, 1 for the top follower."""
    if isinstance(followers, int):
        return {followers & TOKEN_MASK: max(1, followers >> (TOKEN_BITS + 1))}
    halves = {token: count >> 1 for token, count in followers.counts.items() if count > 1}
    return halves or {followers.top: 1}


def _total(followers: PackedFollowers) -> int:
    return followers >> TOKEN_BITS if isinstance(followers, int) else followers.total


class NgramCounts:
    """Counts, for each n-gram, of the tokens that followed it."""

    def __init__(self, sizes: Sequence[int] = NGRAM_SIZES, limit: int | None = None) -> None:
        """Counts n-grams of these `sizes`. `limit` is the maximum number of n-grams after each `add`; 0 counts none.

        `None` means no limit. To remove k n-grams, the 2k oldest are sorted by their total count, and by age between
        equal totals. The first half is removed. The counts of the second half are halved, rounded down, and these
        n-grams become the newest. So rare followers of frequent n-grams do not accumulate: an n-gram takes about 200
        bytes.
        """
        self._sizes = tuple(sizes)
        self._limit = limit
        self._table: dict[int, PackedFollowers] = {}
        # The keys, oldest first. Empty without a limit.
        self._ages: deque[int] = deque()

    def __len__(self) -> int:
        """The number of n-grams."""
        return len(self._table)

    def followers(self, ngram: Sequence[int]) -> dict[int, int]:
        """Returns the counts of the tokens that followed `ngram`."""
        found = self.find(suffix_keys(ngram)[-1])
        return {} if found is None else dict(unpacked(found))

    def find(self, key: int) -> PackedFollowers | None:
        """Returns the followers of the n-gram with `key` (see `suffix_keys`). None if the n-gram was not counted."""
        return self._table.get(key)

    def add(self, history: Sequence[int], start: int) -> None:
        """Counts each of `history[start:]` after the n-grams before it."""
        self.add_keyed(*ngram_keys(history, start, self._sizes))

    def add_keyed(self, keys: Sequence[int], tokens: Sequence[int]) -> None:
        """Counts each of `tokens` after the n-gram with its key. `keys` and `tokens` are a result of `ngram_keys`."""
        if self._limit == 0:
            return
        table, size_before = self._table, len(self._table)
        for key, token in zip(keys, tokens, strict=True):
            fresh = _ONE_COUNT | token
            followers = table.setdefault(key, fresh)  # one look-up; `get` and an assignment would be two
            if followers is not fresh:
                self._add_again(key, followers, token, 1)
        self._enforce_limit(size_before)

    def remove(self, history: Sequence[int], start: int) -> None:
        """Undoes `add` with the same arguments. Requires no limit, because the removal of n-grams cannot be undone."""
        assert self._limit is None, "counts with a limit are not exact"
        for key, token in zip(*ngram_keys(history, start, self._sizes), strict=True):
            followers = self._table[key]
            if isinstance(followers, Followers) and followers.total > 1:
                followers.remove(token)
            elif isinstance(followers, int) and followers >> TOKEN_BITS > 1:
                self._table[key] = followers - _ONE_COUNT
            else:
                del self._table[key]

    def _add_count(self, key: int, token: int, count: int) -> None:
        fresh = count * _ONE_COUNT | token
        if (followers := self._table.setdefault(key, fresh)) is not fresh:
            self._add_again(key, followers, token, count)

    def _add_again(self, key: int, followers: PackedFollowers, token: int, count: int) -> None:
        """Adds `count` to the count of `token` after the n-gram with `key`, which has `followers` already."""
        if isinstance(followers, int):
            if followers & TOKEN_MASK == token:
                self._table[key] = followers + count * _ONE_COUNT
                return
            self._table[key] = followers = Followers(followers & TOKEN_MASK, followers >> TOKEN_BITS)
        if self._limit is None or len(followers.counts) < MAX_FOLLOWERS or token in followers.counts:
            followers.add(token, count)

    def _enforce_limit(self, size_before: int) -> None:
        """Removes n-grams above the limit. `size_before` is the number of n-grams before the last change."""
        if self._limit is None:
            return
        table, ages = self._table, self._ages
        added = list(islice(reversed(table), len(table) - size_before))
        ages.extend(reversed(added))
        while (excess := len(table) - self._limit) > 0:
            oldest = [ages.popleft() for _ in range(min(2 * excess, len(ages)))]
            oldest.sort(key=lambda key: _total(table[key]))
            for i, key in enumerate(oldest):
                followers = table.pop(key)
                if i >= len(oldest) // 2:
                    ages.append(key)
                    for token, count in _halved(followers).items():
                        self._add_count(key, token, count)

    def save(self, path: Path, vocabulary_digest: bytes) -> None:
        """Writes all counts to `path`, oldest n-gram first. Raises OSError; see `FileFormat.write`.

        The payload is a zlib-compressed array of int32, [rows, 6]. A row is an n-gram, padded on the left with -1 to
        four tokens, a token that followed the n-gram, and the count of that token.
        """
        halves = np.array([divmod(key, _BASE**2) for key in self._table], np.int64).reshape(-1, 2)
        ngrams = np.stack(np.divmod(halves, _BASE), axis=-1).reshape(-1, NGRAM_SIZES[-1]) - 1
        counts_by_token = [unpacked(followers) for followers in self._table.values()]
        repeated = np.repeat(ngrams, [len(counts) for counts in counts_by_token], axis=0)
        tokens = [token for counts in counts_by_token for token in counts]
        counts = [count for counts in counts_by_token for count in counts.values()]
        rows = np.column_stack([repeated, tokens, counts]).astype("<i4")
        COUNTS_FORMAT.write(path, vocabulary_digest, zlib.compress(rows.tobytes(), 1))

    def load(self, path: Path, vocabulary_digest: bytes, n_vocab: int) -> None:
        """Adds the counts of a file, then enforces the limit.

        Raises OSError, or DamagedFile if the file is damaged, has n-grams of a size that is not counted here, or has a
        token that is not below `n_vocab`. The counts are then unchanged.
        """
        try:
            rows = np.frombuffer(zlib.decompress(COUNTS_FORMAT.read(path, vocabulary_digest)), "<i4")
            rows = rows.reshape(-1, NGRAM_SIZES[-1] + 2)
        except (zlib.error, ValueError) as error:
            raise DamagedFile(f"{path} is damaged: {error}") from error
        if not _valid(rows, self._sizes, n_vocab):
            raise DamagedFile(
                f"{path} has n-grams of other sizes, or tokens outside this vocabulary of {n_vocab} tokens"
            )
        if self._limit == 0:
            return
        size_before = len(self._table)
        ngrams, tokens, counts = rows[:, :-2].astype(object) + 1, rows[:, -2], rows[:, -1]
        keys = (ngrams * _POWERS[::-1]).sum(axis=1)
        for key, token, count in zip(keys.tolist(), tokens.tolist(), counts.tolist(), strict=True):
            self._add_count(key, token, count)
        self._enforce_limit(size_before)


def count_corpus(texts: Iterable[Sequence[int]]) -> NgramCounts:
    """Returns the static counts of a corpus: the followers of its bigrams. No bigram spans two texts."""
    counts = NgramCounts(STATIC_NGRAM_SIZES)
    for text in texts:
        counts.add(text, 0)
    return counts


def _valid(rows: NDArray[np.int32], sizes: tuple[int, ...], n_vocab: int) -> bool:
    """Returns True if the n-grams have these sizes, the tokens are below `n_vocab` and the counts positive."""
    ngrams, tokens, counts = rows[:, :-2], rows[:, -2], rows[:, -1]
    in_range = (ngrams < n_vocab).all() and (tokens >= 0).all() and (tokens < n_vocab).all() and (counts > 0).all()
    known = ngrams >= 0
    padded = (known[:, 1:] >= known[:, :-1]).all() and (ngrams >= -1).all()
    return bool(in_range and padded and np.isin(known.sum(axis=1), sizes).all())
