"""One request on the engine thread, from its submission to its end."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.batch import Batch
from engine.contract import Finished, FinishReason, Reading, Request, Timings, Usage
from engine.grammar import Want
from engine.memory import Lease
from engine.sampling import Budget, Sampler
from engine.scheduler import Rows, StreamView
from engine.speculate import Drafter
from engine.text import spelling

if TYPE_CHECKING:
    from engine.backend import Vocab


class Stream:
    """A request's tokens, how they are picked and, while it runs, its lease and its draft.

    `tokens` are known: the prompt and what was emitted. `lease.length` of them are computed. It waits while it
    has no lease; retracting it takes the lease away and nothing else, so it goes on later with the same tokens.
    """

    def __init__(
        self, key: int, request: Request, seed: int, vocab: Vocab, limit: int, keep: int | None = None
    ) -> None:
        """`limit` tokens are the most that it may have at once; with `keep` it then forgets half of those after the
        first `keep` of its prompt, -1 for all, and goes on. At most half of `limit` is kept."""
        self.key = key
        self.request = request
        self.seed = seed
        self.tokens = array("i", request.prompt)
        self.prompt_length = len(request.prompt)
        self.sampler = Sampler(request, seed, vocab.ends, vocab.piece)
        self.matcher = request.grammar.begin() if request.grammar is not None else None
        """Where the emitted tokens are in its grammar."""
        self.budget = Budget(request.reasoning, spelling(request.spelled, vocab.piece)) if request.reasoning else None
        """Where they are in its reasoning, if that is bounded."""
        self.drafter = Drafter({})
        """Who guesses for it; the runner says."""
        self.lease: Lease | None = None
        self.draft: Sequence[int] = ()
        self.waits_for = -1
        """While it waits: the running stream that is computing the longest prefix of it, and how long that is."""
        self.promised = 0
        self.computed = 0
        """Tokens computed for it until its prompt was read."""
        self.cached: int | None = None
        """Tokens of its prompt that were not; None until then."""
        self.moved = 0
        self.stop_token: int | None = None
        self._ends = frozenset(request.stop_tokens) | vocab.ends
        self.forgotten = 0
        """Tokens that left `tokens` since the start."""
        self._limit = limit
        self._keep = None if keep is None else self.prompt_length if keep < 0 else min(keep, self.prompt_length)
        most = 2**62 if keep is not None else limit - self.prompt_length
        self._most = most if request.max_tokens is None else min(request.max_tokens, most)
        self.submitted = time.perf_counter()
        self.admitted: float | None = None
        self.first_token: float | None = None
        self.last_token = 0.0

    def tick(self, now: float) -> float | None:
        """Its next tokens were picked: seconds since the last ones; None for the first."""
        first, gap = self.first_token is None, now - self.last_token
        if first:
            self.first_token = now
        self.last_token = now
        return None if first else gap

    @property
    def emitted(self) -> int:
        """Tokens picked so far, an end token included."""
        return len(self.tokens) + self.forgotten - self.prompt_length

    @property
    def forced(self) -> int | None:
        """The next token where that is not the model's to pick, as its reasoning has become too long."""
        return None if self.budget is None else self.budget.forced

    @property
    def behind(self) -> int:
        """Known tokens that are not computed."""
        return len(self.tokens) - (self.lease.length if self.lease else 0)

    @property
    def held(self) -> Lease:
        """The lease of a stream that runs."""
        assert self.lease is not None, "a running stream has a lease"
        return self.lease

    def view(self, alone: int) -> StreamView:
        """What the scheduler may know of a running stream; `alone` is the number of cells nobody else holds."""
        known, lease = len(self.tokens), self.held
        coming = known - lease.length - lease.ready(known)
        return StreamView(self.key, known, lease.length, len(self.draft), alone, coming)

    def fill(self, batch: Batch, rows: Rows) -> int:
        """Writes its `rows` into `batch`; the index of the first of its rows of logits."""
        lease = self.held
        start, end = lease.length, lease.length + rows.tokens
        tokens = self.tokens[start:end]
        if rows.drafts:
            tokens.extend(self.draft[: rows.drafts])
        last = end == len(self.tokens)
        return batch.add(lease.seq, start, tokens, rows.drafts + 1 if last else 0)

    def want(self, rows: Rows) -> Want | None:
        """The masks that its `rows` of the next step need; None if it has no grammar, or no token is picked yet."""
        if self.matcher is None or rows.tokens < self.behind:
            return None
        return Want(self.key, self.matcher, self.draft[: rows.drafts])

    def start(self, lease: Lease) -> None:
        """Begins, or goes on after it was retracted."""
        self.lease = lease
        if self.admitted is None:
            self.admitted = time.perf_counter()

    def commit(self, count: int) -> None:
        """The next `count` known tokens are computed."""
        lease = self.held
        lease.commit(self.tokens[lease.length : lease.length + count])
        self.computed += count

    @property
    def loading(self) -> bool:
        """Whether the next thing for it is a piece to be loaded."""
        return bool(self.held.coming) and not self.held.ready(len(self.tokens))

    def leave(self, *, keep: bool = True) -> None:
        """Gives the lease back, if there is one, and drops the draft."""
        self.draft = ()
        if self.lease is not None:
            self.lease.leave(keep=keep)
            self.lease = None

    def append(self, token: int) -> FinishReason | None:
        """Takes the next token, and says whether the stream ends with it. Raises GrammarError if its grammar turns out
        to be too complex."""
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

    @property
    def found(self) -> int:
        """Tokens of its prompt that were not computed for it so far."""
        if self.cached is not None:
            return self.cached
        return self.lease.reused if self.lease is not None else 0

    def has_read(self) -> int:
        """Called when its prompt is in cells: how many tokens of that need not be computed, the first time; else 0."""
        if self.cached is not None:
            return 0
        self.cached = max(0, self.prompt_length - self.computed)
        self.moved = min(self.held.moved, self.cached)
        return self.cached

    @property
    def reading(self) -> Reading | None:
        """How far its prompt is read; None if nobody asks, or it has gone on from there."""
        if not self.request.progress or self.first_token is not None:
            return None
        known, seconds = min(self.held.length, self.prompt_length), time.perf_counter() - (self.admitted or 0.0)
        return Reading(self.prompt_length, self.found, known, seconds)

    @property
    def done_reading(self) -> FinishReason | None:
        """LENGTH if not a single token was asked for: the stream ends with its prompt."""
        return FinishReason.LENGTH if self._most == 0 else None

    def room(self) -> int:
        """Tokens that a draft may hold: one less than may still be emitted, or still fit."""
        return min(self._most - self.emitted, self._limit - len(self.tokens)) - 1

    @property
    def full(self) -> bool:
        """Whether it must forget something before it can go on."""
        return self._keep is not None and len(self.tokens) >= self._limit

    def forget(self) -> tuple[int, int]:
        """Drops half of the tokens after those it keeps, the earlier half: how many are before them, and how many they
        are. Only for a stream without a lease: what was computed after them holds no more."""
        assert self._keep is not None, "it may forget"
        assert self.lease is None, "cells and tokens go together"
        keep = min(self._keep, self._limit // 2)  # so that it is not to be done again soon
        discard = (len(self.tokens) - keep + 1) // 2
        del self.tokens[keep : keep + discard]
        self.forgotten += discard
        return keep, discard

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
            forgotten=self.forgotten,
        )
