"""Paceline with drafts that are right by chance: `python -m bench.gpu.synthetic 0.8 -m target.gguf -md draft.gguf ...`.

Like llama-server's `--spec-synth-rates`, for models whose texts mean nothing: each token of a draft counts as right
with the chance that is given, as long as those before it did, and is the text then. All else is as ever: the draft
model drafts, the model computes every row, its sampler picks from each, and lengths follow from what was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from random import Random
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from api.__main__ import main as paceline
from engine import runner
from engine.backend import Logits
from engine.grammar import Permits
from engine.sampling import Sampler
from engine.sequence import Sequence as EngineSequence
from engine.verify import VerificationResult, verify


class Agreeing(Sampler):
    """A sampler that takes a draft's token for its own with a set chance; it picks all the same, as that takes time."""

    def __init__(self, own: Sampler, draft: Sequence[int], start: int, rate: float, random: Random) -> None:
        """`start` is the length of the history that the draft continues."""
        self._own = own
        self._draft = draft
        self._start = start
        self._rate = rate
        self._source = random

    def pick(
        self,
        row: Logits,
        history: Sequence[int],
        prompt_length: int,
        forgotten: int = 0,
        permitted: NDArray[np.bool_] | None = None,
    ) -> int:
        """The draft's token, or what the sampler picks."""
        token = self._own.pick(row, history, prompt_length, forgotten, permitted)
        place = len(history) - self._start
        agrees = place < len(self._draft) and self._source.random() < self._rate
        return self._draft[place] if agrees else token


class Verifier:
    """Verifies drafts by chance."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._random = Random(0)

    def __call__(
        self, stream: EngineSequence, draft: Sequence[int], rows: Logits, permits: Permits | None = None
    ) -> VerificationResult:
        """As `engine.verify.verify`."""
        own = stream.sampler
        stream.sampler = Agreeing(own, draft, len(stream.tokens), self._rate, self._random)
        try:
            return verify(stream, draft, rows, permits)
        finally:
            stream.sampler = own


def rates(rate: float, length: int) -> str:
    """The same as llama-server takes it: by place the chance that all tokens up to there are right."""
    return ",".join(f"{rate**place:.6f}" for place in range(1, length + 1))


def main() -> int:
    """Serves until a signal ends it."""
    rate, *arguments = sys.argv[1:]
    with patch.object(runner, "verify", Verifier(float(rate))):
        return paceline(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(main())
