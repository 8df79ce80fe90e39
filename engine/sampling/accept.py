"""Verification of a draft by sampling the target model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def sample_and_accept(draft: Sequence[int], sample: Callable[[int], int]) -> Iterator[int]:
    """Yields the tokens that the rows of one draft emit: exactly those emitted without the draft.

    Row j attended to the first j draft tokens; `sample(j)` samples it as if there were no draft. A row is sampled only
    when the iterator is advanced, so the caller appends each token to the history before the next row is sampled. The
    iterator ends after the first token that differs from the draft, as the later rows attended to a wrong history. A
    fully accepted draft yields one token more than its length.

    All tokens but the last are draft tokens. The last one may be a draft token too if the caller stops early.
    """
    for row, drafted in enumerate(draft):
        token = sample(row)
        yield token
        if token != drafted:
            return
    yield sample(len(draft))
