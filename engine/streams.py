"""One request on the engine thread, from its submission to its end."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.contract import Finished, FinishReason, Request, Timings, Usage
from engine.memory import Lease
from engine.sampling import Sampler
from engine.scheduler import StreamView
from engine.speculate import Speculator

if TYPE_CHECKING:
    from engine.backend import Vocab


class Stream:
    """A request's tokens, how they are picked and, while it runs, its lease and its draft.

    `tokens` are known: the prompt and what was emitted. `lease.length` of them are computed. It waits while it
    has no lease; retracting it takes the lease away and nothing else, so it goes on later with the same tokens.
    """

    def __init__(self, key: int, request: Request, seed: int, vocab: Vocab, limit: int, speculator: Speculator) -> None:
        self.key = key
        self.request = request
        self.seed = seed
        self.tokens = array("i", request.prompt)
        self.prompt_length = len(request.prompt)
        self.sampler = Sampler(request, seed, vocab.ends, vocab.piece)
        self.speculator = speculator
        self.lease: Lease | None = None
        self.draft: Sequence[int] = ()
        self.waits_for = -1
        """While it waits: the running stream that is computing the longest prefix of it, and how long that is."""
        self.promised = 0
        self.cached = 0
        self.drafted = 0
        self.accepted = 0
        self.stop_token: int | None = None
        self._ends = frozenset(request.stop_tokens) | vocab.ends
        most = limit - self.prompt_length
        self._most = most if request.max_tokens is None else min(request.max_tokens, most)
        self.submitted = time.perf_counter()
        self.admitted: float | None = None
        self.first_token: float | None = None
        self.last_token = 0.0

    @property
    def emitted(self) -> int:
        """Tokens picked so far, an end token included."""
        return len(self.tokens) - self.prompt_length

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
        return StreamView(self.key, len(self.tokens), self.held.length, len(self.draft), alone)

    def start(self, lease: Lease) -> None:
        """Begins, or goes on after it was retracted."""
        self.lease = lease
        if self.admitted is None:
            self.admitted = time.perf_counter()
            self.cached = lease.shared
        self.speculator.begin(self.tokens)

    def leave(self, *, keep: bool = True) -> None:
        """Gives the lease back, if there is one, and drops the draft."""
        self.draft = ()
        if self.lease is not None:
            self.lease.leave(keep=keep)
            self.lease = None

    def append(self, token: int) -> FinishReason | None:
        """Takes the next token, and says whether the stream ends with it."""
        self.tokens.append(token)
        if token in self._ends:
            self.stop_token = token
            return FinishReason.STOP
        return FinishReason.LENGTH if self.emitted >= self._most else None

    @property
    def done_reading(self) -> FinishReason | None:
        """LENGTH if not a single token was asked for: the stream ends with its prompt."""
        return FinishReason.LENGTH if self._most == 0 else None

    def room(self) -> int:
        """Tokens that a draft may hold: one less than may still be emitted."""
        return self._most - self.emitted - 1

    def finished(self, reason: FinishReason) -> Finished:
        """The terminal update, as of now."""
        now = time.perf_counter()
        admitted = self.admitted or now
        first = self.first_token or now
        return Finished(
            reason=reason,
            usage=Usage(self.prompt_length, self.cached, self.emitted, self.drafted, self.accepted),
            timings=Timings(admitted - self.submitted, first - admitted, now - first),
            seed=self.seed,
            stop=self.stop_token,
        )
