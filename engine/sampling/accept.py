"""Verification of a draft by sampling the target model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def sample_and_accept(draft: Sequence[int], sample: Callable[[int], int]) -> Iterator[int]:
    """Yields the tokens sampled from the rows of one draft. They are the tokens that would be emitted without the
    draft.

    `sample(j)` samples row j, which attended to the first j draft tokens, in the same way as without a draft. A row is
    sampled only when the iterator is advanced, so the caller can append each token to the history before the next row
    is sampled. The iterator ends after the first token that differs from the draft, as the later rows attended to a
    wrong history. If the whole draft is accepted, one more token is yielded than the draft has.

    Every yielded token except the last is a draft token.
    """
    for row, drafted in enumerate(draft):
        token = sample(row)
        yield token
        if token != drafted:
            return
    yield sample(len(draft))
