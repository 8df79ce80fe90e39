"""What a proposer is. A guess never changes the text: the runner emits what the model would have anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct


class Draft(Struct, frozen=True):
    """A guess at how a history goes on."""

    tokens: Sequence[int] = ()
    chances: Sequence[float] = ()
    """For each token how likely it is, given those before it, as the proposer sees it; empty if it cannot tell."""


NO_DRAFT = Draft()


class Bounds(Struct, frozen=True):
    """What drafts are allowed, whoever makes them."""

    n_max: int | None = None
    """Tokens at most; None is any number."""
    n_min: int = 0
    """A shorter draft is none."""
    p_min: float = 0.0
    """A draft ends before a token that its proposer thinks less likely than this."""
    permits: Callable[[Sequence[int]], int] | None = None
    """How many of these tokens may come one after the other; None if all may."""

    def trim(self, draft: Draft) -> Draft:
        """The part of `draft` that is allowed."""
        length = len(draft.tokens) if self.n_max is None else min(self.n_max, len(draft.tokens))
        if self.p_min:
            unlikely = (place for place, chance in enumerate(draft.chances[:length]) if chance < self.p_min)
            length = next(unlikely, length)
        if self.permits is not None and length:
            length = self.permits(draft.tokens[:length])
        if not length or length < self.n_min:
            return NO_DRAFT
        return draft if length == len(draft.tokens) else Draft(draft.tokens[:length], draft.chances[:length])


class Proposer(Protocol):
    """Guesses at how the history of one request goes on. Called on the engine thread only.

    The history is a list of token ids: what `begin` gave, grown by each `observe` and edited by `truncate` and
    `shift`. After any edit the state equals that of a fresh proposer that was given the edited history.
    """

    def begin(self, tokens: Sequence[int]) -> None:
        """The history is `tokens`, which may be only the first part of a long prompt. Called once, first."""

    def propose(self, limit: int) -> Draft:
        """At most `limit` tokens, at least 1, that may follow the history; none is a valid answer."""

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """`emitted` follow the history. If they come from the verification of this proposer's last proposal, the
        first `drafted` tokens of it were verified and the first `accepted` of those were right."""

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens of the history are left."""

    def shift(self, keep: int, discard: int) -> None:
        """The `discard` tokens after the first `keep` left the history; what follows moved up. They may be more than
        it was shown of the history: what it is shown next comes after them."""

    def end(self) -> None:
        """The request has ended; nothing is called any more."""
