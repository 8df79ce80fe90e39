"""What the proposers of one type did, and the lines in which llama.cpp's users look for it."""

from __future__ import annotations

from collections.abc import Iterable

from engine.contract import Drafts
from engine.pace import Verified


class Tally:
    """Counts and seconds of one type: of one request, or with every request's added up, of the engine."""

    def __init__(self, type: str, total: Tally | None = None) -> None:
        self.type = type
        self._total = total
        self._calls = [0, 0, 0]
        self._seconds = [0.0, 0.0, 0.0]
        self._drafted = 0
        self._by_accepted: list[int] = []
        self._expected = 0.0
        self._saved = 0.0
        self._spent = 0.0

    def learnt(self, seconds: float, *, first: bool) -> None:
        """A proposer was shown a part of its history, the first one or another."""
        self._count(0, seconds, int(first))

    def proposed(self, seconds: float) -> None:
        """A proposer was asked for a draft, which it took so long to make."""
        self._count(1, seconds)
        tally: Tally | None = self
        while tally is not None:
            tally._spent += seconds
            tally = tally._total

    def verified(self, made: Verified, expected: float, seconds: float) -> None:
        """A draft was verified, of which so many tokens were expected to be right; hearing of it took `seconds`."""
        self._count(2, seconds)
        tally: Tally | None = self
        while tally is not None:
            tally._add(made, expected)
            tally = tally._total

    def _add(self, made: Verified, expected: float) -> None:
        self._drafted += made.drafted
        self._expected += expected
        self._saved += made.saved
        self._spent += made.spent
        self._by_accepted.extend([0] * (made.drafted + 1 - len(self._by_accepted)))
        self._by_accepted[made.accepted] += 1

    def _count(self, call: int, seconds: float, calls: int = 1) -> None:
        tally: Tally | None = self
        while tally is not None:
            tally._calls[call] += calls
            tally._seconds[call] += seconds
            tally = tally._total

    @property
    def drafts(self) -> Drafts:
        """The counts of tokens, and what they were worth."""
        counts = tuple(self._by_accepted)
        return Drafts(self.type, self._drafted, counts, self._expected, self._saved, self._spent)

    def __str__(self) -> str:
        """llama.cpp's line: calls and milliseconds to begin, to generate and to accept."""
        begin, generate, accept = self._calls
        seconds = ", ".join(f"{1e3 * spent:.3f}" for spent in self._seconds)
        drafts = sum(self._by_accepted)
        return (
            f"statistics {self.type.replace('-', '_')}: #calls(b,g,a) = {begin} {generate} {accept}, "
            f"#gen drafts = {drafts}, #acc drafts = {drafts - sum(self._by_accepted[:1])}, "
            f"#gen tokens = {self._drafted}, #acc tokens = {self.drafts.accepted}, dur(b,g,a) = {seconds} ms"
        )


def acceptance_line(all_drafts: Iterable[Drafts]) -> str:
    """llama.cpp's line about one request.

    >>> acceptance_line([Drafts("suffix", 4, (0, 0, 0, 1))])
    'draft acceptance rate = 0.75000 (    3 accepted /     4 generated)'
    """
    listed = list(all_drafts)
    drafted = sum(drafts.drafted for drafts in listed)
    accepted = sum(drafts.accepted for drafts in listed)
    rate = accepted / drafted if drafted else 0.0
    return f"draft acceptance rate = {rate:.5f} ({accepted:5d} accepted / {drafted:5d} generated)"
