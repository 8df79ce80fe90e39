"""The drafts that one step verifies, for all sequences at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import ceil, inf
from typing import Any, NamedTuple
from weakref import WeakSet

from engine.pace import TRIAL_TOKENS, DraftChooser, UpcomingStep
from engine.speculate.proposer import NO_DRAFT, BatchedDraftRequest, BatchedProposer, Draft
from engine.speculate.sequence_proposers import SequenceProposers
from engine.speculate.tracked_proposer import TrackedBatchedSequence, TrackedProposer

# Share of the last step's time in which the batched proposer may prefill histories before the next.
_PREFILL_SHARE = 0.5
# Share of a step that polls of proposers without useful drafts may take.
_POLL_SHARE = 0.006
# A proposer is polled in every step if its last draft was expected to have so many tokens accepted, whatever it costs.
_USEFUL_TOKENS = 1.0
# A proposer is polled in at least one of so many steps.
_MAX_POLL_INTERVAL = 16


class DraftCandidate(NamedTuple):
    """A decoding sequence for which a draft could be verified in the next step."""

    proposers: SequenceProposers
    limit: int
    """Most tokens of the draft."""
    room: int = 1
    """Tokens that the sequence may still emit."""
    seq: int = 0
    """Its sequence id."""


class _ExpectedDraft(NamedTuple):
    """The length of a draft, and its tokens that are expected to be accepted."""

    length: int
    gain: float


class _BatchedDraft(NamedTuple):
    """A draft that the batched proposer may make for the candidate at index `i`."""

    i: int
    candidate: DraftCandidate
    tracked: TrackedBatchedSequence
    limit: int
    """Most tokens."""
    curve: Sequence[float]
    """The expected chance of each token and all before it."""
    floor: float = 0.0
    """As in `BatchedDraftRequest`."""


class DraftPlanner:
    """Decides for each step which proposers are polled, for which sequences the batched proposer drafts and how many
    tokens, and which draft of each sequence is verified at which length. Belongs to the engine thread."""

    def __init__(self, chooser: DraftChooser, batched: BatchedProposer[Any] | None = None) -> None:
        """`batched` drafts for the sequences that it made."""
        self._chooser = chooser
        self._batched = batched
        self._begun = WeakSet[TrackedBatchedSequence]()  # their histories were prefilled in part

    def plan(
        self,
        candidates: Sequence[DraftCandidate],
        prefilling: Sequence[SequenceProposers],
        step: UpcomingStep,
        last_step_seconds: float,
    ) -> list[Draft]:
        """Returns for each of `candidates` the draft that `step` verifies, which may be empty.

        `prefilling` are the proposers of the sequences that are being prefilled: the batched proposer prefills those
        that have no other proposer at the same time.
        """
        budget = _POLL_SHARE * last_step_seconds / max(1, len(candidates))
        for candidate in candidates:
            poll(candidate.proposers, candidate.limit, budget)
        if self._batched is not None:
            self._poll_batched(self._batched, candidates, prefilling, step, last_step_seconds)
        return self._choose(candidates, step)

    def _choose(self, candidates: Sequence[DraftCandidate], step: UpcomingStep) -> list[Draft]:
        drafts = [each.proposers.choose_longest() if each.proposers.fixed else NO_DRAFT for each in candidates]
        step = step.with_drafts({each.seq: len(draft.tokens) for each, draft in zip(candidates, drafts, strict=True)})
        drafted = _measured_drafts(candidates)
        choice = self._chooser.decide(_curves(drafted), [candidates[i].seq for i in drafted], step)
        for (i, tracked), picked, length in zip(drafted.items(), choice.picked, choice.lengths, strict=True):
            drafts[i] = candidates[i].proposers.choose(tracked[picked], length)
        return drafts

    # ── the batched proposer ──

    def _poll_batched(
        self,
        batched: BatchedProposer[Any],
        candidates: Sequence[DraftCandidate],
        prefilling: Sequence[SequenceProposers],
        step: UpcomingStep,
        last_step_seconds: float,
    ) -> None:
        able = _batched_drafts(candidates)
        measured = [draft for draft in able if not draft.candidate.proposers.fixed]
        paying, resumed = self._plan_batched(batched, measured, candidates, step)
        planned = [draft for draft in able if draft.candidate.proposers.fixed] + paying + resumed
        requests = [BatchedDraftRequest(draft.tracked.sequence, draft.limit, draft.floor) for draft in planned]
        requests += [
            BatchedDraftRequest(tracked.sequence, 0)
            for proposers in prefilling
            if (tracked := proposers.batched) is not None and not proposers.unbatched and (proposers.fixed or paying)
        ]
        if not requests:
            return
        self._begun = WeakSet(draft.tracked for draft in planned if batched.prefill_tokens(draft.tracked.sequence))
        begun = time.perf_counter()
        batched.draft(requests, _PREFILL_SHARE * last_step_seconds)
        seconds = (time.perf_counter() - begun) / len(requests)
        for draft in planned:
            draft.tracked.propose(draft.limit, draft.candidate.proposers.bounds, seconds)

    def _plan_batched(
        self,
        batched: BatchedProposer[Any],
        able: Sequence[_BatchedDraft],
        candidates: Sequence[DraftCandidate],
        step: UpcomingStep,
    ) -> tuple[list[_BatchedDraft], list[_BatchedDraft]]:
        """Returns the drafts of `able` that pay, at the lengths that pay, and others whose histories are prefilled in
        part. Their prefill would be lost without a draft."""
        if not able or batched.fault or not self._chooser.cost.curve:
            return [], []
        others, rate = self._without_batched(candidates, step)
        # A batched draft replaces that of another proposer if as many tokens are expected to be accepted.
        better = [draft for draft in able if draft.i not in others or sum(draft.curve) >= others[draft.i].gain]
        paying: list[_BatchedDraft] = []
        if better:
            for draft in better:
                others.pop(draft.i, None)
            lengths = {candidates[i].seq: other.length for i, other in others.items()}
            beside = step.with_drafts(lengths, sum(other.gain for other in others.values()))
            paying = self._paying_lengths(batched, better, beside, rate)
        planned = {draft.i for draft in paying}
        resumed = [
            draft._replace(limit=min(TRIAL_TOKENS, draft.limit))
            for draft in able
            if draft.i not in planned and draft.tracked in self._begun
        ]
        return paying, resumed

    def _without_batched(
        self, candidates: Sequence[DraftCandidate], step: UpcomingStep
    ) -> tuple[dict[int, _ExpectedDraft], float]:
        """Returns by candidates' index the drafts of other proposers that would be verified without the batched
        proposer, and the tokens per second with them."""
        drafted = _measured_drafts(candidates)
        choice = self._chooser.choose(_curves(drafted), [candidates[i].seq for i in drafted], step)
        chosen = zip(drafted.items(), choice.picked, choice.lengths, strict=True)
        others = {
            i: _ExpectedDraft(length, sum(tracked[picked].curve[:length])) for (i, tracked), picked, length in chosen
        }
        return others, choice.rate or self._chooser.rate(step)

    def _paying_lengths(
        self, batched: BatchedProposer[Any], drafts: Sequence[_BatchedDraft], step: UpcomingStep, rate: float
    ) -> list[_BatchedDraft]:
        """Returns `drafts` at the lengths that pay; none if none pays. `rate` is in tokens per second without them."""
        prefills = [batched.prefill_seconds(batched.prefill_tokens(draft.tracked.sequence)) for draft in drafts]
        # Prefill is paid for by all tokens that the sequence still emits, most of which come in drafts.
        position_seconds = batched.position_seconds(len(drafts))
        position_seconds += sum(
            spent / max(1, draft.candidate.room) for spent, draft in zip(prefills, drafts, strict=True)
        )
        fewest = [draft.candidate.proposers.min_tokens(draft.tracked) for draft in drafts]
        bounds = max(1, *fewest), max(draft.limit for draft in drafts)
        curves, seqs = [draft.curve for draft in drafts], [draft.candidate.seq for draft in drafts]
        length, rate = self._chooser.equal_lengths(curves, seqs, bounds, step, position_seconds, rate, sum(prefills))
        floor = rate * position_seconds / len(drafts)
        return [
            draft._replace(limit=min(length, draft.limit), floor=0.0 if least else floor)
            for draft, least in zip(drafts, fewest, strict=True)
            if min(length, draft.limit) >= max(1, least)
        ]


def poll(proposers: SequenceProposers, limit: int, budget_seconds: float = inf) -> None:
    """Polls the proposers of one sequence, except a batched one, for drafts of at most `limit` tokens each.

    In a fixed order the polls end with the first draft. Else, where polls of all proposers without useful drafts would
    take more than `budget_seconds`, these are polled in turns.
    """
    number = proposers.begin_poll()
    interval = 1 if proposers.fixed else _poll_interval(proposers.unbatched, budget_seconds)
    for i, tracked in enumerate(proposers.unbatched):
        if tracked.expected_accepted < _USEFUL_TOKENS and (number + i) % interval:
            tracked.clear_draft()
            continue
        tracked.propose(limit, proposers.bounds)
        if proposers.fixed and tracked.draft.tokens:
            return


def _poll_interval(unbatched: Sequence[TrackedProposer], budget_seconds: float) -> int:
    cost = sum(tracked.stats.cost_seconds for tracked in unbatched if tracked.expected_accepted < _USEFUL_TOKENS)
    return 1 if cost <= budget_seconds or not budget_seconds else min(_MAX_POLL_INTERVAL, ceil(cost / budget_seconds))


def _batched_drafts(candidates: Sequence[DraftCandidate]) -> list[_BatchedDraft]:
    """Returns the longest drafts that the batched proposer may make."""
    return [
        _BatchedDraft(i, candidate, tracked, limit, tracked.stats.acceptance.curve(limit))
        for i, candidate in enumerate(candidates)
        if (tracked := candidate.proposers.batched) is not None
        and (limit := candidate.proposers.batched_limit(candidate.limit))
    ]


def _measured_drafts(candidates: Sequence[DraftCandidate]) -> dict[int, list[TrackedProposer]]:
    """Returns by candidates' index the proposers with drafts, of the candidates without a fixed order."""
    return {
        i: drafted
        for i, candidate in enumerate(candidates)
        if not candidate.proposers.fixed and (drafted := candidate.proposers.drafted)
    }


def _curves(drafted: Mapping[int, Sequence[TrackedProposer]]) -> list[list[list[float]]]:
    return [[tracked.curve for tracked in proposers] for proposers in drafted.values()]
