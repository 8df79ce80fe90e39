"""Runs the speculation policy on simulated machines with synthetic proposers: `python -m bench.simulated`.

Time is virtual: a pass takes the seconds of a given cost curve, each draft token is right with a given probability, and
the engine's own chooser decides the draft lengths. The table compares the result with no drafts, and with an oracle
that has the true curve and probabilities and always verifies the length with the most tokens per second in one pass.
"""

from __future__ import annotations

import argparse
import time
from array import array
from collections.abc import Callable, Sequence
from itertools import product
from math import inf
from random import Random
from statistics import median
from typing import Protocol

from msgspec import Struct

from bench.figures import save, show
from engine.config import DraftConfig, SpeculationConfig
from engine.contract import Request
from engine.pace import DraftChooser, Layout, SequenceRows, StepCost, UpcomingStep
from engine.pace.calibration import CALIBRATED_WEIGHT
from engine.pace.curve import Curve
from engine.sim.costs import flat, linear
from engine.speculate import (
    Draft,
    DraftCandidate,
    LastStep,
    SequenceProposers,
    SharedDraftData,
    SpeculativeDecoding,
    num_matching,
)

# The seconds of a pass by its number of rows.
Machine = Callable[[int], float]
# The probability that a draft token is right, by the number of the step.
Rate = Callable[[int], float]

# Maximum drafted tokens of a step: an engine of 16 slots has this many rows of logits more than slots.
MAX_DRAFT_ROWS = 112
# Maximum tokens of a draft.
MAX_DRAFT_TOKENS = 32


def jumping(rows: int) -> float:
    """Returns the seconds of a pass with the shape measured on two CPU cores: multiples of four rows are cheaper."""
    return 0.015 + 0.012 * rows + (0.020 if rows % 4 else 0.0)


MACHINES: dict[str, Machine] = {"flat": flat, "linear": linear, "jumps": jumping}
UNIFIED, PER_SLOT = Layout(unified=True), Layout(unified=False, flash=True)
LAYOUTS = {"unified": UNIFIED, "per slot": PER_SLOT}


class TokenSource(Protocol):
    """The output of a request."""

    def prefix(self, length: int) -> list[int]:
        """Returns the first `length` tokens."""


class RandomOutput:
    """The output of a request as random tokens."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.tokens: list[int] = []

    def prefix(self, length: int) -> list[int]:
        """Returns the first `length` tokens."""
        while len(self.tokens) < length:
            self.tokens.append(self._random.randrange(1, 1000))
        return self.tokens[:length]


class SyntheticProposer:
    """A proposer of drafts of `length` tokens, each right with the probability that `rate()` returns."""

    def __init__(
        self, output: TokenSource, rate: Callable[[], float], random: Random, length: int = MAX_DRAFT_TOKENS
    ) -> None:
        self._output = output
        self._rate = rate
        self._random = random
        self._length = length
        self._known = 0

    def begin(self, tokens: Sequence[int]) -> None:
        self._known = len(tokens)

    def propose(self, limit: int) -> Draft:
        right = self._output.prefix(self._known + self._length)[self._known :]
        tokens = [token if self._random.random() < self._rate() else 0 for token in right]
        return Draft(tokens[: min(limit, self._length)])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self._known += len(emitted)

    def truncate(self, length: int) -> None:
        raise AssertionError("a simulation truncates no history")

    def shift(self, keep: int, discard: int) -> None:
        raise AssertionError("a simulation shifts no context")

    def end(self) -> None:
        pass


class SimulationResult(Struct):
    """Counts and virtual seconds of a simulation."""

    tokens: int = 0
    seconds: float = 0.0
    rows: int = 0
    trial_rows: int = 0
    """Drafted rows of steps that explore draft lengths."""
    drafted: list[int] = []
    """Drafted tokens of each step."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class NoVocabulary:
    """A vocabulary whose tokens have no text, for proposers that need only token ids."""

    size = 1000
    ends: frozenset[int] = frozenset()

    def text(self, token: int) -> str:
        """Returns an empty text."""
        return ""


def calibrated(machine: Machine, counts: Sequence[int], layout: Layout) -> StepCost:
    """Returns the step cost of a machine, calibrated at `counts` rows."""
    return StepCost(Curve({rows: machine(rows) for rows in counts}, CALIBRATED_WEIGHT), layout)


class SimulatedSequence(Struct):
    """A sequence with its proposers; `tokens` is the emitted part of `output`."""

    output: RandomOutput
    proposers: SequenceProposers
    tokens: array[int]

    def verify(self, draft: Draft, chooser: DraftChooser) -> int:
        """Verifies a draft, appends the emitted tokens and returns their number."""
        length = len(self.tokens)
        expected = self.output.prefix(length + len(draft.tokens) + 1)[length:]
        accepted = num_matching(draft.tokens, expected)
        self.tokens.extend(expected[: accepted + 1])
        self.proposers.observe(self.tokens, expected[: accepted + 1], chooser.assess(len(draft.tokens), accepted))
        return accepted + 1


def simulate(
    machine: Machine,
    rates: Sequence[Rate],
    steps: int,
    *,
    seed: int = 0,
    noise: float = 0.05,
    warmup_steps: int = 0,
    layout: Layout = UNIFIED,
) -> SimulationResult:
    """Simulates `steps` steps with one sequence for each of `rates`.

    The step time that the policy observes varies by a relative `noise`, and is tripled in one step of fifty.
    `warmup_steps` steps run first; their tokens and seconds do not count.
    """
    random = Random(seed)
    cost = calibrated(machine, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128), layout)
    config = SpeculationConfig()
    result = SimulationResult()
    sequences: list[SimulatedSequence] = []
    synthetic: dict[str, SyntheticProposer] = {}
    shared = SharedDraftData(config, NoVocabulary())  # type: ignore[arg-type]
    decoding = SpeculativeDecoding(shared, config, DraftConfig(), factory=lambda _: synthetic, cost=cost)
    for rate in rates:
        output = RandomOutput(random)
        synthetic = {"synthetic": SyntheticProposer(output, lambda rate=rate: rate(len(result.drafted)), random)}  # type: ignore[misc]
        proposers = decoding.sequence_proposers(Request(prompt=(1,)))
        sequences.append(SimulatedSequence(output, proposers, array("i", output.prefix(1))))
    for step in range(warmup_steps + steps):
        if step == warmup_steps:
            result.tokens, result.seconds = 0, 0.0
        for sequence in sequences:
            sequence.proposers.feed(sequence.tokens, 10)
        upcoming = UpcomingStep(
            tuple(SequenceRows(seq) for seq in range(len(sequences))), len(sequences), 0, MAX_DRAFT_ROWS
        )
        candidates = [DraftCandidate(one.proposers, MAX_DRAFT_TOKENS, 1, seq) for seq, one in enumerate(sequences)]
        # The time of drafting itself is not simulated.
        drafts = decoding.planner.plan(candidates, [], upcoming, LastStep(inf))
        total = sum(len(draft.tokens) for draft in drafts)
        rows = [SequenceRows(seq, 1 + len(draft.tokens)) for seq, draft in enumerate(drafts)]
        seconds = sum(map(machine, layout.shape(rows).passes))
        delay = 3.0 if random.random() < 0.02 else 1.0
        decoding.chooser.observe_step(rows, 0, 0, seconds * delay * (1 + noise * random.gauss()))
        result.seconds += seconds
        result.rows += len(sequences) + total
        result.trial_rows += total if decoding.chooser.last_is_trial else 0
        result.drafted.append(total)
        for sequence, draft in zip(sequences, drafts, strict=True):
            result.tokens += sequence.verify(draft, decoding.chooser)
    return result


def oracle(machine: Machine, probabilities: Sequence[float]) -> float:
    """Returns the tokens per second of the best draft lengths, by the true curve and probabilities, in one pass."""
    token_probabilities = sorted(
        (probability**position for probability in probabilities for position in range(1, MAX_DRAFT_TOKENS + 1)),
        reverse=True,
    )[:MAX_DRAFT_ROWS]
    best, gain = len(probabilities) / machine(len(probabilities)), 0.0
    for rows, probability in enumerate(token_probabilities, 1):
        gain += probability
        best = max(best, (len(probabilities) + gain) / machine(len(probabilities) + rows))
    return best


def decision_seconds(sequences: int, layout: Layout, length: int = 16, times: int = 500) -> float:
    """Returns the median seconds of one decision between two drafts of `length` tokens for each of `sequences`."""
    cost = calibrated(jumping, (1, 2, 4, 8, 16, 32, 64, 128), layout)
    load = UpcomingStep(tuple(SequenceRows(seq, 1, 60) for seq in range(sequences)), sequences, 1000, MAX_DRAFT_ROWS)
    random, chooser, spent = Random(0), DraftChooser(cost), list[float]()
    for _ in range(times):
        probabilities = [[random.uniform(0.5, 1.0) for _ in range(2)] for _ in range(sequences)]
        slots = [
            [[probability**position for position in range(1, length + 1)] for probability in pair]
            for pair in probabilities
        ]
        begun = time.perf_counter()
        chooser.decide(slots, range(sequences), load)
        spent.append(time.perf_counter() - begun)
    return median(spent)


def main() -> None:
    """Prints a table and writes `simulated.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of each simulation")
    options = parser.parse_args()
    rows: list[list[object]] = []
    for name, machine in MACHINES.items():
        for probability, clients, (kind, layout) in product((0.0, 0.3, 0.6, 0.8, 0.95), (1, 4, 16), LAYOUTS.items()):
            rates: list[Rate] = [lambda _, probability=probability: probability] * clients  # type: ignore[misc]
            result = simulate(machine, rates, options.steps, layout=layout)
            none, best = clients / machine(clients), oracle(machine, [probability] * clients)
            trial_rows = f"{100 * result.trial_rows / result.rows:.2f} %"
            each = sum(result.drafted) / len(result.drafted) / clients
            rows.append(
                [
                    name,
                    kind,
                    probability,
                    clients,
                    result.rate / none,
                    best / none,
                    result.rate / best,
                    each,
                    trial_rows,
                ]
            )
    columns = ("machine", "KV", "p", "clients", "auto / none", "oracle / none", "auto / oracle", "drafted", "trials")
    show("tokens per second; drafted tokens per sequence and step; fraction of trial rows", columns, rows)
    decisions = {
        kind: {sequences: round(1e6 * decision_seconds(sequences, layout), 1) for sequences in (1, 4, 16)}
        for kind, layout in LAYOUTS.items()
    }
    print(f"microseconds of a decision by sequences: {decisions}")
    save("simulated", {"columns": columns, "rows": rows, "decision_us": decisions})


if __name__ == "__main__":
    main()
