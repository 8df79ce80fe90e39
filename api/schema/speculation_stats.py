"""Draft statistics of a reply: vLLM's `metrics`, which load generators print, and the counts by proposer type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Self

from msgspec import UNSET, Struct, UnsetType

from engine import DraftStats, Finished, Speculation


def by_accepted(stats: Iterable[DraftStats]) -> list[int]:
    """Returns the number of drafts of all types with 0, 1, 2, ... accepted tokens.

    >>> by_accepted([DraftStats("suffix", 2, (1, 1)), DraftStats("draft", 2, (0, 0, 1))])
    [1, 1, 1]
    """
    return [sum(counts) for counts in zip_longest(*(each.by_accepted for each in stats), fillvalue=0)]


def by_position(counts: Sequence[int]) -> list[int]:
    """Returns the number of drafts whose token at position 0, 1, ... was accepted, from the result of `by_accepted`.

    >>> by_position([5, 2, 1])
    [3, 1]
    """
    return [sum(counts[position:]) for position in range(1, len(counts))]


class SpeculativeDecodingMetrics(Struct, frozen=True):
    """vLLM's `metrics.speculative_decoding`. Only steps that verified a draft are counted."""

    mean_acceptance_length: float
    """Tokens emitted per step, the target model's own token included."""
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    """Steps with 0, 1, 2, ... accepted draft tokens."""
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    """Tokens of the longest draft."""

    @classmethod
    def of(cls, stats: Sequence[DraftStats]) -> Self:
        """Returns the sum over proposer types. At least one type must have drafted."""
        histogram = by_accepted(stats)
        steps = sum(histogram)
        accepted = sum(each.accepted for each in stats)
        drafted = sum(each.drafted for each in stats)
        return cls(1 + accepted / steps, accepted / drafted, histogram, steps, accepted, drafted, len(histogram) - 1)


class MetricsReply(Struct, frozen=True):
    """vLLM's `metrics`, without the fields that `timings` has."""

    speculative_decoding: SpeculativeDecodingMetrics

    @classmethod
    def of(cls, ends: Sequence[Finished]) -> Self | UnsetType:
        """Returns the metrics of a single choice; UNSET for several choices, as in vLLM, and without drafts."""
        stats = ends[0].drafts if len(ends) == 1 else ()
        return cls(SpeculativeDecodingMetrics.of(stats)) if any(each.drafted for each in stats) else UNSET


class ProposerTypeReply(Struct, frozen=True):
    """The counts of one proposer type."""

    drafts: int
    drafted: int
    """Draft tokens verified."""
    accepted: int
    """Draft tokens accepted."""

    @classmethod
    def of(cls, stats: Sequence[DraftStats]) -> Self:
        """Returns the sum over choices."""
        counts = by_accepted(stats)
        return cls(sum(counts), sum(each.drafted for each in stats), sum(each.accepted for each in stats))


class SpeculativeReply(Struct, frozen=True):
    """`speculative` of a reply: the proposer types, their counts, and the requested parameters."""

    type: list[str]
    by_type: dict[str, ProposerTypeReply]
    n_max: int | UnsetType = UNSET
    n_min: int | UnsetType = UNSET
    p_min: float | UnsetType = UNSET
    size_n: int | UnsetType = UNSET
    min_hits: int | UnsetType = UNSET
    order: str | UnsetType = UNSET

    @classmethod
    def of(cls, requested: Speculation | None, ends: Sequence[Finished]) -> Self | UnsetType:
        """Returns the sum over choices; UNSET if the request has no `speculative` field and nothing was drafted."""
        stats = [each for end in ends for each in end.drafts]
        if requested is None and not any(each.drafted for each in stats):
            return UNSET
        types = list(dict.fromkeys(each.type for each in stats))
        by_type = {name: ProposerTypeReply.of([each for each in stats if each.type == name]) for name in types}
        parameters = {name: getattr(requested, name, None) for name in _PARAMETERS}
        return cls(types, by_type, **{name: value for name, value in parameters.items() if value is not None})


_PARAMETERS = tuple(name for name in Speculation.__struct_fields__ if name != "type")
