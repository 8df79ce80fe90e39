"""Measures the pick of a step's tokens from its rows of logits, without a model.

The rows are like those of a chat model: in half of them one token is nearly certain, in the others some thirty tokens
are likely. The table has the milliseconds of a step, by vocabulary, number of rows and sampling parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from bench.figures import save, show
from engine import Request, SamplingParams
from engine.backend import Logits
from engine.sampling import UNPICKED, RowMaxima, Sampler, pick_rows

PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "default": SamplingParams(),
    "no top-k": SamplingParams(top_k=0),
    "penalties": SamplingParams(repeat_penalty=1.1),
}
# Tokens of the output before the pick.
HISTORY = [5] * 200


def likely_rows(rows: int, vocabulary: int) -> Logits:
    """Returns rows of logits, [rows, vocabulary]."""
    source = np.random.default_rng(rows)
    logits: Logits = source.standard_normal((rows, vocabulary), np.float32) * 2
    for row in range(rows):
        count = int(source.integers(10, 50))
        logits[row, source.integers(0, vocabulary, count)] = 14 + 1.5 * source.standard_normal(count)
        if row % 2:
            logits[row, source.integers(0, vocabulary)] = 30.0
    return logits


def step_ms(logits: Logits, params: SamplingParams, rounds: int) -> float:
    """Returns the median milliseconds of picking a token from each row."""
    samplers = [
        Sampler(Request(prompt=(1,), sampling=params), seed, frozenset({2}), bytes) for seed in range(len(logits))
    ]
    seconds: list[float] = []
    for _ in range(rounds):
        begun = time.perf_counter()
        row_params = [sampler.row_params for sampler in samplers]
        for sampler, row in zip(samplers, logits, strict=True):
            if sampler.adjusts:
                sampler.adjust(row, HISTORY, 1)
        tokens = pick_rows(RowMaxima(logits), row_params, [len(HISTORY)] * len(logits))
        for row, token in enumerate(tokens):
            if token == UNPICKED:
                samplers[row].sample(logits[row], HISTORY, 1)
        seconds.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    """Prints a table and writes `picks.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[1024, 49_152, 151_936], help="tokens")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128], help="rows of logits of a step")
    parser.add_argument("--rounds", type=int, default=21, help="steps of each measurement")
    options = parser.parse_args()
    figures = []
    for vocabulary in options.vocabulary:
        for rows in options.rows:
            logits = likely_rows(rows, vocabulary)
            spent = {name: step_ms(logits, params, options.rounds) for name, params in PARAMS.items()}
            figures.append({"vocabulary": vocabulary, "rows": rows, **spent})
    show("milliseconds to pick the tokens of a step", [*figures[0]], [[*each.values()] for each in figures])
    save("picks", figures)


if __name__ == "__main__":
    main()
