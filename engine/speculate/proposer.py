"""The protocols of proposers, and their drafts.

A draft never changes the output: the model verifies each drafted token, and the engine emits only the tokens that it
would have emitted without drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from msgspec import Struct, structs


class Draft(Struct, frozen=True):
    """Tokens that may follow a history."""

    tokens: Sequence[int] = ()
    chances: Sequence[float] = ()
    """For each token the proposer's own estimate of the chance that it follows the tokens before it; empty if the
    proposer makes no estimates."""
    second_choices: Sequence[int] = ()
    """For each token the proposer's second choice at its place, -1 for none; empty if there are none."""
    place: int = -1
    """If not negative, the last of `tokens` is an alternative to the token at this place: its second choice."""

    def cut(self, length: int) -> Draft:
        """Returns the draft of the first `length` tokens."""
        return Draft(self.tokens[:length], self.chances[:length], self.second_choices[:length])

    def with_alternative(self, place: int) -> Draft:
        """Returns the draft with its second choice at `place` as the last token."""
        return structs.replace(self, tokens=(*self.tokens, self.second_choices[place]), place=place)


NO_DRAFT = Draft()


class DraftBounds(Struct, frozen=True):
    """Bounds of the drafts of one sequence."""

    n_max: int | None = None
    """Maximum tokens. `None` means no maximum."""
    n_min: int = 0
    """Minimum tokens: a shorter draft is dropped."""
    p_min: float = 0.0
    """A draft ends before the first token whose chance, by the proposer's own estimate, is lower."""
    num_permitted: Callable[[Sequence[int]], int] | None = None
    """Returns the number of leading tokens that the grammar permits. `None` means no grammar."""

    def trim(self, draft: Draft) -> Draft:
        """Returns the longest prefix of `draft` within the bounds; `NO_DRAFT` if it is shorter than `n_min`."""
        length = len(draft.tokens) if self.n_max is None else min(self.n_max, len(draft.tokens))
        if self.p_min:
            unlikely = (position for position, chance in enumerate(draft.chances[:length]) if chance < self.p_min)
            length = next(unlikely, length)
        if self.num_permitted is not None and length:
            length = self.num_permitted(draft.tokens[:length])
        if not length or length < self.n_min:
            return NO_DRAFT
        return draft if length == len(draft.tokens) else draft.cut(length)


class Proposer(Protocol):
    """Drafts the continuation of one sequence's history. Called on the engine thread only.

    The history is a list of token ids. `begin` sets it, `observe` appends to it, and `truncate` and `shift` edit it.
    After an edit the state equals that of a new proposer that begins with the edited history.
    """

    def begin(self, tokens: Sequence[int]) -> None:
        """Sets the history to `tokens`, which may be the first part of a long prompt. Called once, before other
        methods."""

    def propose(self, limit: int) -> Draft:
        """Returns a draft of at most `limit` tokens, or an empty draft. `limit` is at least 1."""

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history.

        If `emitted` results from the verification of this proposer's last draft, `drafted` is the number of verified
        draft tokens and `accepted` the number of accepted ones. Otherwise both are 0.
        """

    def truncate(self, length: int) -> None:
        """Cuts the history to its first `length` tokens."""

    def shift(self, keep: int, discard: int) -> None:
        """Removes from the history the `discard` tokens after the first `keep`; later tokens move up.

        Some of the removed tokens may not have been fed to the proposer yet. The next call of `observe` then begins
        after the removed tokens.
        """

    def end(self) -> None:
        """Ends the sequence. No method is called afterwards."""


class BatchedSequence(Proposer, Protocol):
    """The proposer of one sequence whose drafts a `BatchedProposer` makes.

    `propose` returns the draft that the batched proposer made since the last `observe`.
    """

    @property
    def type(self) -> str:
        """The type of the batched proposer."""

    @property
    def bounds(self) -> DraftBounds:
        """Bounds of this proposer's drafts, in addition to those of all proposers of the sequence."""

    def release(self) -> None:
        """Frees the batched proposer's resources for this sequence. The next draft allocates them again."""


_Sequence_co = TypeVar("_Sequence_co", bound=BatchedSequence, covariant=True)
_Sequence_contra = TypeVar("_Sequence_contra", bound=BatchedSequence, contravariant=True)


class BatchedDraftRequest(NamedTuple, Generic[_Sequence_co]):
    """A draft of at most `limit` tokens for one sequence; a `limit` of 0 only prefills its history.

    The draft ends once the chance that all of its tokens are accepted, by the proposer's own estimate, is below
    `floor`.
    """

    sequence: _Sequence_co
    limit: int
    floor: float = 0.0
    seq: int = -1
    """Sequence id in the target model's context; -1 if `limit` is 0."""


class BatchedProposer(Protocol[_Sequence_contra]):
    """Drafts for many sequences in one call, position by position. Called on the engine thread only."""

    fault: str
    """Reason why the proposer makes no drafts any more; empty while it works."""

    def draft(
        self, requests: Sequence[BatchedDraftRequest[_Sequence_contra]], seconds: float, min_rows: int = 1
    ) -> None:
        """Makes the drafts of `requests` after at most about `seconds` of prefill of their histories, or `min_rows`
        rows if these take longer.

        A sequence whose history is not prefilled by then gets no draft.
        """

    def position_seconds(self, sequences: int) -> float:
        """Returns the seconds of one draft token for each of `sequences`; 0 before the first measurement."""

    def prefill_tokens(self, sequence: _Sequence_contra) -> int:
        """Returns the number of tokens of the history that must be prefilled in passes of their own before the next
        draft."""

    def prefill_seconds(self, tokens: int) -> float:
        """Returns the seconds of the prefill of `tokens` tokens; 0 before the first measurement."""


def num_matching(draft: Sequence[int], emitted: Sequence[int]) -> int:
    """Returns the number of leading tokens of `draft` that equal those of `emitted`."""
    count = 0
    for drafted, token in zip(draft, emitted, strict=False):
        if drafted != token:
            break
        count += 1
    return count
