"""Verification of a draft by sampling the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def accept(draft: Sequence[int], pick: Callable[[int], int]) -> Iterator[int]:
    """The tokens that the rows of one draft emit: those that would have come without it, and no others.

    Row j is the one that sees the first j draft tokens; `pick(j)` samples it as if no draft were there. Rows are
    picked one by one, each after its predecessor's token was taken from the iterator, so the caller appends a
    token to the history before it asks for the next. Going on ends at the first token that is not the draft's: the
    rows after it saw a wrong history. A fully right draft gives one token more than it has.

    Every token but the last is the draft's; the last may be too if the caller leaves early, which costs nothing.
    """
    for row, guess in enumerate(draft):
        token = pick(row)
        yield token
        if token != guess:
            return
    yield pick(len(draft))
