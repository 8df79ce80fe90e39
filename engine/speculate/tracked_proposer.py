"""One sequence's proposer of one type, with its draft for the next step and its acceptance."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Sequence
from typing import TypeVar

from engine.pace import VerifiedDraft
from engine.speculate.proposer import NO_DRAFT, BatchedSequence, Draft, DraftBounds, Proposer, num_matching
from engine.speculate.proposer_stats import ProposerStats

log = logging.getLogger("paceline.speculation")

_Result = TypeVar("_Result")


class TrackedProposer:
    """A proposer with its draft and its statistics.

    Tokens emitted between two calls of `propose` are fed to the proposer in one batch at the next call. A draft is
    compared with the emitted tokens even if it is not verified, so that the acceptance estimate does not go stale.

    A proposer that raises an exception drafts no more for the sequence, which goes on without its drafts.
    """

    def __init__(self, proposer: Proposer, stats: ProposerStats, unfed: array[int]) -> None:
        """`unfed` has the last emitted tokens of the sequence. Its proposers share the array, and each was fed the
        first `_num_fed` of them."""
        self.proposer = proposer
        self.stats = stats
        self.failed = False
        """True after an exception of the proposer."""
        self.draft = NO_DRAFT
        """The draft for the next step."""
        self.curve: list[float] = []
        """For each token of the draft the chance that it and all tokens before it are accepted, down to
        `MIN_CHANCE`."""
        self.expected_accepted = 0.0
        """Expected number of accepted tokens of the last draft."""
        self._begun = False
        self._unfed = unfed
        self._num_fed = 0  # number of tokens of `_unfed` that were fed
        self._compared = NO_DRAFT  # a draft whose first `_position` tokens equal the tokens emitted since
        self._position = 0

    # ── history ──

    def feed(self, tokens: Sequence[int]) -> None:
        """Appends `tokens` to the proposer's history."""
        begun = time.perf_counter()
        self._call(self.proposer.observe if self._begun else self.proposer.begin, tokens)
        self.stats.record_feed(time.perf_counter() - begun, first=not self._begun)
        self._begun = True

    def flush(self) -> None:
        """Feeds the emitted tokens that are not fed yet."""
        if self._num_fed < len(self._unfed):
            self.feed(self._unfed[self._num_fed :])
            self._num_fed = len(self._unfed)

    def restart_unfed(self) -> None:
        """Prepares for the removal of all shared tokens. Requires that all of them were fed."""
        self._num_fed = 0

    def truncate(self, length: int) -> None:
        """Cuts the history to its first `length` tokens. Requires a `flush` before."""
        self.stop_comparing()
        self._call(self.proposer.truncate, length)

    def shift(self, keep: int, discard: int) -> None:
        """Removes from the history the `discard` tokens after the first `keep`. Requires a `flush` before."""
        self.stop_comparing()
        self._call(self.proposer.shift, keep, discard)

    def end(self) -> None:
        """Feeds all tokens, so that shared data has the whole history, and ends the sequence."""
        if self._begun:
            self.flush()
            self._call(self.proposer.end)

    def _call(self, method: Callable[..., _Result], *arguments: object) -> _Result | None:
        """Returns the result of `method`, which calls the proposer. Returns None after an exception, which is the last
        call of the proposer."""
        try:
            return None if self.failed else method(*arguments)
        except Exception:
            self._fail()
            return None

    def _fail(self) -> None:
        """Logs the exception that is being handled, after which the proposer is not called again."""
        log.exception("a proposer of type %s failed and drafts no more for its request", self.stats.type)
        self.stats.record_failure()
        self.failed = True
        self.clear_draft()
        self.stop_comparing()

    # ── drafts ──

    def propose(self, limit: int, bounds: DraftBounds, batch_seconds: float = 0.0) -> None:
        """Sets `draft` to a draft of at most `limit` tokens, within `bounds`. `batch_seconds` is its share of the
        seconds of a batched proposer."""
        begun = started = time.perf_counter()
        if self._num_fed < len(self._unfed):
            self.flush()
            begun = time.perf_counter()
        try:
            draft = NO_DRAFT if self.failed else bounds.trim(self.proposer.propose(limit))
            assert len(draft.tokens) <= limit, f"a draft of type {self.stats.type} exceeds the limit"
        except Exception:
            draft = NO_DRAFT
            self._fail()
        self.draft = draft
        self.curve = self.stats.acceptance.curve(len(draft.tokens), draft.chances)
        self.expected_accepted = sum(self.curve)
        if not self._compared.tokens:
            self._compared, self._position = draft, 0
        self.stats.record_proposal(batch_seconds + time.perf_counter() - begun, begun - started)

    def clear_draft(self) -> None:
        """Drops the draft for the next step."""
        self.draft, self.curve = NO_DRAFT, []

    def observe(self, emitted: Sequence[int]) -> None:
        """Compares the draft with `emitted`, the last of the shared tokens, and drops the draft. `propose` feeds the
        tokens."""
        if self._compared.tokens:
            self._position = self._compare(self._compared, self._position, emitted)
            if self._position == len(self._compared.tokens):
                self.stop_comparing()
        if self.draft.tokens:
            self.clear_draft()

    def observe_verified(self, emitted: Sequence[int], verified: VerifiedDraft) -> None:
        """Feeds `emitted`, the last of the shared tokens, with the result of the verification of this proposer's
        draft, and drops the draft. Requires that all tokens before were fed."""
        self._compare(self.draft, 0, emitted)
        begun = time.perf_counter()
        self._call(self.proposer.observe, emitted, verified.drafted, verified.accepted)
        expected = sum(self.curve[: verified.drafted])
        self.stats.record_verification(verified, expected, time.perf_counter() - begun)
        self._num_fed = len(self._unfed)
        self.draft, self.curve, self._compared = NO_DRAFT, [], NO_DRAFT

    def stop_comparing(self) -> None:
        """Ends the comparison with the current draft, so that the next draft is compared."""
        self._compared = NO_DRAFT

    def _compare(self, draft: Draft, start: int, emitted: Sequence[int]) -> int:
        """Learns from the comparison of `emitted` with the tokens of `draft` after the first `start`. Returns the
        number of tokens for which the comparison is over: all of them after a wrong one."""
        tokens = draft.tokens[start:] if start else draft.tokens
        equal = num_matching(tokens, emitted)
        rejected = equal < len(tokens) and equal < len(emitted)
        self.stats.acceptance.observe(start, equal, rejected, draft.chances)
        choices = draft.second_choices
        if rejected and choices and (choice := choices[start + equal]) >= 0:
            self.stats.second_chance.observe(right=choice == emitted[equal])
        return len(draft.tokens) if rejected else start + equal


class TrackedBatchedSequence(TrackedProposer):
    """A `TrackedProposer` for a sequence of a `BatchedProposer`. Emitted tokens are fed at once, so that the rows of
    rejected tokens are rolled back before the next batch."""

    def __init__(self, sequence: BatchedSequence, stats: ProposerStats, unfed: array[int]) -> None:
        super().__init__(sequence, stats, unfed)
        self.sequence = sequence

    def observe(self, emitted: Sequence[int]) -> None:
        """Compares the draft with `emitted`, drops the draft, and feeds the tokens."""
        super().observe(emitted)
        self._call(self.proposer.observe, emitted)
        self._num_fed = len(self._unfed)
