"""Picks the tokens of a step's rows, from the tokens that the backend has selected or from all logits."""

from __future__ import annotations

from collections import abc
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.backend import Logits
from engine.backend_sampling import BackendSampling, SelectedTokens
from engine.running import PlacedRows
from engine.sampling import UNPICKED, PickParams, RowCandidates, RowMaxima, pick_candidates, pick_rows
from engine.sequence import Sequence

# Minimum steps between two changes that only save time. A change takes the time of one to three steps of one row.
CHANGE_STEPS = 32


class KnownTokens(NamedTuple):
    """The tokens of one row from which the next token is picked without all logits."""

    size: int
    """Number of tokens that the backend has selected."""
    bans: NDArray[np.intp] | None
    """Tokens that may not be picked. None if there are none."""


def changed_counts(needed: abc.Mapping[int, int], sampling: BackendSampling, *, add: bool) -> dict[int, int]:
    """Returns the new counts by sequence id, given the number of tokens that each id needs (0: all logits).

    The count of an id changes if it is too low, or if the id needs all logits. An id without a count gets one only with
    `add`, or together with such a change.
    """
    changed: dict[int, int] = {}
    for seq, number in needed.items():
        count = sampling.current.get(seq, 0)
        if number > count or (count and not number):
            new = next((each for each in sampling.counts if each >= number), 0) if number else 0
            if new != count:
                changed[seq] = new
    return changed if add or any(seq in sampling.current for seq in changed) else {}


class BackendPicks:
    """Chooses the sequences from whose rows the backend selects tokens, and picks from the selected tokens. Belongs to
    the engine thread."""

    def __init__(self, sampling: BackendSampling | None, slots: int) -> None:
        """`sampling` is the backend sampling of the context; None if decodes return all logits. The first `slots`
        sequence ids get the lowest count at once, which suffices for most requests."""
        self._sampling = sampling
        self._steps = 0
        if sampling is not None:
            sampling.change(dict.fromkeys(range(slots), sampling.counts[0]))

    @property
    def counts(self) -> abc.Mapping[int, int]:
        """The number of selected tokens of each row, by sequence id. Rows of other ids have all logits."""
        return {} if self._sampling is None else self._sampling.current

    def prepare(self, rows: abc.Iterable[PlacedRows]) -> bool:
        """Sets the counts of the sequences of the next decode. Returns True if counts have changed, so that
        the decode takes longer. Raises NativeFault."""
        if self._sampling is None:
            return False
        self._steps += 1
        needed = {each.rows.seq: _needed(each.sequence) for each in rows}
        changed = changed_counts(needed, self._sampling, add=self._steps >= CHANGE_STEPS)
        if changed:
            self._steps = 0
            self._sampling.change(changed)
        return bool(changed)

    def pick(
        self,
        known: abc.Mapping[int, KnownTokens],
        logits: Logits,
        params: abc.Sequence[PickParams | None],
        positions: abc.Sequence[int],
    ) -> list[int]:
        """Returns the token of each row of `logits`, as `pick_rows` does. `known` has the rows without all logits.

        The token of such a row is `UNDECIDED` if the pick needs all logits. If it is `UNPICKED`, the row becomes NaN.
        """
        tokens = [UNPICKED] * len(logits)
        if whole := [row for row, each in enumerate(params) if each is not None and row not in known]:
            picked = pick_rows(
                RowMaxima(logits[whole]), [params[row] for row in whole], [positions[row] for row in whole]
            )
            for row, token in zip(whole, picked, strict=True):
                tokens[row] = token
        candidates = self._candidates(known, len(logits))
        known_params = [each for row in known if (each := params[row]) is not None]
        picked = pick_candidates(candidates, known_params, [positions[row] for row in known])
        for row, token in zip(known, picked, strict=True):
            tokens[row] = token
            if token == UNPICKED:
                logits[row] = np.nan  # the sampler picks no token from NaN either
        return tokens

    def _candidates(self, known: abc.Mapping[int, KnownTokens], rows: int) -> RowCandidates:
        assert self._sampling is not None, "only backend sampling selects tokens"
        indices, width = [*known], max(each.size for each in known.values())
        ids, logits = self._sampling.selected(rows)
        found = SelectedTokens(ids[indices, :width], logits[indices, :width])
        is_known = np.arange(width) < np.array([each.size for each in known.values()])[:, None]
        is_banned = np.zeros(is_known.shape, np.bool_)
        for row, each in enumerate(known.values()):
            if each.bans is not None:
                is_banned[row] = (found.ids[row][:, None] == each.bans).any(axis=1)
        return RowCandidates(found, is_known, is_banned)


def _needed(sequence: Sequence) -> int:
    return sequence.sampler.num_candidates if sequence.row_params is not None else 0
