"""`grammar`: drafts the tokens that the request's grammar forces, such as the property names of a JSON schema."""

from __future__ import annotations

from collections.abc import Sequence

from engine.grammar import Matcher
from engine.speculate.proposer import NO_DRAFT, Draft


class GrammarProposer:
    """Drafts the tokens that are the only ones that the grammar permits. Verification accepts all of them.

    The request's `Matcher` contains the state after the emitted tokens, so the proposer keeps no history.
    """

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    def begin(self, tokens: Sequence[int]) -> None:
        pass

    def propose(self, limit: int) -> Draft:
        tokens = self._matcher.forced_tokens(limit)
        return Draft(tokens, [1.0] * len(tokens)) if tokens else NO_DRAFT

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        pass

    def truncate(self, length: int) -> None:
        pass

    def shift(self, keep: int, discard: int) -> None:
        pass

    def end(self) -> None:
        pass
