"""Plans the drafts that one step verifies, for all sequences together.

A *batched* proposer (the draft model) drafts for many sequences in one call; the others are *unbatched*. A *tracked*
proposer is one sequence's proposer with its draft and statistics. Proposers with a *fixed* order are polled in the
order of their types up to the first draft; otherwise the draft is chosen by *measured* costs and chances.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import ceil, inf
from typing import Any, NamedTuple
from weakref import WeakSet

from msgspec import Struct

from engine.pace import TRIAL_TOKENS, DraftChooser, UpcomingStep
from engine.speculate.proposer import NO_DRAFT, BatchedDraftRequest, BatchedProposer, Draft
from engine.speculate.sequence_proposers import SequenceProposers
from engine.speculate.tracked_proposer import TrackedBatchedSequence, TrackedProposer

# Share of the last step's time that the batched proposer may spend on prefill before the next step.
_PREFILL_SHARE = 0.5
# Seconds of this prefill if only one sequence runs, so that no other one is delayed.
_PREFILL_SECONDS_ALONE = 0.5
# Minimum rows of this prefill: more than a step emits, so that a history is complete after a limited number of steps.
_MIN_PREFILL_ROWS = 16
# Share of the last step's time that may be spent on polling proposers without useful drafts.
_POLL_SHARE = 0.006
# A proposer is polled in every step, at any cost, if at least this many tokens of its last draft were expected to be
# accepted.
_USEFUL_TOKENS = 1.0
# Maximum number of steps from one poll of a proposer to the next.
_MAX_POLL_INTERVAL = 16


class LastStep(NamedTuple):
    """Measurements of the last decode."""

    seconds: float
    prompt_rows: int = 0
    """Rows of sequences that were being prefilled."""


class DraftCandidate(Struct, frozen=True):
    """A decoding sequence for which the next step can verify a draft."""

    proposers: SequenceProposers
    limit: int
    """Maximum tokens of the draft."""
    room: int = 1
    """`Sequence.draft_room`: one less than the tokens that the sequence may still emit."""
    seq: int = 0
    """Sequence id."""
    branches: bool = False
    """True if the draft may have an alternative."""


class _ExpectedDraft(NamedTuple):
    """The length of a draft, and the expected number of its accepted tokens."""

    length: int
    gain: float


class _BatchedDraft(NamedTuple):
    """A draft that the batched proposer may make for the candidate at index `i`."""

    i: int
    candidate: DraftCandidate
    tracked: TrackedBatchedSequence
    limit: int
    """Maximum tokens."""
    curve: Sequence[float]
    """For each token the expected chance that it and all tokens before it are accepted."""
    floor: float = 0.0
    """The draft ends once the chance that all of its tokens are accepted is below this: a further token would cost more
    than it yields."""


class DraftPlanner:
    """Plans the drafts of each step.

    It selects the proposers to poll, the sequences and lengths for which the batched proposer drafts, and the draft and
    the length that the step verifies for each sequence. Belongs to the engine thread.
    """

    def __init__(self, chooser: DraftChooser, batched: BatchedProposer[Any] | None = None) -> None:
        """`batched` is the engine's batched proposer, if there is one."""
        self._chooser = chooser
        self._batched = batched
        self._partly_prefilled = WeakSet[TrackedBatchedSequence]()  # those whose last prefill was not completed

    def plan(
        self,
        candidates: Sequence[DraftCandidate],
        prefilling: Sequence[SequenceProposers],
        step: UpcomingStep,
        last_step: LastStep,
    ) -> list[Draft]:
        """Returns for each of `candidates` the draft that `step` verifies, which may be empty.

        `prefilling` are the proposers of the sequences that are being prefilled. The batched proposer prefills the
        history of such a sequence at the same time if the sequence has no other proposer, and has a fixed order or
        batched drafts pay in this step.
        """
        budget = _POLL_SHARE * last_step.seconds / max(1, len(candidates))
        for candidate in candidates:
            poll(candidate.proposers, candidate.limit, budget)
        if self._batched is not None:
            self._poll_batched(self._batched, candidates, prefilling, step, last_step)
        return self._choose(candidates, step)

    def _choose(self, candidates: Sequence[DraftCandidate], step: UpcomingStep) -> list[Draft]:
        drafts = [each.proposers.choose_longest() if each.proposers.fixed else NO_DRAFT for each in candidates]
        fixed = {each.seq: len(draft.tokens) for each, draft in zip(candidates, drafts, strict=True) if draft.tokens}
        step = step.with_drafts(fixed)
        measured = _measured_drafts(candidates)
        choice = self._chooser.decide(_curves(measured), [candidates[i].seq for i in measured], step)
        for (i, tracked), picked, length in zip(measured.items(), choice.picked, choice.lengths, strict=True):
            drafts[i] = candidates[i].proposers.choose(tracked[picked], length)
        if step.max_alternatives and any(draft.second_choices for draft in drafts):
            self._add_alternatives(drafts, candidates, sum(choice.lengths), step)
        return drafts

    def _add_alternatives(
        self, drafts: list[Draft], candidates: Sequence[DraftCandidate], drafted: int, step: UpcomingStep
    ) -> None:
        """Adds to `drafts` the alternatives that pay in `step`, which verifies `drafted` further draft tokens."""
        options = [
            candidate.proposers.alternative(draft) if candidate.branches and draft.second_choices else None
            for candidate, draft in zip(candidates, drafts, strict=True)
        ]
        for i in self._chooser.choose_alternatives(options, drafted, step):
            if (option := options[i]) is not None:
                drafts[i] = drafts[i].with_alternative(option.place)

    # ── the batched proposer ──

    def _poll_batched(
        self,
        batched: BatchedProposer[Any],
        candidates: Sequence[DraftCandidate],
        prefilling: Sequence[SequenceProposers],
        step: UpcomingStep,
        last_step: LastStep,
    ) -> None:
        # The history of the batched proposer grows by as many rows as the prompts did, so that a sequence whose prompt
        # was computed in the last step can have a draft in the next one.
        min_rows = max(_MIN_PREFILL_ROWS, last_step.prompt_rows)
        possible = [
            draft
            for draft in _batched_drafts(candidates)
            if batched.prefill_tokens(draft.tracked.sequence) < min_rows * draft.candidate.room
        ]
        measured = [draft for draft in possible if not draft.candidate.proposers.fixed]
        paying, resumed = self._plan_batched(batched, measured, candidates, step)
        planned = [draft for draft in possible if draft.candidate.proposers.fixed] + paying + resumed
        requests = [_request(draft) for draft in planned]
        requests += [
            BatchedDraftRequest(tracked.sequence, 0)
            for proposers in prefilling
            if (tracked := proposers.batched) is not None
            and not tracked.failed
            and not proposers.unbatched
            and (proposers.fixed or paying)
        ]
        if not requests:
            return
        self._partly_prefilled = WeakSet(
            draft.tracked for draft in planned if batched.prefill_tokens(draft.tracked.sequence)
        )
        begun = time.perf_counter()
        alone = len(step.sequences) + len(prefilling) == 1
        batched.draft(requests, _PREFILL_SECONDS_ALONE if alone else _PREFILL_SHARE * last_step.seconds, min_rows)
        seconds = (time.perf_counter() - begun) / len(requests)
        for draft in planned:
            draft.tracked.propose(draft.limit, draft.candidate.proposers.bounds, seconds)

    def _plan_batched(
        self,
        batched: BatchedProposer[Any],
        possible: Sequence[_BatchedDraft],
        candidates: Sequence[DraftCandidate],
        step: UpcomingStep,
    ) -> tuple[list[_BatchedDraft], list[_BatchedDraft]]:
        """Returns two lists of drafts: those of `possible` that pay, at the lengths that pay, and resumed ones.

        A resumed draft completes the prefill of a history that is partly prefilled, as the part alone is of no use. The
        draft itself is not expected to pay, so it is as short as a trial.
        """
        if not possible or batched.fault or not self._chooser.cost.curve:
            return [], []
        others, rate = self._without_batched(candidates, step)
        # A batched draft replaces that of another proposer if as many tokens are expected to be accepted.
        better = [draft for draft in possible if draft.i not in others or sum(draft.curve) >= others[draft.i].gain]
        paying: list[_BatchedDraft] = []
        if better:
            for draft in better:
                others.pop(draft.i, None)
            lengths = {candidates[i].seq: other.length for i, other in others.items()}
            step_with_others = step.with_drafts(lengths, sum(other.gain for other in others.values()))
            paying = self._paying_lengths(batched, better, step_with_others, rate)
        planned = {draft.i for draft in paying}
        resumed = [
            draft._replace(limit=min(TRIAL_TOKENS, draft.limit))
            for draft in possible
            if draft.i not in planned and draft.tracked in self._partly_prefilled
        ]
        return paying, resumed

    def _without_batched(
        self, candidates: Sequence[DraftCandidate], step: UpcomingStep
    ) -> tuple[dict[int, _ExpectedDraft], float]:
        """Returns, by index of the candidate, the drafts that would be verified without the batched proposer, and the
        tokens per second with these drafts."""
        measured = _measured_drafts(candidates)
        choice = self._chooser.choose(_curves(measured), [candidates[i].seq for i in measured], step)
        chosen = zip(measured.items(), choice.picked, choice.lengths, strict=True)
        others = {
            i: _ExpectedDraft(length, sum(tracked[picked].curve[:length])) for (i, tracked), picked, length in chosen
        }
        return others, choice.rate or self._chooser.rate(step)

    def _paying_lengths(
        self, batched: BatchedProposer[Any], drafts: Sequence[_BatchedDraft], step: UpcomingStep, rate: float
    ) -> list[_BatchedDraft]:
        """Returns `drafts` at the lengths that pay; empty if no length pays. `rate` is the tokens per second without
        these drafts."""
        prefills = [batched.prefill_seconds(batched.prefill_tokens(draft.tracked.sequence)) for draft in drafts]
        # The cost of prefill is divided among all tokens that drafts of the sequence can still have, as most of its
        # tokens come in drafts.
        position_seconds = batched.position_seconds(len(drafts))
        position_seconds += sum(
            spent / max(1, draft.candidate.room) for spent, draft in zip(prefills, drafts, strict=True)
        )
        min_lengths = [draft.candidate.proposers.min_tokens(draft.tracked) for draft in drafts]
        length_range = max(1, *min_lengths), max(draft.limit for draft in drafts)
        curves, seqs = [draft.curve for draft in drafts], [draft.candidate.seq for draft in drafts]
        length, rate = self._chooser.equal_lengths(
            curves, seqs, length_range, step, position_seconds, rate, sum(prefills)
        )
        floor = rate * position_seconds / len(drafts)  # tokens that the step yields in the time of one draft token
        return [
            draft._replace(limit=min(length, draft.limit), floor=0.0 if min_length else floor)
            for draft, min_length in zip(drafts, min_lengths, strict=True)
            if min(length, draft.limit) >= max(1, min_length)
        ]


def poll(proposers: SequenceProposers, limit: int, budget_seconds: float = inf) -> None:
    """Polls the proposers of one sequence, except a batched one, for drafts of at most `limit` tokens each.

    With a fixed order, polling ends at the first draft. Otherwise, if polling all proposers without useful drafts would
    take more than `budget_seconds`, each of them is polled only in some of the steps.
    """
    number = proposers.begin_poll()
    not_useful = [each for each in proposers.unbatched if each.expected_accepted < _USEFUL_TOKENS]
    interval = 1 if proposers.fixed or not not_useful else _poll_interval(not_useful, budget_seconds)
    for i, tracked in enumerate(proposers.unbatched):
        if tracked.expected_accepted < _USEFUL_TOKENS and (number + i) % interval:
            if tracked.draft.tokens:
                tracked.clear_draft()
            continue
        tracked.propose(limit, proposers.bounds)
        if proposers.fixed and tracked.draft.tokens:
            return


def _poll_interval(not_useful: Sequence[TrackedProposer], budget_seconds: float) -> int:
    # `budget_seconds` is 0 before the first step.
    cost = sum([tracked.stats.cost_seconds for tracked in not_useful])
    return 1 if cost <= budget_seconds or not budget_seconds else min(_MAX_POLL_INTERVAL, ceil(cost / budget_seconds))


def _batched_drafts(candidates: Sequence[DraftCandidate]) -> list[_BatchedDraft]:
    """Returns a draft of maximum length for each candidate for which the batched proposer may draft."""
    return [
        _BatchedDraft(i, candidate, tracked, limit, tracked.stats.acceptance.curve(limit))
        for i, candidate in enumerate(candidates)
        if (tracked := candidate.proposers.batched) is not None
        and (limit := candidate.proposers.batched_limit(candidate.limit))
    ]


def _request(draft: _BatchedDraft) -> BatchedDraftRequest[Any]:
    return BatchedDraftRequest(draft.tracked.sequence, draft.limit, draft.floor, draft.candidate.seq)


def _measured_drafts(candidates: Sequence[DraftCandidate]) -> dict[int, list[TrackedProposer]]:
    """Returns, by index of the candidate, the proposers with drafts of each candidate without a fixed order."""
    return {
        i: with_draft
        for i, candidate in enumerate(candidates)
        if not candidate.proposers.fixed and (with_draft := candidate.proposers.with_draft)
    }


def _curves(measured: Mapping[int, Sequence[TrackedProposer]]) -> list[list[list[float]]]:
    return [[tracked.curve for tracked in proposers] for proposers in measured.values()]
