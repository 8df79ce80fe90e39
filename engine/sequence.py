"""One request on the engine thread, from its submission to its end."""

from __future__ import annotations

import time
from array import array
from collections import abc
from typing import TYPE_CHECKING

from engine.batch import Batch
from engine.contract import Finished, FinishReason, Reading, Request, Timings, Usage
from engine.grammar import Want
from engine.kv import Allocation, Match
from engine.sampling import Budget, Sampler
from engine.scheduler import Rows
from engine.speculate import Drafter
from engine.text import spelling

if TYPE_CHECKING:
    from engine.backend import Vocab


class Sequence:
    """A request's tokens, its sampler and, while it runs, its allocation and its draft.

    `tokens` are known: the prompt and what was emitted. `computed` of them are in cells. A sequence without an
    allocation waits; preemption takes the allocation and nothing else, so the sequence continues later with the same
    tokens.
    """

    def __init__(
        self, key: int, request: Request, seed: int, vocab: Vocab, limit: int, keep: int | None = None
    ) -> None:
        """`limit` is the most tokens that it may have at once. With `keep` a context shift then discards half of the
        tokens after the first `keep` of its prompt (-1 for all of it), at most half of `limit` is kept; without, the
        sequence ends."""
        self.key = key
        self.request = request
        self.seed = seed
        self.tokens = array("i", request.prompt)
        self.prompt_length = len(request.prompt)
        self.sampler = Sampler(request, seed, vocab.ends, vocab.piece)
        self.matcher = request.grammar.begin() if request.grammar is not None else None
        """The position of the emitted tokens in its grammar."""
        self.budget = Budget(request.reasoning, spelling(request.spelled, vocab.piece)) if request.reasoning else None
        """The position of the emitted tokens in its reasoning, if that is bounded."""
        self.drafter = Drafter({})
        """Its proposers; set by the runner."""
        self.allocation: Allocation | None = None
        self.computed = 0
        """Tokens in cells."""
        self.match: Match | None = None
        """While it waits: the last match of its tokens in the KV cache."""
        self.draft: abc.Sequence[int] = ()
        self.prefilled = 0
        """Tokens computed for it, and not loaded or shared, until its prompt was in cells."""
        self.cached: int | None = None
        """Tokens of its prompt that were loaded or shared; None until its prompt is in cells."""
        self.moved = 0
        """Of these, tokens that were computed at other positions."""
        self.stop_token: int | None = None
        self._ends = frozenset(request.stop_tokens) | vocab.ends
        self.discarded = 0
        """Tokens that context shifts have discarded."""
        self._limit = limit
        self._keep = None if keep is None else self.prompt_length if keep < 0 else min(keep, self.prompt_length)
        most = 2**62 if keep is not None else limit - self.prompt_length
        self._most = most if request.max_tokens is None else min(request.max_tokens, most)
        self.submitted = time.perf_counter()
        self.admitted: float | None = None
        self.first_token: float | None = None
        self.last_token = 0.0

    # ── state ──

    @property
    def seq(self) -> int:
        """Its sequence id in the KV cache. Only while it runs."""
        assert self.allocation is not None, "a running sequence has an allocation"
        return self.allocation.seq

    @property
    def emitted(self) -> int:
        """Tokens picked so far, an end token included."""
        return len(self.tokens) + self.discarded - self.prompt_length

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that are not in cells. One while it decodes; more while it is prefilled."""
        return len(self.tokens) - self.computed

    @property
    def forced(self) -> int | None:
        """The next token where the model must not choose it, as the reasoning budget is used up."""
        return None if self.budget is None else self.budget.forced

    @property
    def full(self) -> bool:
        """True if a context shift is due before it can continue."""
        return self._keep is not None and len(self.tokens) >= self._limit

    def room(self) -> int:
        """Tokens that a draft may have: one less than may still be emitted, or still fit."""
        return min(self._most - self.emitted, self._limit - len(self.tokens)) - 1

    # ── running ──

    def start(self, allocation: Allocation) -> None:
        """Begins to run, or continues after a preemption."""
        self.allocation, self.match = allocation, None
        self.computed = allocation.cached
        if self.admitted is None:
            self.admitted = time.perf_counter()

    def stop(self) -> None:
        """Gives up allocation and draft."""
        self.draft, self.allocation, self.computed = (), None, 0

    def fill(self, batch: Batch, rows: Rows) -> int:
        """Writes its `rows` into `batch`. Returns the index of the first of its rows of logits."""
        start, end = self.computed, self.computed + rows.tokens
        tokens = self.tokens[start:end]
        if rows.drafts:
            tokens.extend(self.draft[: rows.drafts])
        last = end == len(self.tokens)
        return batch.add(self.seq, start, tokens, rows.drafts + 1 if last else 0)

    def want(self, rows: Rows) -> Want | None:
        """The masks that its `rows` of the next step need; None without a grammar, or if no token is picked yet."""
        if self.matcher is None or rows.tokens < self.num_uncomputed:
            return None
        return Want(self.key, self.matcher, self.draft[: rows.drafts])

    def commit(self, count: int) -> abc.Sequence[int]:
        """The next `count` known tokens are computed. Returns them."""
        tokens = self.tokens[self.computed : self.computed + count]
        self.computed += count
        self.prefilled += count
        return tokens

    def load(self, count: int, moved: int) -> None:
        """The next `count` known tokens are in cells without having been computed for it, `moved` of them computed at
        other positions."""
        self.computed += count
        self.moved += moved if self.cached is None else 0

    def append(self, token: int) -> FinishReason | None:
        """Takes the next token. Returns the reason if the sequence ends with it. Raises GrammarError if its grammar
        turns out to be too complex."""
        self.tokens.append(token)
        if self.budget is not None:
            self.budget.take(token)
        if token in self._ends:
            self.stop_token = token
            return FinishReason.STOP
        if self.matcher is not None:
            self.matcher.take(token)
            if self.matcher.complete:
                return FinishReason.STOP
        return FinishReason.LENGTH if self.emitted >= self._most else None

    def tick(self, now: float) -> float | None:
        """Its next tokens were picked. Returns the seconds since the last ones; None for the first."""
        first, gap = self.first_token is None, now - self.last_token
        if first:
            self.first_token = now
        self.last_token = now
        return None if first else gap

    def shift(self) -> tuple[int, int]:
        """Context shift: discards the earlier half of the tokens after those it keeps. Returns the number of tokens
        kept before them and their own number. Only without an allocation, as cells and tokens change together."""
        assert self._keep is not None, "context shift is on"
        assert self.allocation is None, "cells and tokens change together"
        keep = min(self._keep, self._limit // 2)  # so that the next shift is not due soon
        discard = (len(self.tokens) - keep + 1) // 2
        del self.tokens[keep : keep + discard]
        self.discarded += discard
        return keep, discard

    # ── what is reported ──

    @property
    def found(self) -> int:
        """Tokens of its prompt that were loaded or shared so far."""
        return self.cached if self.cached is not None else max(0, self.computed - self.prefilled)

    def prompt_done(self) -> int:
        """Its prompt is in cells. Returns how many of its tokens were loaded or shared, the first time; then 0."""
        if self.cached is not None:
            return 0
        self.cached = max(0, self.prompt_length - self.prefilled)
        self.moved = min(self.moved, self.cached)
        return self.cached

    @property
    def reading(self) -> Reading | None:
        """The progress of its prefill; None if the client did not ask for it, or the prefill is over."""
        if not self.request.progress or self.first_token is not None:
            return None
        known, seconds = min(self.computed, self.prompt_length), time.perf_counter() - (self.admitted or 0.0)
        return Reading(self.prompt_length, self.found, known, seconds)

    @property
    def done_reading(self) -> FinishReason | None:
        """LENGTH if not a single token was asked for: the sequence ends with its prompt."""
        return FinishReason.LENGTH if self._most == 0 else None

    def finished(self, reason: FinishReason) -> Finished:
        """The terminal update, as of now."""
        now = time.perf_counter()
        admitted = self.admitted or now
        first = self.first_token or now
        drafts = self.drafter.drafts
        drafted, accepted = sum(made.drafted for made in drafts), sum(made.accepted for made in drafts)
        return Finished(
            reason=reason,
            usage=Usage(self.prompt_length, self.cached or 0, self.emitted, drafted, accepted, self.moved),
            timings=Timings(admitted - self.submitted, first - admitted, now - first),
            seed=self.seed,
            stop=self.stop_token,
            drafts=drafts,
            forgotten=self.discarded,
        )
