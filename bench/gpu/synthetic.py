"""`paceline serve` with random acceptance: `python -m bench.gpu.synthetic 0.8 -m target.gguf -md draft.gguf ...`.

Like llama-server's `--spec-synth-rates`, the command serves models of random weights: each draft token is accepted with
the given probability if all tokens before it are accepted. Everything else is unchanged: the draft model drafts, the
target computes and samples every row, and draft lengths follow from measured costs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from random import Random
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from api.__main__ import main as paceline
from engine import output_processor
from engine.backend import Logits
from engine.grammar import RowMasks
from engine.sampling import UNPICKED, Sampler
from engine.sequence import Sequence as EngineSequence
from engine.verify import VerificationResult, verify


class RandomAcceptanceSampler(Sampler):
    """A sampler that returns the draft token with probability `rate`, and the sampled token otherwise.

    Every pick samples, so that its cost is unchanged.
    """

    def __init__(self, own: Sampler, draft: Sequence[int], start: int, rate: float, random: Random) -> None:
        """`start` is the length of the history before the draft."""
        self._own = own
        self._draft = draft
        self._start = start
        self._rate = rate
        self._source = random

    def sample(
        self,
        row: Logits,
        history: Sequence[int],
        prompt_length: int,
        discarded: int = 0,
        permitted: NDArray[np.bool_] | None = None,
    ) -> int:
        """Returns the draft token or the sampled token."""
        token = self._own.sample(row, history, prompt_length, discarded, permitted)
        position = len(history) - self._start
        agrees = position < len(self._draft) and self._source.random() < self._rate
        return self._draft[position] if agrees else token


class RandomAcceptanceVerifier:
    """Verifies drafts with random acceptance."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._random = Random(0)

    def __call__(
        self,
        sequence: EngineSequence,
        draft: Sequence[int],
        first: int,
        logits: Logits,
        picks: Sequence[int],
        masks: RowMasks | None = None,
    ) -> VerificationResult:
        """Verifies a draft with the arguments and the result of `engine.verify.verify`."""
        own = sequence.sampler
        sequence.sampler = RandomAcceptanceSampler(own, draft, len(sequence.tokens), self._rate, self._random)
        try:
            return verify(sequence, draft, first, logits, [UNPICKED] * len(picks), masks)
        finally:
            sequence.sampler = own


def rates(rate: float, length: int) -> str:
    """Returns llama-server's value of `--spec-synth-rates`: for each draft position, the probability that all tokens up
    to that position are accepted."""
    return ",".join(f"{rate**position:.6f}" for position in range(1, length + 1))


def main() -> int:
    """Runs the server until a signal ends the process; returns the exit code."""
    rate, *arguments = sys.argv[1:]
    with patch.object(output_processor, "verify", RandomAcceptanceVerifier(float(rate))):
        return paceline(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(main())
