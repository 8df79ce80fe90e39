"""The proposers of one sequence: their history, their drafts for the next step, and their statistics."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from engine.contract import DraftStats
from engine.pace import AlternativeOption, VerifiedDraft, best_place
from engine.speculate.proposer import NO_DRAFT, BatchedSequence, Draft, DraftBounds, Proposer
from engine.speculate.proposer_stats import ProposerStats
from engine.speculate.tracked_proposer import TrackedBatchedSequence, TrackedProposer

# Maximum tokens of histories that are fed to proposers in one step, besides those just emitted. They take some tens of
# milliseconds; a whole long prompt, computed or cached, would delay the next step of all sequences.
FEED_TOKENS = 2048

# Maximum number of emitted tokens that are not fed yet, so that feeding them in one batch does not delay a step.
_MAX_UNFED_TOKENS = 64

_UNBOUNDED = DraftBounds()


class SequenceProposers:
    """The proposers of one sequence, in the order of `PROPOSER_TYPES`. Belongs to the engine thread."""

    def __init__(
        self,
        proposers: Mapping[str, Proposer],
        batched: BatchedSequence | None = None,
        *,
        totals: Mapping[str, ProposerStats] | None = None,
        bounds: DraftBounds = _UNBOUNDED,
        fixed: bool = False,
    ) -> None:
        """`proposers`, by type, draft for this sequence alone; `batched` gets its drafts from a batched proposer.
        `totals` are the engine's statistics by type."""

        def stats(type: str) -> ProposerStats:
            return ProposerStats(type, (totals or {}).get(type))

        self.bounds = bounds
        self.fixed = fixed
        """True if the whole draft of the first proposer that has one is verified, without a choice by costs."""
        self._unfed = array("i")  # the last emitted tokens; each proposer was fed some of them
        self.unbatched = [TrackedProposer(each, stats(type), self._unfed) for type, each in proposers.items()]
        self.batched: TrackedBatchedSequence | None = None
        if batched is not None:
            self.batched = TrackedBatchedSequence(batched, stats(batched.type), self._unfed)
        self._polls = 0
        self._all = [*self.unbatched, *([self.batched] if self.batched is not None else [])]
        self.types = tuple(tracked.stats.type for tracked in self._all)
        """Types of the proposers."""
        self._fed = 0  # number of tokens of the history that were fed to the proposers or are in `_unfed`
        self._chosen: TrackedProposer | None = None

    @property
    def chosen_type(self) -> str:
        """Type of the proposer whose draft was chosen for the next step; empty if there is none."""
        return "" if self._chosen is None else self._chosen.stats.type

    @property
    def draft_stats(self) -> tuple[DraftStats, ...]:
        """Statistics of the sequence's drafts so far, by type."""
        return tuple(tracked.stats.draft_stats for tracked in self._all)

    # ── before a step ──

    def feed(self, tokens: array[int], max_tokens: int) -> int:
        """Feeds to the proposers at most `max_tokens` further tokens of `tokens`, the history. Returns their number."""
        if not self._all or max_tokens <= 0 or self._fed >= len(tokens):
            return 0
        part = tokens[self._fed : self._fed + max_tokens]
        for tracked in self._all:
            tracked.feed(part)
        self._fed += len(part)
        return len(part)

    def can_draft(self, tokens: array[int]) -> bool:
        """Returns True if there are proposers, and all of `tokens`, the history, were fed to them or will be before
        the next draft."""
        return bool(self._all) and self._fed == len(tokens)

    def begin_poll(self) -> int:
        """Drops the draft that was chosen for the last step. Returns the number of polls, including this one."""
        self._chosen = None
        self._polls += 1
        return self._polls

    @property
    def with_draft(self) -> list[TrackedProposer]:
        """The proposers with a draft for the next step."""
        return [tracked for tracked in self._all if tracked.draft.tokens]

    def min_tokens(self, tracked: TrackedProposer) -> int:
        """Returns the minimum number of tokens of a draft of `tracked`, by the bounds."""
        own = self.batched.sequence.bounds.n_min if self.batched is not None and tracked is self.batched else 0
        return max(own, self.bounds.n_min)

    def batched_limit(self, limit: int) -> int:
        """Returns the maximum number of tokens, up to `limit`, of the batched proposer's draft for this sequence.

        Returns 0 if there is no batched proposer, if the bounds forbid drafts of that length, or if, with a fixed
        order, another proposer has a draft.
        """
        if self.batched is None or self.batched.failed:
            return 0
        if self.fixed and any(tracked.draft.tokens for tracked in self.unbatched):
            return 0
        limit = min(limit, self.batched.sequence.bounds.n_max or limit)
        return limit if limit >= self.min_tokens(self.batched) else 0

    def choose(self, tracked: TrackedProposer, length: int) -> Draft:
        """Chooses the draft of `tracked` for the next step. Returns its first `length` tokens; `NO_DRAFT`, with no
        draft chosen, if the bounds forbid such a short draft."""
        if length < max(1, self.min_tokens(tracked)):
            return NO_DRAFT
        self._chosen = tracked
        return tracked.draft.cut(length)

    def choose_longest(self) -> Draft:
        """Chooses a draft for the next step and returns the whole of it.

        With a fixed order it is the first draft, otherwise the one with the most tokens expected to be accepted.
        """
        with_draft = self.with_draft
        if not with_draft:
            return NO_DRAFT
        best = with_draft[0] if self.fixed else max(with_draft, key=lambda tracked: tracked.expected_accepted)
        return self.choose(best, len(best.draft.tokens))

    def alternative(self, draft: Draft) -> AlternativeOption | None:
        """Returns the best alternative in `draft`, the chosen one; None if it has none."""
        if self._chosen is None:
            return None
        curve = self._chosen.curve[: len(draft.tokens)]
        return best_place(curve, draft.second_choices, self._chosen.stats.second_chance.chance)

    # ── after a step ──

    def observe(self, tokens: array[int], emitted: Sequence[int], verified: VerifiedDraft | None) -> None:
        """Records that `emitted` are the last tokens of the history `tokens`. `verified` is the result of the chosen
        draft; None if no draft token was verified.

        If earlier tokens of the history are not fed yet, `feed` feeds `emitted` later.
        """
        chosen = self._chosen if verified is not None and verified.drafted else None
        self._chosen = None
        if self._fed != len(tokens) - len(emitted):
            return
        self._fed = len(tokens)
        self._unfed.extend(emitted)
        for tracked in self._all:
            if tracked is chosen and verified is not None:
                tracked.observe_verified(emitted, verified)
            else:
                tracked.observe(emitted)
                if chosen is not None:
                    tracked.stop_comparing()
        if len(self._unfed) >= _MAX_UNFED_TOKENS:
            self._flush()

    def _flush(self) -> None:
        """Feeds all emitted tokens to all proposers."""
        for tracked in self._all:
            tracked.flush()
            tracked.restart_unfed()
        del self._unfed[:]

    # ── edits of the history ──

    def truncate(self, length: int) -> None:
        """Cuts the history to its first `length` tokens."""
        self._fed = min(self._fed, length)
        self._flush()
        for tracked in self._all:
            tracked.truncate(length)

    def shift(self, keep: int, discard: int) -> None:
        """Removes from the history the `discard` tokens after the first `keep`. Some of them may not be fed yet."""
        self._fed -= max(0, min(self._fed, keep + discard) - keep)
        self._flush()
        for tracked in self._all:
            tracked.shift(keep, discard)

    def preempt(self) -> None:
        """Drops all drafts, and frees the batched proposer's resources for the sequence."""
        self._chosen = None
        for tracked in self._all:
            tracked.clear_draft()
        if self.batched is not None:
            self.batched.sequence.release()

    def end(self) -> None:
        """Ends the sequence for all proposers. No method may be called afterwards."""
        for tracked in self._all:
            tracked.end()
