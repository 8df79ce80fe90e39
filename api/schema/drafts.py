"""What became of drafts, as clients are told: in vLLM's shape, which load tools read, and by type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Self

from msgspec import UNSET, Struct, UnsetType

from engine import Drafts, Finished, Speculation


def by_accepted(drafts: Iterable[Drafts]) -> list[int]:
    """Drafts of all types by how many of their tokens were right.

    >>> by_accepted([Drafts("suffix", 2, (1, 1)), Drafts("draft", 2, (0, 0, 1))])
    [1, 1, 1]
    """
    return [sum(counts) for counts in zip_longest(*(each.by_accepted for each in drafts), fillvalue=0)]


def by_position(counts: Sequence[int]) -> list[int]:
    """How many drafts had a right token at each position; `counts` are drafts by right tokens.

    >>> by_position([5, 2, 1])
    [3, 1]
    """
    return [sum(counts[position:]) for position in range(1, len(counts))]


class Acceptance(Struct, frozen=True):
    """`metrics.speculative_decoding` of vLLM. A step is one that verified a draft."""

    mean_acceptance_length: float
    """Tokens of a step, the one that needs no guess included."""
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    """Steps by how many tokens of the draft were right."""
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    """Tokens of the longest draft."""

    @classmethod
    def of(cls, drafts: Sequence[Drafts]) -> Self:
        """The sum over types, of which one at least has drafted."""
        histogram = by_accepted(drafts)
        steps = sum(histogram)
        accepted = sum(each.accepted for each in drafts)
        drafted = sum(each.drafted for each in drafts)
        return cls(1 + accepted / steps, accepted / drafted, histogram, steps, accepted, drafted, len(histogram) - 1)


class MetricsReply(Struct, frozen=True):
    """vLLM's `metrics`, as far as they are not in `timings`."""

    speculative_decoding: Acceptance

    @classmethod
    def of(cls, ends: Sequence[Finished]) -> Self | UnsetType:
        """Those of a single choice; nothing for several, as with vLLM, or if nothing was drafted."""
        drafts = ends[0].drafts if len(ends) == 1 else ()
        return cls(Acceptance.of(drafts)) if any(each.drafted for each in drafts) else UNSET


class TypeReply(Struct, frozen=True):
    """What one type has guessed."""

    drafts: int
    drafted: int
    """Tokens that were verified."""
    accepted: int
    """Of these, the right ones."""

    @classmethod
    def of(cls, drafts: Sequence[Drafts]) -> Self:
        """The sum."""
        counts = by_accepted(drafts)
        return cls(sum(counts), sum(each.drafted for each in drafts), sum(each.accepted for each in drafts))


class SpeculativeReply(Struct, frozen=True):
    """`speculative` as it was asked for, with who was asked to guess and what came of it."""

    type: list[str]
    by_type: dict[str, TypeReply]
    n_max: int | UnsetType = UNSET
    n_min: int | UnsetType = UNSET
    p_min: float | UnsetType = UNSET
    size_n: int | UnsetType = UNSET
    min_hits: int | UnsetType = UNSET
    order: str | UnsetType = UNSET

    @classmethod
    def of(cls, asked: Speculation | None, ends: Sequence[Finished]) -> Self | UnsetType:
        """The sum over choices; nothing unless something was asked for or drafted."""
        all_drafts = [drafts for end in ends for drafts in end.drafts]
        if asked is None and not any(drafts.drafted for drafts in all_drafts):
            return UNSET
        types = list(dict.fromkeys(drafts.type for drafts in all_drafts))
        by_type = {name: TypeReply.of([drafts for drafts in all_drafts if drafts.type == name]) for name in types}
        bounds = {name: getattr(asked, name, None) for name in _BOUNDS}
        return cls(types, by_type, **{name: bound for name, bound in bounds.items() if bound is not None})


_BOUNDS = tuple(name for name in Speculation.__struct_fields__ if name != "type")
