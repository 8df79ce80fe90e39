"""The proposers of one request: shows them its tokens, asks them for drafts, and keeps count."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, inf

from engine.contract import Drafts
from engine.pace import Verified
from engine.speculate.base import NO_DRAFT, Bounds, Draft, Proposer
from engine.speculate.draft import DraftSequence
from engine.speculate.guesser import Book, Guesser

ANY = Bounds()

LEARN = 2048
"""Tokens that all requests' proposers are shown in one step at most, besides those just emitted: some tens of
milliseconds, so that long prompts, or those found in the cells, do not hold up everybody's step."""
USEFUL = 1.0
"""Tokens that a guess must be likely to have right for its type to be asked in the next step too, whatever it takes."""
RARELY = 16
"""Steps of which a type is asked in one at least."""


class Drafter:
    """The proposers of one request, by type in the order in which a fixed order asks them.

    Belongs to the engine thread. `books` has the engine's counts of each type; the request's own start empty.
    """

    def __init__(
        self,
        proposers: Mapping[str, Proposer],
        *,
        books: Mapping[str, Book] | None = None,
        bounds: Bounds = ANY,
        fixed: bool = False,
    ) -> None:
        self.fixed = fixed
        """Whether the first type that answers is taken, with all it says."""
        self._bounds = bounds
        self._guessers: dict[str, Guesser] = {}
        for name, proposer in proposers.items():
            whole = (books or {}).get(name)
            own = Book.new(name, whole)
            self._guessers[name] = Guesser(name, proposer, own, whole or own)
        self._model = self._guessers.get("draft")
        self._plain = [guesser for guesser in self._guessers.values() if guesser is not self._model]
        self._known = 0  # tokens of the history that the proposers were shown, or will be when they are asked
        self._round = 0
        self._chosen: Guesser | None = None

    @property
    def draft_sequence(self) -> DraftSequence | None:
        """The request's place in the draft model, if that may guess for it."""
        draft_sequence = self._model.proposer if self._model is not None else None
        return draft_sequence if isinstance(draft_sequence, DraftSequence) else None

    @property
    def only_model(self) -> bool:
        """Whether the draft model guesses for it, and nobody else does."""
        return self._model is not None and not self._plain

    @property
    def drafts(self) -> tuple[Drafts, ...]:
        """What became of the drafts so far, by type."""
        return tuple(guesser.book.drafts for guesser in self._guessers.values())

    @property
    def types(self) -> Iterable[str]:
        """Who may guess."""
        return self._guessers.keys()

    def learn(self, tokens: array[int], most: int) -> int:
        """Shows the proposers at most `most` more of `tokens`, the history, and says how many."""
        part = tokens[self._known : self._known + most] if self._guessers else tokens[:0]
        if not part:
            return 0
        for guesser in self._guessers.values():
            guesser.show(part)
        self._known += len(part)
        return len(part)

    def knows(self, tokens: array[int]) -> bool:
        """Whether the proposers were shown all of `tokens`, so that they may guess; false if there are none."""
        return bool(self._guessers) and self._known == len(tokens)

    # ── before a step ──

    def propose(self, limit: int, budget: float = inf) -> None:
        """Asks those who need no model for drafts of at most `limit` tokens, each or, where all of them would take
        more than `budget` seconds, in turns those that had nothing of use to say."""
        self._chosen = None
        self._round += 1
        every = 1 if self.fixed else self._turns(budget)
        for place, guesser in enumerate(self._plain):
            if guesser.promise < USEFUL and (self._round + place) % every:
                guesser.silent()
                continue
            guesser.ask(limit, self._bounds)
            if self.fixed and guesser.draft.tokens:
                return

    def _turns(self, budget: float) -> int:
        effort = sum(guesser.effort for guesser in self._plain if guesser.promise < USEFUL)
        return 1 if effort <= budget or not budget else min(RARELY, ceil(effort / budget))

    def ask_model(self, limit: int, seconds: float) -> None:
        """Takes what the draft model made for the draft_sequence; `seconds` were this request's share of its time."""
        assert self._model is not None, "somebody to ask"
        self._model.ask(limit, self._bounds, seconds)

    def model_limit(self, limit: int) -> int:
        """Tokens that the draft model may guess, 0 if it may not, or another was first in a fixed order."""
        draft_sequence = self.draft_sequence
        if draft_sequence is None or (self.fixed and any(guesser.draft.tokens for guesser in self._plain)):
            return 0
        return min(limit, draft_sequence.bounds.n_max or limit)

    @property
    def model_least(self) -> int:
        """Tokens that a draft of the draft model must have at least."""
        return self.least(self._model) if self._model is not None else 0

    def model_curve(self, limit: int) -> list[float]:
        """What is to be expected of the draft model before it has guessed."""
        assert self._model is not None, "somebody to ask"
        return self._model.book.acceptance.curve(limit)

    @property
    def offers(self) -> list[Guesser]:
        """Those that have a draft."""
        return [guesser for guesser in self._guessers.values() if guesser.draft.tokens]

    def take(self, guesser: Guesser, length: int) -> Draft:
        """The first `length` tokens of one's draft are to be verified; none if bounds forbid so few."""
        draft = guesser.draft
        if length < max(1, self.least(guesser)):
            return NO_DRAFT
        self._chosen = guesser
        return Draft(draft.tokens[:length], draft.chances[:length])

    def least(self, guesser: Guesser) -> int:
        """Tokens that a draft of one must have at least."""
        own = self.draft_sequence.bounds.n_min if guesser is self._model and self.draft_sequence is not None else 0
        return max(own, self._bounds.n_min)

    def choose(self) -> Draft:
        """Takes a whole draft: in a fixed order the first, else the one that promises most accepted tokens."""
        offers = self.offers
        if not offers:
            return NO_DRAFT
        best = offers[0] if self.fixed else max(offers, key=lambda guesser: guesser.promise)
        return self.take(best, len(best.draft.tokens))

    # ── after it ──

    def observe(self, tokens: array[int], emitted: Sequence[int], made: Verified) -> None:
        """The last `emitted` of `tokens` are new; `made` is what became of the chosen draft."""
        chosen = self._chosen if made.drafted else None
        if self._known == len(tokens) - len(emitted):
            self._known = len(tokens)
            for guesser in self._guessers.values():
                guesser.hear(emitted, made if guesser is chosen else None)
                if chosen is not None:
                    guesser.forget_guess()
        self._chosen = None

    # ── edits ──

    def truncate(self, length: int) -> None:
        """The history is cut to `length` tokens."""
        self._known = min(self._known, length)
        for guesser in self._guessers.values():
            guesser.truncate(length)

    def shift(self, keep: int, discard: int) -> None:
        """`discard` tokens after the first `keep` left the history, of which they may not have been shown all."""
        self._known -= max(0, min(self._known, keep + discard) - keep)
        for guesser in self._guessers.values():
            guesser.shift(keep, discard)

    def pause(self) -> None:
        """The request gave up its cells for a while: the draft model's too."""
        self._chosen = None
        for guesser in self._guessers.values():
            guesser.silent()
        if self.draft_sequence is not None:
            self.draft_sequence.leave()

    def end(self) -> None:
        """The request has ended."""
        for guesser in self._guessers.values():
            guesser.end()
