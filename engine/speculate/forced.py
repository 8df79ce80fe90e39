"""`grammar`: what a request's grammar leaves no choice about, such as the names of a schema's properties."""

from __future__ import annotations

from collections.abc import Sequence

from engine.grammar import Matcher
from engine.speculate.base import NO_DRAFT, Draft


class Forced:
    """The `grammar` proposer of a request. Its matcher knows the emitted tokens already, and it is always right."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    def begin(self, tokens: Sequence[int]) -> None:
        pass

    def propose(self, limit: int) -> Draft:
        tokens = self._matcher.forced(limit)
        return Draft(tokens, [1.0] * len(tokens)) if tokens else NO_DRAFT

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        pass

    def truncate(self, length: int) -> None:
        pass

    def shift(self, keep: int, discard: int) -> None:
        pass

    def end(self) -> None:
        pass
