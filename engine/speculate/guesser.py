"""One type's proposer in one request: what it was shown, what it guesses, and how often that comes true."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

from msgspec import Struct, structs

from engine.contract import Drafts
from engine.pace import Acceptance, Verified
from engine.speculate.base import NO_DRAFT, Bounds, Proposer
from engine.speculate.tally import Tally

LAG = 64
"""Tokens that it is shown later at most: all at once, they must not hold up a step."""
WEIGHT = 0.1
"""Share of a new measurement in the mean of what asking takes."""


class Book(Struct):
    """What is kept about one type: its counts, how likely its drafts are right, and seconds to ask it once."""

    tally: Tally
    acceptance: Acceptance
    effort: float = 0.0

    @classmethod
    def new(cls, name: str, whole: Book | None = None) -> Book:
        """An empty one, of the engine, or of a request; then all counts in `whole`, the engine's, too."""
        if whole is None:
            return cls(Tally(name), Acceptance())
        return cls(Tally(name, whole.tally), Acceptance(whole.acceptance))

    @property
    def drafts(self) -> Drafts:
        """The counts, and what is thought of the next draft."""
        return structs.replace(self.tally.drafts, chance=self.acceptance.chance(0))


class Guesser:
    """A proposer and its book. What comes while nobody asks it, it is shown when somebody does, all at once."""

    def __init__(self, name: str, proposer: Proposer, book: Book, whole: Book) -> None:
        """`book` is the request's, `whole` the engine's, which may be the same."""
        self.name = name
        self.proposer = proposer
        self.book = book
        self._whole = whole
        self.draft = NO_DRAFT
        """Its guess for the next step."""
        self.curve: list[float] = []
        """The chance of each of its tokens and all before it, as far as that is worth a look."""
        self.promise = 0.0
        """Tokens that its last guess was likely to have right."""
        self._begun = False
        self._unshown = array("i")
        self._followed = NO_DRAFT  # a guess that is compared with what comes, until it fails
        self._place = 0

    @property
    def effort(self) -> float:
        """Seconds that asking it takes, from all requests; 0 if it was never asked."""
        return self._whole.effort

    def show(self, tokens: Sequence[int]) -> None:
        """The history, or more of it."""
        begun = time.perf_counter()
        if self._begun:
            self.proposer.observe(tokens)
        else:
            self.proposer.begin(tokens)
        self.book.tally.learnt(time.perf_counter() - begun, first=not self._begun)
        self._begun = True

    def ask(self, limit: int, bounds: Bounds, seconds: float = 0.0) -> None:
        """Guesses at most `limit` tokens; `seconds` were spent on that already."""
        started = time.perf_counter()
        self.catch_up()
        begun = time.perf_counter()
        draft = bounds.trim(self.proposer.propose(limit))
        assert len(draft.tokens) <= limit, f"{self.name} keeps to the limit"
        self.draft = draft
        self.curve = self.book.acceptance.curve(len(draft.tokens), draft.chances)
        self.promise = sum(self.curve)
        if not self._followed.tokens:
            self._followed, self._place = draft, 0
        ended = time.perf_counter()
        self.book.tally.proposed(seconds + ended - begun)
        self._whole.effort += WEIGHT * (seconds + ended - started - self._whole.effort)

    def silent(self) -> None:
        """Is not asked for the next step."""
        self.draft, self.curve = NO_DRAFT, []

    def hear(self, emitted: Sequence[int], verified: Verified | None = None) -> None:
        """`emitted` follow the history; with `verified` they come from the verification of its guess's beginning."""
        if verified is not None:
            self._followed, self._place = self.draft, 0
        self._compare(emitted)
        if verified is not None:
            begun = time.perf_counter()
            self.proposer.observe(emitted, verified.drafted, verified.accepted)
            self.book.tally.verified(verified, sum(self.curve[: verified.drafted]), time.perf_counter() - begun)
        elif self.name == "draft":  # it has rows to give up
            self.proposer.observe(emitted)
        else:
            self._unshown.extend(emitted)
            if len(self._unshown) >= LAG:
                self.catch_up()
        self.silent()

    def forget_guess(self) -> None:
        """The guess it is judged by is no longer compared: a newer one is to be."""
        self._followed = NO_DRAFT

    def _compare(self, emitted: Sequence[int]) -> None:
        tokens, said = self._followed.tokens, self._followed.chances
        for token in emitted:
            if self._place >= len(tokens):
                break
            right = tokens[self._place] == token
            self.book.acceptance.observe(self._place, said[self._place] if said else None, right)
            self._place = self._place + 1 if right else len(tokens)
        if self._place >= len(tokens):
            self._followed = NO_DRAFT

    def catch_up(self) -> None:
        """It has been shown everything afterwards."""
        if self._unshown:
            self.show(self._unshown)
            del self._unshown[:]

    def truncate(self, length: int) -> None:
        """The history is cut."""
        self.catch_up()
        self._followed = NO_DRAFT
        self.proposer.truncate(length)

    def shift(self, keep: int, discard: int) -> None:
        """A part of the history is gone."""
        self.catch_up()
        self._followed = NO_DRAFT
        self.proposer.shift(keep, discard)

    def end(self) -> None:
        """The request has ended: others may learn from all of it."""
        if self._begun:
            self.catch_up()
            self.proposer.end()
