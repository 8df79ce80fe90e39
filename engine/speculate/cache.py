"""`ngram-cache`: what followed the last 1 to 4 tokens how often, here, in other requests and in a corpus.

The drafting is llama.cpp's (common/ngram-cache.cpp, common_ngram_cache_draft). Its server learns nothing from single
tokens, keeps one request's counts for the next one in the slot, and reads before the start of short histories; here
every token counts at once and the counts of a context end with its request. Prompt lookup is this with empty
`dynamic` and `static` counts.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.speculate import files
from engine.speculate.base import NO_DRAFT, Draft
from engine.speculate.files import DamagedFile

SIZES = (1, 2, 3, 4)
"""Tokens of an n-gram."""
STATIC_SIZES = (2,)
"""Of a corpus only bigrams are ever asked for, so only they are counted."""

LAX = ((2, 66), (2, 50), (1, 50), (1, 50))
STRICT = ((4, 75), (3, 66), (2, 66), (2, 66))
"""By size: how often an n-gram must have been seen, and the percentage of these that one token must have followed it.
None is below 50, which `pick` relies on."""

MOST = 256
"""Tokens that are counted after an n-gram where n-grams are limited too: short ones are followed by almost any."""

_MAGIC = b"PLNGCNT\0"
# An n-gram is the number that its tokens, plus 1, spell in this base, 2^24 + 403: there is a digit for every token and
# one for none, and unlike a power of two it lets all tokens matter to the low bits, which a dict looks at first.
_BASE = 16777619
_POWERS = tuple(_BASE**size for size in range(SIZES[-1]))
_TOKEN = 2**24 - 1
_ONCE = 2**24


class Followers:
    """What followed an n-gram and how often, if that was more than one token."""

    __slots__ = ("counts", "most", "top", "total")

    def __init__(self, token: int, count: int) -> None:
        self.counts = {token: count}
        self.total = self.most = count
        self.top = token

    def add(self, token: int, count: int) -> None:
        """`token` followed `count` times more."""
        self.total += count
        count += self.counts.get(token, 0)
        self.counts[token] = count
        if count >= self.most and (count > self.most or token < self.top):
            self.most, self.top = count, token

    def remove(self, token: int) -> None:
        """`token` followed once less; some token is left."""
        self.total -= 1
        self.counts[token] -= 1
        if not self.counts[token]:
            del self.counts[token]
        if token == self.top:
            self.most = max(self.counts.values())
            self.top = min(token for token, count in self.counts.items() if count == self.most)


Grams: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""N-grams as numbers, and the token that followed each."""
Entry: TypeAlias = int | Followers
"""An n-gram's followers. Most have only one, and are count * 2^24 + token: a third of the memory and of the time."""


def endings(tail: Sequence[int]) -> list[int]:
    """The numbers of the n-grams that end `tail`, the shortest first."""
    keys, key = [], 0
    for power, token in zip(_POWERS, reversed(tail), strict=False):
        key += (token + 1) * power
        keys.append(key)
    return keys


def grams(history: Sequence[int], start: int, sizes: Sequence[int] = SIZES) -> Grams:
    """The n-grams before each of `history[start:]`, those of one size after the other."""
    if len(history) - start == 1:  # as for most tokens; six times as fast
        keys = [key for size, key in enumerate(endings(history[max(0, start - sizes[-1]) : start]), 1) if size in sizes]
        return keys, [history[start]] * len(keys)
    found: list[int] = []
    followed: list[int] = []
    keys = [0] * (len(history) - start)
    for size in range(1, min(sizes[-1] + 1, len(history))):
        if start < size:  # nothing that long is before the first
            keys, start = keys[size - start :], size
        power = _POWERS[size - 1]
        before = history[start - size : len(history) - size]
        keys = [key + (token + 1) * power for key, token in zip(keys, before, strict=True)]
        if size in sizes:
            found += keys
            followed += history[start:]
    return found, followed


def followers(entry: Entry) -> dict[int, int]:
    """An entry as counts by token."""
    return {entry & _TOKEN: entry >> 24} if isinstance(entry, int) else entry.counts


def _seen(entry: Entry) -> int:
    """How often anything followed."""
    return entry >> 24 if isinstance(entry, int) else entry.total


class NgramCounts:
    """For each n-gram how often each token followed it."""

    def __init__(self, sizes: Sequence[int] = SIZES, limit: int | None = None) -> None:
        """Counts n-grams of these sizes, at most `limit` of them after every `add`; with a limit of 0 none ever.

        For each n-gram too many the two oldest are looked at: of all these the half seen least often goes, of equals
        the older ones; the others' counts are halved, rounded up, and they are young again. An n-gram takes about 170
        bytes, and 260 where there is a limit, as those that stay have more followers.
        """
        self._sizes = tuple(sizes)
        self._limit = limit
        self._table: dict[int, Entry] = {}
        self._ages: deque[int] = deque()  # with a limit, the n-grams from old to young

    def __len__(self) -> int:
        """N-grams."""
        return len(self._table)

    def followers(self, ngram: Sequence[int]) -> dict[int, int]:
        """How often each token followed `ngram`."""
        entry = self.find(endings(ngram)[-1])
        return {} if entry is None else dict(followers(entry))

    def find(self, key: int) -> Entry | None:
        """What followed the n-gram with this number (see `endings`)."""
        return self._table.get(key)

    def add(self, history: Sequence[int], start: int) -> None:
        """Each of `history[start:]` followed the n-grams before it."""
        self.learn(*grams(history, start, self._sizes))

    def learn(self, keys: Sequence[int], tokens: Sequence[int]) -> None:
        """The same, of the history's `grams`."""
        if self._limit == 0:
            return
        table, known = self._table, len(self._table)
        for key, token in zip(keys, tokens, strict=True):
            fresh = _ONCE | token
            entry = table.setdefault(key, fresh)  # one look-up where `get` and an assignment are two
            if entry is not fresh:
                self._again(key, entry, token, 1)
        self._age(known)

    def remove(self, history: Sequence[int], start: int) -> None:
        """Undoes `add` of the same. Only without a limit, as ageing cannot be undone."""
        assert self._limit is None, "counts that age are not exact"
        for key, token in zip(*grams(history, start, self._sizes), strict=True):
            entry = self._table[key]
            if isinstance(entry, Followers) and entry.total > 1:
                entry.remove(token)
            elif isinstance(entry, int) and entry >> 24 > 1:
                self._table[key] = entry - _ONCE
            else:
                del self._table[key]

    def _put(self, key: int, token: int, count: int) -> None:
        """`token` followed an n-gram `count` times more."""
        fresh = count * _ONCE | token
        if (entry := self._table.setdefault(key, fresh)) is not fresh:
            self._again(key, entry, token, count)

    def _again(self, key: int, entry: Entry, token: int, count: int) -> None:
        """The same, of an n-gram that has an entry."""
        if isinstance(entry, int):
            if entry & _TOKEN == token:
                self._table[key] = entry + count * _ONCE
                return
            self._table[key] = entry = Followers(entry & _TOKEN, entry >> 24)
        if self._limit is None or len(entry.counts) < MOST or token in entry.counts:
            entry.add(token, count)

    def _age(self, known: int) -> None:
        """Keeps the limit; before the last change there were `known` n-grams."""
        if self._limit is None:
            return
        table, ages = self._table, self._ages
        young = list(islice(reversed(table), len(table) - known))
        ages.extend(reversed(young))
        while (excess := len(table) - self._limit) > 0:
            oldest = [ages.popleft() for _ in range(min(2 * excess, len(ages)))]
            oldest.sort(key=lambda key: _seen(table[key]))
            for at, key in enumerate(oldest):
                entry = table.pop(key)
                if at >= len(oldest) // 2:
                    ages.append(key)
                    for token, count in followers(entry).items():
                        self._put(key, token, count + 1 >> 1)

    def save(self, path: Path, vocabulary: bytes) -> None:
        """Writes all counts, those of the oldest n-gram first: see `files.write`.

        The body is a compressed array of int32, [rows, 6]: an n-gram with -1 before it up to four tokens, a token
        that followed it, how often.
        """
        halves = np.array([divmod(key, _BASE**2) for key in self._table], np.int64).reshape(-1, 2)
        ngrams = np.stack(np.divmod(halves, _BASE), axis=-1).reshape(-1, SIZES[-1]) - 1
        entries = [followers(entry) for entry in self._table.values()]
        repeated = np.repeat(ngrams, [len(entry) for entry in entries], axis=0)
        tokens = [token for entry in entries for token in entry]
        counts = [count for entry in entries for count in entry.values()]
        rows = np.column_stack([repeated, tokens, counts]).astype("<i4")
        files.write(path, _MAGIC, vocabulary, zlib.compress(rows.tobytes(), 1))

    def load(self, path: Path, vocabulary: bytes, n_vocab: int) -> None:
        """Adds the counts of a file and then keeps the limit.

        Raises DamagedFile, also if the file has n-grams of a size that is not counted here or a token that is not
        below `n_vocab`, or OSError; then the counts are as they were.
        """
        try:
            rows = np.frombuffer(zlib.decompress(files.read(path, _MAGIC, vocabulary)), "<i4")
            rows = rows.reshape(-1, SIZES[-1] + 2)
        except (zlib.error, ValueError) as error:
            raise DamagedFile(f"{path} is damaged: {error}") from error
        if not _valid(rows, self._sizes, n_vocab):
            raise DamagedFile(f"{path} has n-grams of other sizes, or tokens that this vocabulary of {n_vocab} lacks")
        if self._limit == 0:
            return
        known = len(self._table)
        ngrams, tokens, counts = rows[:, :-2].astype(object) + 1, rows[:, -2], rows[:, -1]
        keys = (ngrams * _POWERS[::-1]).sum(axis=1)
        for key, token, count in zip(keys.tolist(), tokens.tolist(), counts.tolist(), strict=True):
            self._put(key, token, count)
        self._age(known)


def count(texts: Iterable[Sequence[int]]) -> NgramCounts:
    """The static counts of a corpus, for a file: its bigrams, none across two texts."""
    counts = NgramCounts(STATIC_SIZES)
    for text in texts:
        counts.add(text, 0)
    return counts


class NgramCache:
    """Drafts the most frequent continuation of the longest n-gram that was seen often enough.

    Counts of this request come first, then `dynamic`, which all requests share and teach every token they see, at
    once, and which forgets none on `truncate` or `shift`; then `static`, which is only read. A file of counts of the
    bigrams also weighs the candidates of the other two.
    """

    def __init__(self, dynamic: NgramCounts, static: NgramCounts, n_max: int = 8) -> None:
        """No draft is longer than `n_max`."""
        self._dynamic = dynamic
        self._static = static
        self._n_max = n_max
        self._history: list[int] = []
        self._context = NgramCounts()

    def begin(self, tokens: Sequence[int]) -> None:
        """The history is `tokens`."""
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        """Tokens with the share that each has among those that followed the same n-gram."""
        tokens: list[int] = []
        chances: list[float] = []
        tail = self._history[-SIZES[-1] :]
        while len(tokens) < min(limit, self._n_max) and (guess := self._guess(endings(tail))):
            tokens.append(guess[0])
            chances.append(guess[1])
            tail = [*tail[1 - SIZES[-1] :], guess[0]]
        return Draft(tokens, chances) if tokens else NO_DRAFT

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """`emitted` follow the history."""
        start = len(self._history)
        self._history.extend(emitted)
        keys, tokens = grams(self._history, start)
        self._context.learn(keys, tokens)
        self._dynamic.learn(keys, tokens)

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens of the history are left."""
        if length < len(self._history):
            self._context.remove(self._history, length)
            del self._history[length:]

    def shift(self, keep: int, discard: int) -> None:
        """The `discard` tokens after the first `keep` left the history; the context is counted anew."""
        del self._history[keep : keep + discard]
        self._context = NgramCounts()
        self._context.add(self._history, 0)

    def end(self) -> None:
        """Lets go of the history and its counts."""
        self._history, self._context = [], NgramCounts()

    def _guess(self, keys: Sequence[int]) -> tuple[int, float] | None:
        """The next token and its share; `keys` are the history's `endings`."""
        usual = self._static.find(keys[1]) if len(keys) > 1 else None
        for counts, thresholds in ((self._context, LAX), (self._dynamic, STRICT)):
            for size in range(len(keys) - 1, -1, -1):
                entry = counts.find(keys[size])
                if entry is not None and (guess := pick(entry, usual, *thresholds[size])):
                    return guess
        return None if usual is None else pick(usual, None, *LAX[1])


def pick(entry: Entry, usual: Entry | None, samples: int, percent: int) -> tuple[int, float] | None:
    """The follower with the largest count times weight, and its share, unless it is too rare.

    The weight is 100 times the count in `usual`, 1 if it is not there. Of equals the larger count wins, then the
    smaller token. It is too rare if `entry` has fewer than `samples` or it less than `percent`, which is at least
    50, of them.
    """
    if isinstance(entry, int):
        return (entry & _TOKEN, 1.0) if entry >> 24 >= samples else None
    # If the top follower is too rare any other is. If it is not, only one that `usual` knows can weigh more.
    if entry.total < samples or 100 * entry.most < percent * entry.total:
        return None
    if usual is None:
        return entry.top, entry.most / entry.total
    counts, weights = entry.counts, followers(usual)
    candidates = {entry.top} | (counts.keys() & weights.keys())
    token = max(candidates, key=lambda each: (counts[each] * max(1, 100 * weights.get(each, 0)), counts[each], -each))
    if 100 * counts[token] < percent * entry.total:
        return None
    return token, counts[token] / entry.total


def _valid(rows: NDArray[np.int32], sizes: tuple[int, ...], n_vocab: int) -> bool:
    """Whether rows have n-grams of these sizes and tokens below `n_vocab`, and counts."""
    ngrams, tokens, counts = rows[:, :-2], rows[:, -2], rows[:, -1]
    right = (ngrams < n_vocab).all() and (tokens >= 0).all() and (tokens < n_vocab).all() and (counts > 0).all()
    known = ngrams >= 0
    padded = (known[:, 1:] >= known[:, :-1]).all() and (ngrams >= -1).all()
    return bool(right and padded and np.isin(known.sum(axis=1), sizes).all())
