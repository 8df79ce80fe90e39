"""One request on the engine thread, from its submission to its end."""

from __future__ import annotations

import math
import time
from array import array
from collections import abc
from typing import TYPE_CHECKING

from engine.adapters import AdapterSet, uncached_namespace
from engine.contract import Finished, FinishReason, PrefillProgress, Request, Timings, Usage
from engine.fairness import Claim
from engine.grammar import MaskRequest
from engine.kv import Allocation, Match
from engine.media import MediaRun, without_runs
from engine.sampling import ReasoningLimiter, Sampler
from engine.scheduler import ScheduledRows
from engine.speculate import SequenceProposers
from engine.text import with_control_texts

if TYPE_CHECKING:
    from engine.backend import Vocab


class Sequence:
    """A request's tokens, sampler and proposers and, while it runs, its allocation and draft.

    `tokens` are the known tokens: those of the prompt and the emitted ones. The first `computed` known tokens are in
    cells. A sequence without an allocation waits. Preemption takes only the allocation, so the sequence continues later
    with the same tokens.
    """

    def __init__(
        self, key: int, request: Request, seed: int, vocab: Vocab, limit: int, keep: int | None = None
    ) -> None:
        """`limit` is the maximum number of tokens that the sequence has at once.

        `keep` enables context shifts at that length. A shift keeps the first `keep` tokens of the prompt (-1: the whole
        prompt), but at most half of `limit`, and discards the earlier half of the other tokens. None disables context
        shifts: the sequence ends at `limit`.
        """
        self.key = key
        self.request = request
        self.seed = seed
        self.tokens = array("i", request.prompt)
        self.history = array("i", without_runs(request.prompt, request.media)) if request.media else self.tokens
        """The known tokens of text, without images and sounds, for sampler and proposers."""
        self.text_length = len(self.history)
        """Number of tokens of the prompt in `history`."""
        self.prompt_length = len(request.prompt)
        self.sampler = Sampler(request, seed, vocab.ends, vocab.piece)
        self.matcher = request.grammar.begin() if request.grammar is not None else None
        """State of the grammar after the emitted tokens. None without a grammar."""
        token_bytes = with_control_texts(request.control_texts, vocab.piece)
        self.budget = ReasoningLimiter(request.reasoning, token_bytes) if request.reasoning else None
        """State of the reasoning budget after the emitted tokens. None without a budget."""
        in_detail = request.logprobs is not None or request.origins
        self.is_plain = self.matcher is None and self.budget is None and not in_detail
        """True if picked tokens are emitted as they are: without grammar, budget, log probabilities and origins."""
        self.row_params = self.sampler.row_params if self.is_plain else None
        """The parameters with which `pick_rows` picks. None if the sampler must pick."""
        self.proposers = SequenceProposers({})
        """Set by `Lifecycle.submit`."""
        self.slot = -1
        """Number of the slot in which the sequence runs or ran last; -1 before the first start."""
        self.allocation: Allocation | None = None
        self.seq = -1
        """The sequence id in the KV cache while the sequence runs, else -1."""
        self.computed = 0
        self.match: Match | None = None
        """The last match of the tokens in the KV cache. None while the sequence runs, or before the first match."""
        self.draft: abc.Sequence[int] = ()
        self.alternative_place = -1  # if not negative, the last token of `draft` is an alternative at this place
        self.awaits_encoding = False
        """True while the embeddings of the next tokens, those of an image or sound, are not computed."""
        self.prefill_due = self.submitted = time.perf_counter()
        """Time of the submission, or the last time at which the sequence waited for embeddings."""
        self.prefilled = 0  # tokens computed for this sequence
        self.cached: int | None = None
        """Prompt tokens that were loaded or shared. None until the whole prompt is in cells."""
        self.moved = 0
        """Loaded prompt tokens whose KV was computed at other positions."""
        self.stop_token: int | None = None
        self._ends = frozenset(request.stop_tokens) | vocab.ends
        self.discarded = 0
        """Tokens discarded by context shifts."""
        self._limit = limit
        self._keep, self._max_tokens = _keep_and_max_tokens(request, limit, keep)
        self.due = math.inf if request.timeout is None else self.submitted + request.timeout
        """Time at which the request ends if it is not complete. Infinite without a deadline."""
        self.admitted: float | None = None
        self.first_token: float | None = None
        self.last_token = 0.0

    # ── state ──

    @property
    def salt(self) -> str:
        """The namespace of the sequence in the KV cache. A request that is not cached has a namespace of its own."""
        return self.request.namespace if self.request.cache else uncached_namespace(self.key)

    @property
    def claim(self) -> Claim:
        """The sequence's claim to a slot."""
        return Claim(self.key, self.request.owner, self.request.weight, self.request.priority, self.due)

    @property
    def adapters(self) -> AdapterSet:
        """The LoRA adapters that are applied to every row of the sequence."""
        return self.request.adapters or ()

    @property
    def emitted(self) -> int:
        """Number of emitted tokens, including an end token."""
        return len(self.tokens) + self.discarded - self.prompt_length

    @property
    def num_uncomputed(self) -> int:
        """Number of known tokens that are not in cells: one while decoding, more during prefill."""
        return len(self.tokens) - self.computed

    @property
    def next_run(self) -> MediaRun | None:
        """The first run of an image or sound that is not wholly in cells. None if there is none."""
        return next((run for run in self.request.media if run.end > self.computed), None)

    @property
    def num_ready(self) -> int:
        """Number of uncomputed tokens before those of the next image or sound."""
        run = self.next_run
        return self.num_uncomputed if run is None else max(0, run.start - self.computed)

    @property
    def forced(self) -> int | None:
        """The next token of the closing text once the reasoning budget is used up. None if the token is sampled."""
        return None if self.budget is None else self.budget.forced

    @property
    def needs_shift(self) -> bool:
        """True if a context shift is due before the next token."""
        return self._keep is not None and len(self.tokens) >= self._limit

    def draft_room(self) -> int:
        """Returns the maximum useful draft length in tokens.

        It is one less than the tokens that may still be emitted and still fit, because verification adds one token.
        """
        return min(self._max_tokens - self.emitted, self._limit - len(self.tokens)) - 1

    # ── running ──

    def start(self, allocation: Allocation) -> None:
        """Sets the allocation with which the sequence runs, at its first start or after a preemption."""
        self.change_allocation(allocation)
        self.match = None
        if self.admitted is None:
            self.admitted = time.perf_counter()

    def change_allocation(self, allocation: Allocation) -> None:
        """Sets the allocation of a running sequence."""
        self.allocation, self.seq, self.computed = allocation, allocation.seq, allocation.cached

    def stop(self) -> None:
        """Drops allocation and draft."""
        self.seq = -1
        self.draft, self.allocation, self.computed, self.awaits_encoding = (), None, 0, False

    def has_alternative(self, drafts: int) -> bool:
        """Returns True if the last of the first `drafts` tokens of the draft is an alternative."""
        return 0 <= self.alternative_place < drafts - 1 and drafts == len(self.draft)

    def mask_request(self, rows: ScheduledRows) -> MaskRequest | None:
        """Returns the request for the masks of `rows`. None without a grammar, or if `rows` do not complete the
        prefill."""
        if self.matcher is None or rows.tokens < self.num_uncomputed:
            return None
        return MaskRequest(self.key, self.matcher, self.draft[: rows.drafts])

    def commit(self, count: int) -> abc.Sequence[int]:
        """Counts the next `count` known tokens as computed. Returns them."""
        tokens = self.tokens[self.computed : self.computed + count]
        self.computed += count
        self.prefilled += count
        return tokens

    def load(self, count: int, moved: int) -> None:
        """Counts the next `count` known tokens, which were loaded, as in cells; `moved` come from other positions."""
        self.computed += count
        self.moved += moved if self.cached is None else 0

    def append(self, token: int) -> FinishReason | None:
        """Appends an emitted token.

        Returns the finish reason if the sequence ends with this token, else None. Raises GrammarError if the grammar
        cannot be followed further.
        """
        reason = self.extend([token])
        if self.budget is not None:
            self.budget.take(token)
        if self.matcher is not None and reason is not FinishReason.STOP:
            self.matcher.accept_token(token)
            if self.matcher.complete:
                return FinishReason.STOP
        return reason

    def extend(self, tokens: list[int]) -> FinishReason | None:
        """Appends emitted tokens up to the end of the output, and removes those after the end from `tokens`. Returns
        the finish reason if the sequence ends with the last token, else None. Does not advance grammar and budget."""
        room, reason = self._max_tokens - self.emitted, None
        if len(tokens) >= room:
            del tokens[max(1, room) :]
            reason = FinishReason.LENGTH
        if not self._ends.isdisjoint(tokens):
            del tokens[1 + min(tokens.index(end) for end in self._ends.intersection(tokens)) :]
            self.stop_token, reason = tokens[-1], FinishReason.STOP
        self.tokens.extend(tokens)
        if self.history is not self.tokens:
            self.history.extend(tokens)
        return reason

    def mark_emission(self, now: float) -> float | None:
        """Records the time of an emission. Returns the seconds since the previous emission, or None for the first
        one."""
        first, gap = self.first_token is None, now - self.last_token
        if first:
            self.first_token = now
        self.last_token = now
        return None if first else gap

    def shift(self) -> tuple[int, int]:
        """Context shift: discards the earlier half of the tokens after the kept ones.

        Returns the numbers of kept and of discarded tokens. Requires that the sequence has no allocation, because cells
        and tokens change together.
        """
        assert self._keep is not None, "context shift is on"
        assert self.allocation is None, "cells and tokens change together"
        keep = min(self._keep, self._limit // 2)  # with more kept tokens the next shift would be due soon
        discard = (len(self.tokens) - keep + 1) // 2
        del self.tokens[keep : keep + discard]
        self.discarded += discard
        return keep, discard

    # ── reports ──

    @property
    def cached_so_far(self) -> int:
        """Prompt tokens that were loaded or shared so far."""
        return self.cached if self.cached is not None else max(0, self.computed - self.prefilled)

    @property
    def num_uncached(self) -> int:
        """Prompt tokens that the prefill computes, those that can still be loaded or shared included."""
        return self.prompt_length - self.cached_so_far

    def end_prefill(self) -> int:
        """Records that the prompt is in cells. The first call returns the number of prompt tokens that were loaded or
        shared. Later calls return 0."""
        if self.cached is not None:
            return 0
        self.cached = max(0, self.prompt_length - self.prefilled)
        self.moved = min(self.moved, self.cached)
        return self.cached

    @property
    def ends_after_prefill(self) -> bool:
        """True if `max_tokens` is 0."""
        return self._max_tokens == 0


def prefill_progress(sequence: Sequence) -> PrefillProgress | None:
    """Returns the progress of the prefill. None if `Request.progress` is False, or after the first emitted token."""
    if not sequence.request.progress or sequence.first_token is not None:
        return None
    known, seconds = min(sequence.computed, sequence.prompt_length), time.perf_counter() - (sequence.admitted or 0.0)
    return PrefillProgress(sequence.prompt_length, sequence.cached_so_far, known, seconds)


def finished(sequence: Sequence, reason: FinishReason) -> Finished:
    """Returns the terminal update with the current counts and times."""
    now = time.perf_counter()
    admitted = sequence.admitted or now
    first = sequence.first_token or now
    drafts = sequence.proposers.draft_stats
    drafted, accepted = sum(stats.drafted for stats in drafts), sum(stats.accepted for stats in drafts)
    return Finished(
        reason=reason,
        usage=Usage(sequence.prompt_length, sequence.cached or 0, sequence.emitted, drafted, accepted, sequence.moved),
        timings=Timings(admitted - sequence.submitted, first - admitted, now - first),
        seed=sequence.seed,
        stop=sequence.stop_token,
        drafts=drafts,
        discarded=sequence.discarded,
        slot=sequence.slot,
    )


def _keep_and_max_tokens(request: Request, limit: int, keep: int | None) -> tuple[int | None, int]:
    """Returns the number of prompt tokens that a context shift keeps, None without shifts, and the maximum number of
    emitted tokens."""
    length = len(request.prompt)
    if keep is None or request.media:  # a shift would recompute images at other positions
        room = limit - length
        return None, room if request.max_tokens is None else min(request.max_tokens, room)
    # Without a maximum a context shift could go on for ever.
    return length if keep < 0 else min(keep, length), limit if request.max_tokens is None else request.max_tokens
