"""Processes the logits of a step: emits tokens, commits the cells of accepted drafts, and ends sequences."""

from __future__ import annotations

import logging
import time
from array import array
from collections import abc

import numpy as np
from numpy.typing import NDArray

from engine.backend import Logits, NativeFault
from engine.backend_picks import BackendPicks, KnownTokens
from engine.contract import REQUEST_FAILED, EngineFault, FinishReason
from engine.grammar import Masks
from engine.kv import KVCache
from engine.lifecycle import Lifecycle
from engine.outbox import Outbox
from engine.pace import DraftChooser
from engine.running import PlacedRows
from engine.sampling import UNDECIDED, PickParams, RowMaxima, pick_rows
from engine.sequence import Sequence, prefill_progress
from engine.stats import Counters
from engine.verify import DraftPath, followed_path, verify

log = logging.getLogger("paceline.engine")


class OutputProcessor:
    """Turns the rows of logits of each step into tokens of the running sequences. Belongs to the engine thread."""

    def __init__(
        self,
        kv: KVCache,
        lifecycle: Lifecycle,
        outbox: Outbox,
        counters: Counters,
        masks: Masks,
        chooser: DraftChooser,
        backend_picks: BackendPicks,
    ) -> None:
        self._kv = kv
        self._lifecycle = lifecycle
        self._outbox = outbox
        self._counters = counters
        self._masks = masks
        self._chooser = chooser
        self._backend_picks = backend_picks

    def process(self, rows: abc.Sequence[PlacedRows], firsts: abc.Sequence[int], logits: Logits) -> None:
        """Processes `logits`, [rows with logits, vocabulary], of a step. `firsts` has, for each of `rows`, the index
        of its first row of logits.

        An exception other than a native fault ends only the request that caused it. Raises NativeFault.
        """
        now, picks = time.perf_counter(), self._picks(rows, firsts, logits)
        gaps: dict[float, int] = {}
        for each, first in zip(rows, firsts, strict=True):
            sequence = each.sequence
            if sequence.first_token is None and (progress := prefill_progress(sequence)) is not None:
                self._outbox.prefill_progress(sequence.key, progress)
            if len(sequence.tokens) > sequence.computed:
                continue
            try:
                self._emit(sequence, first, logits, picks[first : first + each.part.drafts + 1], now, gaps)
            except NativeFault:
                raise
            except Exception:  # the other sequences go on
                log.exception("request %s failed", sequence.request.id)
                self._lifecycle.fail(sequence, EngineFault(REQUEST_FAILED))
        self._counters.record_gaps(gaps)

    def _picks(self, rows: abc.Sequence[PlacedRows], firsts: abc.Sequence[int], logits: Logits) -> abc.Sequence[int]:
        """Returns the token of each row of logits, `UNPICKED` if only the sequence's sampler can pick it, or
        `UNDECIDED` if the pick needs logits that were not copied. Applies the bias, the penalties and the bans of
        requests to their rows."""
        params: list[PickParams | None] = [None] * len(logits)
        positions, counts = [0] * len(logits), self._backend_picks.counts
        known: dict[int, KnownTokens] = {}
        banned: dict[int, tuple[NDArray[np.intp], list[int]]] = {}  # tokens and the rows in which they are banned
        for each, first in zip(rows, firsts, strict=True):
            sequence = each.sequence
            row_params = sequence.row_params
            if row_params is None or len(sequence.tokens) > sequence.computed:
                continue
            position, end = len(sequence.history) + sequence.discarded, first + each.part.drafts + 1
            if counts and (count := counts.get(sequence.seq)):
                known.update((row, _known_tokens(sequence, row - first, count)) for row in range(first, end))
            elif (bans := sequence.sampler.only_bans) is not None:
                banned.setdefault(id(bans), (bans, []))[1].extend(range(first, end))
            elif sequence.sampler.adjusts and not _adjust(sequence, logits[first:end]):
                continue
            params[first:end] = [row_params] * (end - first)
            positions[first:end] = range(position, position + end - first)
            if sequence.has_alternative(each.part.drafts):
                positions[end - 1] = position + sequence.alternative_place + 1
        for bans, at in banned.values():
            if len(at) == 1:  # takes less time than indices of rows
                logits[at[0]][bans] = -np.inf
            else:
                logits[np.array(at)[:, None], bans] = -np.inf
        if known:
            return self._backend_picks.pick(known, logits, params, positions)
        return pick_rows(RowMaxima(logits), params, positions)

    def _emit(
        self,
        sequence: Sequence,
        first: int,
        logits: Logits,
        picks: abc.Sequence[int],
        now: float,
        gaps: dict[float, int],
    ) -> None:
        """Samples the next tokens of `sequence`, commits the cells of accepted draft tokens, and rolls back the cells
        of rejected ones. `picks` are the tokens of its rows, which begin at row `first` of `logits`. Counts the seconds
        since the previous tokens of `sequence` in `gaps`."""
        if sequence.first_token is None and sequence.ends_after_prefill:
            self._lifecycle.finish(sequence, FinishReason.LENGTH)
            return
        drafts, draft = len(picks) - 1, sequence.draft
        if UNDECIDED in picks:
            self._compute_again(sequence, drafts)
            return
        masks = None if sequence.matcher is None else self._masks.of(sequence.key)
        branches = bool(drafts) and sequence.has_alternative(drafts)
        place = sequence.alternative_place
        path = followed_path(draft, place, picks) if branches else DraftPath(draft[:drafts], picks)
        result = verify(sequence, path.draft, first, logits, path.picks, masks)
        if result.ids:
            self._counters.completion_tokens += len(result.ids)
            if (gap := sequence.mark_emission(now)) is not None:
                gaps[gap] = gaps.get(gap, 0) + 1
            else:
                prefill_seconds = now - (sequence.admitted or now)
                self._counters.record_first_token(now - sequence.submitted, sequence.num_uncached, prefill_seconds)
        if result.streamed:
            self._outbox.tokens(sequence.key, result.streamed, result.logprobs, result.origins)
        if result.error is not None:
            self._lifecycle.fail(sequence, result.error)
            return
        assert result.ids, "each verification without an error emits a token"
        intact = not drafts or self._keep_accepted(sequence, drafts, path.draft[: result.accepted])
        verified = self._chooser.assess(drafts - branches, result.accepted, branches) if drafts else None
        if sequence.proposers.types:
            sequence.proposers.observe(sequence.history, result.ids, verified)
            sequence.draft = ()
        if result.reason is not None:
            self._lifecycle.finish(sequence, result.reason, keep=intact)
        elif sequence.needs_shift:
            self._lifecycle.preempt(sequence)
            sequence.proposers.shift(*sequence.shift())
        elif not intact:
            self._lifecycle.preempt(sequence, keep=False)

    def _compute_again(self, sequence: Sequence, drafts: int) -> None:
        """Preempts a sequence whose next token needs all logits, and requests all logits for its later rows."""
        sequence.row_params = None
        intact = not drafts or self._keep_accepted(sequence, drafts, ())
        self._lifecycle.preempt(sequence, keep=intact)

    def _keep_accepted(self, sequence: Sequence, drafts: int, tokens: abc.Sequence[int]) -> bool:
        """Commits `tokens`, the accepted ones of `drafts` draft tokens in cells, and rolls back the other draft tokens.

        Returns False if the sequence cannot be continued: a sliding window lacks cells after the rollback, or the
        context has refused it.
        """
        accepted = len(tokens)
        sequence.computed += accepted
        branches = sequence.has_alternative(drafts)
        self._counters.drafted_tokens += drafts - branches
        self._counters.accepted_tokens += accepted
        if branches and accepted and tokens[-1] != sequence.draft[accepted - 1]:
            self._kv.commit(sequence.seq, tokens, alternative=True)
            return True
        self._kv.commit(sequence.seq, tokens)
        return accepted == drafts or self._kv.rollback(sequence.seq)


def _known_tokens(sequence: Sequence, row: int, count: int) -> KnownTokens:
    """Returns the known tokens of row number `row` of `sequence`, of which the backend has selected `count`."""
    sampler = sequence.sampler
    return KnownTokens(count, sampler.bans(sequence.emitted + row) if sampler.adjusts else None)


def _adjust(sequence: Sequence, rows: Logits) -> bool:
    """Applies bias, penalties and bans to the rows of `sequence` in place. Returns False, with the rows in any state,
    after an exception, which ends the request."""
    sampler, history = sequence.sampler, sequence.history
    try:
        for i, row in enumerate(rows):
            path = _draft_path(sequence, i)
            sampler.adjust(row, history + array("i", path) if i else history, sequence.emitted + len(path))
    except Exception:
        log.exception("request %s failed", sequence.request.id)
        rows[:] = np.nan  # no token is picked from NaN
        return False
    return True


def _draft_path(sequence: Sequence, row: int) -> abc.Sequence[int]:
    """Returns the draft tokens to which row `row` attends, its own included; row 0 is that of the last known token."""
    if sequence.has_alternative(row):
        return (*sequence.draft[: sequence.alternative_place], sequence.draft[-1])
    return sequence.draft[:row]
