"""`ngram-simple`: drafts the tokens that followed the latest earlier occurrence of the last n tokens."""

from __future__ import annotations

from array import array

from engine.speculate.ngram_index import NgramProposer


class NgramSimpleProposer(NgramProposer):
    """Copies the tokens after the latest earlier occurrence.

    The method is llama.cpp's (common/ngram-map.cpp, common_ngram_simple_draft). llama.cpp scans the history at each
    step; here an index gives the occurrence.
    """

    def _draft(self, length: int) -> array[int]:
        (latest,) = self.index.occurrences(1)
        return self.index.continuation(latest, length)
