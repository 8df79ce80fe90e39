"""The protocols of proposers, and the drafts that they make.

A draft never changes the output: the model verifies each drafted token, and the engine emits only the tokens that it
would have emitted without drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from msgspec import Struct


class Draft(Struct, frozen=True):
    """Tokens that may follow a history."""

    tokens: Sequence[int] = ()
    chances: Sequence[float] = ()
    """For each token the chance, by the proposer's own estimate, that it follows those before it; empty if the proposer
    makes no estimate."""


NO_DRAFT = Draft()


class DraftBounds(Struct, frozen=True):
    """Bounds of the drafts of one sequence."""

    n_max: int | None = None
    """Most tokens; `None` is any number."""
    n_min: int = 0
    """A shorter draft is dropped."""
    p_min: float = 0.0
    """A draft ends before the first token with a lower chance by its proposer's estimate."""
    permits: Callable[[Sequence[int]], int] | None = None
    """Returns the number of leading tokens that a grammar permits. `None` permits all."""

    def trim(self, draft: Draft) -> Draft:
        """Returns the longest beginning of `draft` within the bounds."""
        length = len(draft.tokens) if self.n_max is None else min(self.n_max, len(draft.tokens))
        if self.p_min:
            unlikely = (position for position, chance in enumerate(draft.chances[:length]) if chance < self.p_min)
            length = next(unlikely, length)
        if self.permits is not None and length:
            length = self.permits(draft.tokens[:length])
        if not length or length < self.n_min:
            return NO_DRAFT
        return draft if length == len(draft.tokens) else Draft(draft.tokens[:length], draft.chances[:length])


class Proposer(Protocol):
    """Drafts the continuation of one sequence's history. Called on the engine thread only.

    The history is a list of token ids: the tokens given to `begin`, appended to by each `observe` and edited by
    `truncate` and `shift`. After any edit the state equals that of a new proposer that begins with the edited history.
    """

    def begin(self, tokens: Sequence[int]) -> None:
        """Sets the history to `tokens`, which may be the first part of a long prompt. Called once, before all else."""

    def propose(self, limit: int) -> Draft:
        """Returns a draft of at most `limit` tokens, which is at least 1. An empty draft is valid."""

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history.

        After the verification of this proposer's last draft, `drafted` is the number of its tokens that were verified
        and `accepted` the number that was accepted. Else both are 0.
        """

    def truncate(self, length: int) -> None:
        """Cuts the history to its first `length` tokens."""

    def shift(self, keep: int, discard: int) -> None:
        """Removes from the history the `discard` tokens after the first `keep`; the tokens after them move up.

        The removed tokens may end after the history that the proposer has been given. The next observed tokens follow
        the removed ones.
        """

    def end(self) -> None:
        """Ends the sequence. No method is called afterwards."""


class BatchedSequence(Proposer, Protocol):
    """The proposer of one sequence whose drafts a `BatchedProposer` makes.

    `propose` returns the draft that the batched proposer has made since the last `observe`.
    """

    @property
    def type(self) -> str:
        """The type of the batched proposer."""

    @property
    def bounds(self) -> DraftBounds:
        """Bounds of its drafts, besides those of all proposers of the sequence."""

    def release(self) -> None:
        """Frees all resources of the batched proposer that the sequence holds; the next draft takes them again."""


_Sequence_co = TypeVar("_Sequence_co", bound=BatchedSequence, covariant=True)
_Sequence_contra = TypeVar("_Sequence_contra", bound=BatchedSequence, contravariant=True)


class BatchedDraftRequest(NamedTuple, Generic[_Sequence_co]):
    """A draft of at most `limit` tokens for one sequence; a `limit` of 0 only prefills its history.

    The draft ends once the chance that all its tokens are accepted, by the proposer's own estimate, is below `floor`.
    """

    sequence: _Sequence_co
    limit: int
    floor: float = 0.0


class BatchedProposer(Protocol[_Sequence_contra]):
    """Drafts for many sequences in one go, one position after the other. Called on the engine thread only."""

    fault: str
    """The reason for which it drafts no more; empty while it drafts."""

    def draft(self, requests: Sequence[BatchedDraftRequest[_Sequence_contra]], seconds: float) -> None:
        """Makes the drafts of `requests`, after it has prefilled histories for about `seconds`.

        A sequence whose history is not prefilled by then gets no draft.
        """

    def position_seconds(self, sequences: int) -> float:
        """Returns the seconds of one token for each of `sequences`; 0 if nothing was measured."""

    def prefill_tokens(self, sequence: _Sequence_contra) -> int:
        """Returns the tokens of its history that must be prefilled, in passes of their own, before its next draft."""

    def prefill_seconds(self, tokens: int) -> float:
        """Returns the seconds of the prefill of `tokens` tokens; 0 if nothing was measured."""


def num_matching(draft: Sequence[int], emitted: Sequence[int]) -> int:
    """Returns the number of leading tokens of `draft` that equal those of `emitted`."""
    count = 0
    for drafted, token in zip(draft, emitted, strict=False):
        if drafted != token:
            break
        count += 1
    return count
