"""Statistics of the proposers of one type, and log lines of these in llama.cpp's format."""

from __future__ import annotations

from collections.abc import Iterable

from engine.contract import DraftStats
from engine.pace import AcceptanceEstimate, SecondChance, VerifiedDraft

# Share of a new measurement in the mean time of a poll.
_COST_WEIGHT = 0.1
# Indices of the counted kinds of calls.
_FEED, _PROPOSE, _OBSERVE = range(3)


class ProposerStats:
    """Counts, seconds and acceptance of the proposers of one type, in one sequence or in the whole engine.

    Each record in a sequence's statistics is also added to `total`, the engine's statistics.
    """

    def __init__(self, type: str, total: ProposerStats | None = None) -> None:
        self.type = type
        self.acceptance: AcceptanceEstimate = AcceptanceEstimate(total.acceptance if total is not None else None)
        self._engine = total or self
        self.second_chance: SecondChance = total.second_chance if total is not None else SecondChance()
        """That of the second choices of all sequences."""
        self._both = (self,) if total is None else (self, total)
        # Of the whole engine only: mean seconds of a poll, calls and seconds by kind.
        self._cost_seconds = 0.0
        self._calls = [0, 0, 0]
        self._seconds = [0.0, 0.0, 0.0]
        self._drafted = 0
        self._by_accepted: list[int] = []
        self._expected = 0.0
        self._saved = 0.0
        self._spent = 0.0
        self._failures = 0

    @property
    def cost_seconds(self) -> float:
        """Mean seconds of a poll in all sequences, including the feeding of buffered tokens; 0 before the first
        poll."""
        return self._engine._cost_seconds

    def record_feed(self, seconds: float, *, first: bool) -> None:
        """Records that a part of a history was fed in `seconds`. `first` is True for the first part of a sequence."""
        self._count(_FEED, seconds, int(first))

    def record_proposal(self, seconds: float, feed_seconds: float) -> None:
        """Records a poll: the seconds of the draft, and the seconds of the tokens that were fed just before."""
        self._count(_PROPOSE, seconds)
        for stats in self._both:
            stats._spent += seconds
        engine = self._engine
        engine._cost_seconds += _COST_WEIGHT * (feed_seconds + seconds - engine._cost_seconds)

    def record_verification(self, verified: VerifiedDraft, expected: float, seconds: float) -> None:
        """Records a verified draft, its `expected` accepted tokens, and the seconds of the proposer's `observe`."""
        self._count(_OBSERVE, seconds)
        drafted, accepted = verified.drafted, verified.accepted
        for stats in self._both:
            stats._drafted += drafted
            stats._expected += expected
            stats._saved += verified.saved
            stats._spent += verified.spent
            if drafted >= len(stats._by_accepted):
                stats._by_accepted.extend([0] * (drafted + 1 - len(stats._by_accepted)))
            stats._by_accepted[accepted] += 1

    def record_failure(self) -> None:
        """Records that a proposer was switched off after an exception."""
        for stats in self._both:
            stats._failures += 1

    def _count(self, kind: int, seconds: float, calls: int = 1) -> None:
        self._engine._calls[kind] += calls
        self._engine._seconds[kind] += seconds

    @property
    def draft_stats(self) -> DraftStats:
        """The counts, and the chance that the first token of the next draft is accepted. Any thread may call."""
        return DraftStats(
            self.type,
            self._drafted,
            tuple(self._by_accepted),
            self._expected,
            self._saved,
            self._spent,
            self.acceptance.chance(0),
            self._failures,
        )

    def __str__(self) -> str:
        """Returns llama.cpp's line: calls and milliseconds to begin, to generate and to accept."""
        begin, generate, accept = self._calls
        seconds = ", ".join(f"{1e3 * spent:.3f}" for spent in self._seconds)
        drafts = sum(self._by_accepted)
        return (
            f"statistics {self.type.replace('-', '_')}: #calls(b,g,a) = {begin} {generate} {accept}, "
            f"#gen drafts = {drafts}, #acc drafts = {drafts - sum(self._by_accepted[:1])}, "
            f"#gen tokens = {self._drafted}, #acc tokens = {self.draft_stats.accepted}, dur(b,g,a) = {seconds} ms"
        )


def acceptance_line(all_stats: Iterable[DraftStats]) -> str:
    """Returns llama.cpp's line about all drafts of one request.

    >>> acceptance_line([DraftStats("suffix", 4, (0, 0, 0, 1))])
    'draft acceptance rate = 0.75000 (    3 accepted /     4 generated)'
    """
    listed = list(all_stats)
    drafted = sum(stats.drafted for stats in listed)
    accepted = sum(stats.accepted for stats in listed)
    rate = accepted / drafted if drafted else 0.0
    return f"draft acceptance rate = {rate:.5f} ({accepted:5d} accepted / {drafted:5d} generated)"
