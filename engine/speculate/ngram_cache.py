"""`ngram-cache`: drafts from counts of the tokens that followed the last 1 to 4 tokens.

The counts are those of the request's own context, of other requests and of a corpus. Drafts are chosen as in llama.cpp
(common/ngram-cache.cpp, common_ngram_cache_draft). llama-server does not count single tokens, keeps a request's counts
for the next request of the slot, and accesses memory before the start of short histories. Here each token is counted at
once, and the counts of a context are dropped with its request. With empty `dynamic` and `static` counts the method is
prompt lookup decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.speculate.ngram_counts import (
    NGRAM_SIZES,
    TOKEN_BITS,
    TOKEN_MASK,
    NgramCounts,
    PackedFollowers,
    ngram_keys,
    suffix_keys,
    unpacked,
)
from engine.speculate.proposer import NO_DRAFT, Draft

# For n-grams of 1, 2, 3 and 4 tokens: the minimum total count, and the minimum percentage of the drafted follower.
# `best_follower` requires percentages of at least 50.
_CONTEXT_THRESHOLDS = ((2, 66), (2, 50), (1, 50), (1, 50))
_DYNAMIC_THRESHOLDS = ((4, 75), (3, 66), (2, 66), (2, 66))


class NgramCacheProposer:
    """Drafts the most frequent follower of the longest n-gram with enough counts.

    The request's own counts have priority over `dynamic` counts, and these over `static` counts. All requests add their
    tokens to `dynamic`, where they stay after a truncation or shift. `static` is read-only; its counts of bigrams also
    weight the candidates of the other two.
    """

    def __init__(self, dynamic: NgramCounts, static: NgramCounts, n_max: int = 8) -> None:
        """A draft has at most `n_max` tokens."""
        self._dynamic = dynamic
        self._static = static
        self._n_max = n_max
        self._history: list[int] = []
        self._context = NgramCounts()

    def begin(self, tokens: Sequence[int]) -> None:
        """Counts the prompt."""
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        """Returns a draft. The chance of a token is its share of the counted followers of its n-gram."""
        tokens: list[int] = []
        chances: list[float] = []
        tail = self._history[-NGRAM_SIZES[-1] :]
        while len(tokens) < min(limit, self._n_max) and (found := self._next_token(suffix_keys(tail))):
            tokens.append(found[0])
            chances.append(found[1])
            tail = [*tail[1 - NGRAM_SIZES[-1] :], found[0]]
        return Draft(tokens, chances) if tokens else NO_DRAFT

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Counts `emitted`."""
        start = len(self._history)
        self._history.extend(emitted)
        keys, tokens = ngram_keys(self._history, start)
        self._context.add_keyed(keys, tokens)
        self._dynamic.add_keyed(keys, tokens)

    def truncate(self, length: int) -> None:
        """Removes all but the first `length` tokens from the history and its counts."""
        if length < len(self._history):
            self._context.remove(self._history, length)
            del self._history[length:]

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep`, and counts the remaining context from scratch."""
        del self._history[keep : keep + discard]
        self._context = NgramCounts()
        self._context.add(self._history, 0)

    def end(self) -> None:
        """Frees the history and its counts."""
        self._history, self._context = [], NgramCounts()

    def _next_token(self, keys: Sequence[int]) -> tuple[int, float] | None:
        """Returns the next token and its share of the counts. `keys` are the `suffix_keys` of the history."""
        static = self._static.find(keys[1]) if len(keys) > 1 else None
        for counts, thresholds in ((self._context, _CONTEXT_THRESHOLDS), (self._dynamic, _DYNAMIC_THRESHOLDS)):
            for size in range(len(keys) - 1, -1, -1):
                followers = counts.find(keys[size])
                if followers is not None and (found := best_follower(followers, static, *thresholds[size])):
                    return found
        return None if static is None else best_follower(static, None, *_CONTEXT_THRESHOLDS[1])


def best_follower(
    followers: PackedFollowers, static: PackedFollowers | None, min_total: int, min_percent: int
) -> tuple[int, float] | None:
    """Returns the follower with the largest weighted count, and its share of all counts.

    The weight is 100 times the follower's count in `static`, or 1 if `static` lacks the follower. The larger count,
    then the smaller token id, decides between equal weighted counts. Returns None if the counts add up to less than
    `min_total`, or if the share is less than `min_percent`, which is at least 50.
    """
    if isinstance(followers, int):
        return (followers & TOKEN_MASK, 1.0) if followers >> TOKEN_BITS >= min_total else None
    # The top follower has the largest share. Only a follower in `static` can have a larger weighted count.
    if followers.total < min_total or 100 * followers.top_count < min_percent * followers.total:
        return None
    if static is None:
        return followers.top, followers.top_count / followers.total
    counts, weights = followers.counts, unpacked(static)
    candidates = {followers.top} | (counts.keys() & weights.keys())
    token = max(candidates, key=lambda each: (counts[each] * max(1, 100 * weights.get(each, 0)), counts[each], -each))
    if 100 * counts[token] < min_percent * followers.total:
        return None
    return token, counts[token] / followers.total
