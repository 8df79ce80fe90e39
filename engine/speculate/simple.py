"""The simplest guess: what came after the last few tokens the last time."""

from __future__ import annotations

from array import array

from engine.speculate.ngrams import NgramProposer


class NgramSimple(NgramProposer):
    """Copies what followed the latest earlier occurrence."""

    def _guess(self, length: int) -> array[int]:
        (latest,) = self.index.occurrences(1)
        return self.index.continuation(latest, length)
