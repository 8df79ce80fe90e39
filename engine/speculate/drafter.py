"""The speculators of one request: shows them its tokens, takes the best of their drafts, and keeps count."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from engine.contract import Drafts
from engine.pace import Acceptance
from engine.speculate.base import NO_DRAFT, Bounds, Draft, Speculator
from engine.speculate.draft import Seat, matching
from engine.speculate.tally import Tally

ANY = Bounds()

LEARN = 2048
"""Tokens that all requests' speculators are shown in one step at most, besides those just emitted: some tens of
milliseconds, so that long prompts, or those found in the cells, do not hold up everybody's step."""


class Book(Struct, frozen=True):
    """What is kept about one type: its counts, and how likely its drafts are right."""

    tally: Tally
    acceptance: Acceptance


class Drafter:
    """The speculators of one request, by type in the order in which a fixed order asks them.

    Belongs to the engine thread. `books` has the engine's counts of each type; the request's own start empty.
    """

    def __init__(
        self,
        speculators: Mapping[str, Speculator],
        *,
        books: Mapping[str, Book] | None = None,
        bounds: Bounds = ANY,
        fixed: bool = False,
    ) -> None:
        self._speculators = speculators
        self._bounds = bounds
        self._fixed = fixed
        self._books = {name: _own((books or {}).get(name), name) for name in speculators}
        self._begun = False
        self._known = 0  # tokens of the history that the speculators were shown
        self._proposed: dict[str, Draft] = {}
        self._chosen = ""

    @property
    def seat(self) -> Seat | None:
        """The request's place in the draft model, if that may guess for it."""
        seat = self._speculators.get("draft")
        return seat if isinstance(seat, Seat) else None

    @property
    def only_model(self) -> bool:
        """Whether the draft model guesses for it, and nobody else does."""
        return self._speculators.keys() == {"draft"}

    @property
    def drafts(self) -> tuple[Drafts, ...]:
        """What became of the drafts so far, by type."""
        return tuple(book.tally.drafts for book in self._books.values())

    @property
    def types(self) -> Iterable[str]:
        """Who may guess."""
        return self._speculators.keys()

    def learn(self, tokens: array[int], most: int) -> int:
        """Shows the speculators at most `most` more of `tokens`, the history, and says how many."""
        part = tokens[self._known : self._known + most] if self._speculators else tokens[:0]
        if not part:
            return 0
        for name, speculator in self._speculators.items():
            begun = time.perf_counter()
            if self._begun:
                speculator.observe(part)
            else:
                speculator.begin(part)
            self._books[name].tally.learnt(time.perf_counter() - begun, first=not self._begun)
        self._begun = True
        self._known += len(part)
        return len(part)

    def knows(self, tokens: array[int]) -> bool:
        """Whether the speculators were shown all of `tokens`, so that they may guess; false if there are none."""
        return bool(self._speculators) and self._known == len(tokens)

    # ── before a step ──

    def propose(self, limit: int) -> None:
        """Asks those who need no model for drafts of at most `limit` tokens."""
        self._proposed, self._chosen = {}, ""
        for name, speculator in self._speculators.items():
            if name != "draft":
                self._ask(name, speculator, limit)
            if self._fixed and self._proposed:
                break

    def ask_model(self, limit: int, seconds: float) -> None:
        """Takes what the draft model made for the seat; `seconds` were this request's share of its time."""
        assert self.seat is not None, "somebody to ask"
        self._ask("draft", self.seat, limit, seconds)

    def model_limit(self, limit: int) -> int:
        """Tokens that the draft model is to guess at most, 0 if another's draft promises more."""
        seat = self.seat
        if seat is None or (self._fixed and self._proposed):
            return 0
        limit = min(limit, seat.bounds.n_max or limit)
        promised = max(map(self._promise, self._proposed), default=0.0)
        return limit if self._books["draft"].acceptance.expected(limit) > promised else 0

    def choose(self) -> Draft:
        """The draft to verify: in a fixed order the first, else the one that promises most accepted tokens."""
        if not self._proposed:
            return NO_DRAFT
        self._chosen = next(iter(self._proposed)) if self._fixed else max(self._proposed, key=self._promise)
        return self._proposed[self._chosen]

    def _ask(self, name: str, speculator: Speculator, limit: int, seconds: float = 0.0) -> None:
        begun = time.perf_counter()
        draft = self._bounds.trim(speculator.propose(limit))
        self._books[name].tally.proposed(seconds + time.perf_counter() - begun)
        assert len(draft.tokens) <= limit, f"{name} keeps to the limit"
        if draft.tokens:
            self._proposed[name] = draft

    def _promise(self, name: str) -> float:
        return self._books[name].acceptance.expected(len(self._proposed[name].tokens))

    # ── after it ──

    def observe(self, tokens: array[int], emitted: Sequence[int], drafted: int, accepted: int) -> None:
        """The last `emitted` of `tokens` are new; of the chosen draft `drafted` were verified, `accepted` right."""
        for name, draft in self._proposed.items():
            # Every proposal can be compared with what came, whether it was verified or not.
            right = matching(draft.tokens, emitted)
            self._books[name].acceptance.observe(min(len(draft.tokens), right + 1, len(emitted)), right)
        if self._begun and self._known == len(tokens) - len(emitted):
            self._known = len(tokens)
            for name, speculator in self._speculators.items():
                begun = time.perf_counter()
                if drafted and name == self._chosen:
                    speculator.observe(emitted, drafted, accepted)
                    self._books[name].tally.verified(drafted, accepted, time.perf_counter() - begun)
                else:
                    speculator.observe(emitted)
        self._proposed, self._chosen = {}, ""

    # ── edits ──

    def truncate(self, length: int) -> None:
        """The history is cut to `length` tokens."""
        self._known = min(self._known, length)
        for speculator in self._speculators.values():
            speculator.truncate(length)

    def shift(self, keep: int, discard: int) -> None:
        """`discard` tokens after the first `keep` left the history, of which they may not have been shown all."""
        self._known -= max(0, min(self._known, keep + discard) - keep)
        for speculator in self._speculators.values():
            speculator.shift(keep, discard)

    def pause(self) -> None:
        """The request gave up its cells for a while: the draft model's too."""
        self._proposed, self._chosen = {}, ""
        if self.seat is not None:
            self.seat.leave()

    def end(self) -> None:
        """The request has ended."""
        if self._begun:
            for speculator in self._speculators.values():
                speculator.end()


def _own(book: Book | None, name: str) -> Book:
    """A request's own book, which adds to that of the engine."""
    return Book(Tally(name, book.tally), Acceptance(book.acceptance)) if book else Book(Tally(name), Acceptance())
