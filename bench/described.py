"""Naive implementations of llama-server's n-gram proposers for comparison, written from a description of the originals.

The implementations reproduce the faults of the originals: rejected drafts, entries that win their bucket wrongly,
tokens that are never learnt, and entries of other requests. They omit out-of-bounds reads, aborts, and the entries that
the ngram-map types keep from the previous request of a slot; such entries only cost drafts.

Each class has the methods of `engine.speculate.proposer.Proposer` that a replay calls; a replay never edits the
history. llama-server passes the last token of a history separately; `history` includes that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from msgspec import Struct, field

from engine.speculate.proposer import Draft


class DescribedProposer:
    """A proposer of one request with its history. As in the server, a complete draft is truncated to `limit`."""

    def __init__(self) -> None:
        self.history: list[int] = []

    def begin(self, tokens: Sequence[int]) -> None:
        self.history.extend(tokens)

    def propose(self, limit: int) -> Draft:
        return Draft(self.draft_tokens()[:limit])

    def draft_tokens(self) -> list[int]:
        """Returns the whole draft before truncation."""
        raise NotImplementedError

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self.history.extend(emitted)

    def end(self) -> None:
        pass


class Simple(DescribedProposer):
    """`ngram-simple`: scans backward for the last n tokens and copies the m tokens after the match.

    A match at position 0 is ignored. A match with fewer than n tokens after it gives no draft, even if an earlier match
    would.
    """

    def __init__(self, n: int = 12, m: int = 48) -> None:
        super().__init__()
        self.n, self.m = n, m

    def draft_tokens(self) -> list[int]:
        known = len(self.history) - 1
        if known <= self.n + self.m + 1:
            return []
        key = self.history[-self.n :]
        for at in range(known - self.n - 1, 0, -1):
            if self.history[at : at + self.n] == key:
                copied = self.history[at + self.n : known][: self.m]
                return copied if len(copied) >= self.n else []
        return []


def bucket(ngram: Sequence[int], factor: int, size: int) -> int:
    """Returns the index of an n-gram in a table of `size` entries; `size` is a power of two."""
    return reduce(lambda bits, token: (bits * factor + token) % size, ngram, 0)


class DescribedContinuation(Struct):
    """A continuation of a key: the length of its next draft, its position in the history, and its count."""

    length: int
    start: int = 0
    count: int = 0


class NgramKey(Struct):
    """An n-gram: its number of lookups, the position up to which its occurrences are counted, and its continuations."""

    hits: int = 0
    counted: int = 0
    values: list[DescribedContinuation] = field(default_factory=list)


class MapK(DescribedProposer):
    """`ngram-map-k`: a hash table from n-grams to positions; the first n-gram in a bucket stays.

    A draft of a key is as long as the accepted part of the key's last draft, so drafts never grow again, and a key has
    no more drafts after a draft without an accepted token. `min_hits` has no effect.
    """

    BUCKETS = 262_144
    FACTOR = 2_654_435_761

    def __init__(self, n: int = 12, m: int = 48, min_hits: int = 1) -> None:
        super().__init__()
        self.n, self.m, self.min_hits = n, m, min_hits
        self._prompt = 0
        self._buckets: dict[int, int] = {}
        self._hashed = 0  # n-grams up to this position are in buckets
        self._keys: dict[tuple[int, ...], NgramKey] = {}
        self._drafted: DescribedContinuation | None = None

    def begin(self, tokens: Sequence[int]) -> None:
        super().begin(tokens)
        self._prompt = len(tokens)

    def draft_tokens(self) -> list[int]:
        self._drafted = None
        known = len(self.history) - 1
        if known < 2 * self.n + self.m:
            return []
        ngram, last = self.history[-self.n :], known - self.n - self.m - 1
        at = self._find(ngram, last)
        self._hash(last)
        if not at:
            return []
        key = self._keys.setdefault(tuple(ngram), NgramKey())
        key.hits += 1
        self._drafted = self._value(key, ngram, at)
        if self._drafted is None:
            return []
        # The tokens after the found position are copied even if the chosen value is another one.
        return self.history[at + self.n : at + self.n + min(self.m, self._drafted.length)]

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        if drafted and self._drafted is not None:
            self._drafted.length = accepted
        super().observe(emitted)

    def _value(self, key: NgramKey, ngram: list[int], at: int) -> DescribedContinuation | None:
        """Returns the continuation to draft; `None` for no draft."""
        if not key.values:
            key.values.append(DescribedContinuation(self.m))
        return key.values[0]

    def _find(self, ngram: list[int], last: int) -> int:
        """Returns the position of an n-gram; 0 if there is none.

        The bucket is tried first, then the positions that are not hashed yet, prompt positions before all others.
        """
        hashed = self._buckets.get(bucket(ngram, self.FACTOR, self.BUCKETS), 0)
        if 0 < hashed < last and self._at(hashed) == ngram:
            return hashed
        fresh = sorted(range(last, self._hashed, -1), key=lambda at: at >= self._prompt)
        return next((at for at in fresh if self._at(at) == ngram), 0)

    def _hash(self, last: int) -> None:
        for at in range(last, self._hashed, -1):
            self._buckets.setdefault(bucket(self._at(at), self.FACTOR, self.BUCKETS), at)
        self._hashed = max(self._hashed, last)

    def _at(self, at: int) -> list[int]:
        return self.history[at : at + self.n]


class MapK4v(MapK):
    """`ngram-map-k4v`: counts up to four continuations of a key, and drafts if one of them clearly prevails.

    The draft is the continuation at the found position, even if another one prevails. The last counted position is
    counted again at the next lookup.
    """

    VALUES = 4

    def _value(self, key: NgramKey, ngram: list[int], at: int) -> DescribedContinuation | None:
        if key.hits < self.min_hits:
            return None
        for start in range(key.counted, at + 1):
            if self._at(start) == ngram:
                self._count(key, start + self.n)
        key.counted = at
        prevailing = max(key.values, key=lambda value: value.count)
        others = sum(value.count for value in key.values) - prevailing.count
        return prevailing if prevailing.count >= 2 * others else None

    def _count(self, key: NgramKey, start: int) -> None:
        tokens = self.history[start : start + self.m]
        for value in key.values:
            if self.history[value.start : value.start + self.m] == tokens:
                value.count += 1
                return
        if len(key.values) < self.VALUES:
            key.values.append(DescribedContinuation(self.m, start, 1))


class ModTable:
    """The table that all slots of `ngram-mod` share: the latest token after each hash of n tokens, without a check for
    collisions."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        # Consecutive drafts with less than a quarter accepted. The original counts by slot; the replay has one slot.
        self.bad_drafts = 0


class Mod(DescribedProposer):
    """`ngram-mod`: chains lookups in the table until one fails; fewer than `n_min` tokens give no draft.

    The tokens of a request enter the table in batches of more than `LAG_TOKENS`. The table is cleared if it is a
    quarter full after a prompt, or if five consecutive drafts had less than a quarter accepted.
    """

    SIZE, FACTOR = 4 * 1024 * 1024, 6_364_136_223_846_793_005
    LAG_TOKENS, FULL_FRACTION, BAD_FRACTION, MAX_BAD_DRAFTS = 32, 0.25, 0.25, 5

    def __init__(self, table: ModTable, n: int = 24, n_min: int = 48, n_max: int = 64) -> None:
        super().__init__()
        self.n, self.n_min, self.n_max = n, n_min, n_max
        self._table = table
        self._learnt = 0  # n-grams that begin before this position are in the table

    def begin(self, tokens: Sequence[int]) -> None:
        super().begin(tokens)
        self._learn(self.history)
        if len(self._table.tokens) > self.FULL_FRACTION * self.SIZE:
            self._table.tokens.clear()

    def draft_tokens(self) -> list[int]:
        known = self.history[:-1]
        if len(known) < self.n:
            return []
        if self._learnt + self.LAG_TOKENS < len(known):
            self._learn(known)
        window = self.history[-self.n :]
        while len(window) < self.n + self.n_max:
            token = self._table.tokens.get(bucket(window[-self.n :], self.FACTOR, self.SIZE))
            if token is None:
                break
            window.append(token)
        draft = window[self.n :]
        return draft if len(draft) >= self.n_min else []

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        if drafted:
            self._table.bad_drafts = self._table.bad_drafts + 1 if accepted < self.BAD_FRACTION * drafted else 0
        if self._table.bad_drafts >= self.MAX_BAD_DRAFTS:
            self._table.tokens.clear()
            self._table.bad_drafts = 0
        super().observe(emitted)

    def _learn(self, known: Sequence[int]) -> None:
        for at in range(self._learnt, len(known) - self.n):
            self._table.tokens[bucket(known[at : at + self.n], self.FACTOR, self.SIZE)] = known[at + self.n]
        self._learnt = max(0, len(known) - self.n)


class CacheSlot:
    """The state of `ngram-cache` that a slot keeps from request to request."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, ...], dict[int, int]] = {}
        # Number of counted tokens; a new request does not reset it.
        self.size = 0


class Cache(DescribedProposer):
    """`ngram-cache` without files: drafts the most frequent follower of the longest n-gram with enough samples.

    New tokens are counted without the tokens before them, so a single new token adds no count. Counts and size of the
    slot outlive the request, so only the tokens of the next request beyond that size are counted.
    """

    # By n-gram size from 1: minimum samples, and minimum percentage of the follower.
    THRESHOLDS = ((2, 66), (2, 50), (1, 50), (1, 50))
    MAX_DRAFT_TOKENS = 8

    def __init__(self, slot: CacheSlot) -> None:
        super().__init__()
        self._slot = slot

    def draft_tokens(self) -> list[int]:
        self._count(self.history[self._slot.size :])
        self._slot.size = max(self._slot.size, len(self.history))
        tail = self.history[-len(self.THRESHOLDS) :]
        draft: list[int] = []
        while len(draft) < self.MAX_DRAFT_TOKENS and (token := self._next(tail + draft)) is not None:
            draft.append(token)
        return draft

    def _count(self, new: Sequence[int]) -> None:
        for size in range(1, len(self.THRESHOLDS) + 1):
            for at in range(size, len(new)):
                followers = self._slot.counts.setdefault(tuple(new[at - size : at]), {})
                followers[new[at]] = followers.get(new[at], 0) + 1

    def _next(self, tail: Sequence[int]) -> int | None:
        for size in range(min(len(self.THRESHOLDS), len(tail)), 0, -1):
            followers = self._slot.counts.get(tuple(tail[-size:]), {})
            samples, percent = self.THRESHOLDS[size - 1]
            total = sum(followers.values())
            if total >= samples and 100 * max(followers.values()) >= percent * total:
                return max(followers, key=lambda token: followers[token])
        return None
