"""The drafting policy against simulated machines and drafters: `python -m bench.simulated`.

Time is virtual: a pass takes what a curve says, a draft's tokens are right with a set chance, and the engine's own
drafters and chooser decide. The table compares with no drafts, and with an oracle that knows curve and chances and
always verifies the one length that yields most tokens per second in a single pass.
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
from engine.pace import Chooser, Layout, Load, SequenceRows, StepCost
from engine.pace.calibration import SEEN
from engine.pace.curve import Curve
from engine.sim.context import flat, linear
from engine.speculate import Draft, Drafter, Drafting, Shared, Wish
from engine.speculate.draft import matching

Machine = Callable[[int], float]
"""Seconds of a pass by its rows."""
Rate = Callable[[int], float]
"""The chance of a drafted token by the number of the step."""

# Drafted tokens of a step at most.
MOST = 112
# Tokens of a draft at most.
LONGEST = 32


def jumping(rows: int) -> float:
    """Returns seconds as measured on two CPU cores: multiples of four rows are cheap, counts between them are not."""
    return 0.015 + 0.012 * rows + (0.020 if rows % 4 else 0.0)


MACHINES: dict[str, Machine] = {"flat": flat, "linear": linear, "jumps": jumping}


UNIFIED, PER_SLOT = Layout(unified=True), Layout(unified=False, flash=True)
LAYOUTS = {"unified": UNIFIED, "per slot": PER_SLOT}


class Text(Protocol):
    """The output of a request."""

    def upto(self, length: int) -> list[int]:
        """Returns the first tokens."""


class Truth:
    """The output of a request, drawn token by token."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.tokens: list[int] = []

    def upto(self, length: int) -> list[int]:
        """Returns the first tokens."""
        while len(self.tokens) < length:
            self.tokens.append(self._random.randrange(1, 1000))
        return self.tokens[:length]


class Synthetic:
    """A proposer that drafts `length` tokens, each right with a set chance."""

    def __init__(self, truth: Text, rate: Callable[[], float], random: Random, length: int = LONGEST) -> None:
        self._truth = truth
        self._rate = rate
        self._random = random
        self._length = length
        self._known = 0

    def begin(self, tokens: Sequence[int]) -> None:
        self._known = len(tokens)

    def propose(self, limit: int) -> Draft:
        right = self._truth.upto(self._known + self._length)[self._known :]
        tokens = [token if self._random.random() < self._rate() else 0 for token in right]
        return Draft(tokens[: min(limit, self._length)])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self._known += len(emitted)

    def truncate(self, length: int) -> None:
        raise AssertionError("no history is cut here")

    def shift(self, keep: int, discard: int) -> None:
        raise AssertionError("no context is shifted here")

    def end(self) -> None:
        pass


class Ran(Struct):
    """Result of a simulation."""

    tokens: int = 0
    seconds: float = 0.0
    rows: int = 0
    tried: int = 0
    """Drafted rows of trials."""
    drafted: list[int] = []
    """Drafted tokens by step."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class NoVocabulary:
    """A vocabulary for proposers that need none."""

    size = 1000
    ends: frozenset[int] = frozenset()

    def text(self, token: int) -> str:
        """Returns an empty text."""
        return ""


def calibrated(machine: Machine, counts: Sequence[int], layout: Layout) -> StepCost:
    """Returns the cost of steps on a machine of which these numbers of rows were measured."""
    return StepCost(Curve({rows: machine(rows) for rows in counts}, SEEN), layout)


def simulate(
    machine: Machine,
    rates: Sequence[Rate],
    steps: int,
    *,
    seed: int = 0,
    noise: float = 0.05,
    before: int = 0,
    layout: Layout = UNIFIED,
) -> Ran:
    """Runs the engine's policy for one sequence for each of `rates`.

    The time of a step varies by about `noise`, and one step in fifty takes three times as long. Tokens and seconds of
    the first `before` steps do not count.
    """
    random = Random(seed)
    cost = calibrated(machine, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128), layout)
    config = SpeculationConfig()
    ran = Ran()
    sequences: list[tuple[Truth, Drafter, array[int]]] = []
    made: dict[str, Synthetic] = {}
    shared = Shared(config, NoVocabulary())  # type: ignore[arg-type]
    drafting = Drafting(shared, config, DraftConfig(), speculate=lambda _: made, cost=cost)
    for rate in rates:
        truth = Truth(random)
        made = {"synthetic": Synthetic(truth, lambda rate=rate: rate(len(ran.drafted)), random)}  # type: ignore[misc]
        sequences.append((truth, drafting.drafter(Request(prompt=(1,))), array("i", truth.upto(1))))
    for step in range(before + steps):
        if step == before:
            ran.tokens, ran.seconds = 0, 0.0
        for _, drafter, tokens in sequences:
            drafter.learn(tokens, 10)
        load = Load(tuple(SequenceRows(seq) for seq in range(len(sequences))), len(sequences), 0, MOST)
        wishes = [Wish(drafter, LONGEST, 1, seq) for seq, (_, drafter, _) in enumerate(sequences)]
        drafts = drafting.propose(wishes, [], load, inf)  # the time of drafting itself is not simulated
        total = sum(len(draft.tokens) for draft in drafts)
        rows = [SequenceRows(seq, 1 + len(draft.tokens)) for seq, draft in enumerate(drafts)]
        seconds = sum(map(machine, layout.shape(rows).passes))
        delay = 3.0 if random.random() < 0.02 else 1.0
        drafting.chooser.saw(rows, 0, 0, seconds * delay * (1 + noise * random.gauss()))
        ran.seconds += seconds
        ran.rows += len(sequences) + total
        ran.tried += total if drafting.chooser.trying else 0
        ran.drafted.append(total)
        for (truth, drafter, tokens), draft in zip(sequences, drafts, strict=True):
            length = len(tokens)
            coming = truth.upto(length + len(draft.tokens) + 1)[length:]
            right = matching(draft.tokens, coming)
            tokens.extend(coming[: right + 1])
            ran.tokens += right + 1
            drafter.observe(tokens, coming[: right + 1], drafting.chooser.verified(len(draft.tokens), right))
    return ran


def oracle(machine: Machine, chances: Sequence[float]) -> float:
    """Returns the tokens per second of the best lengths by the true curve and chances, in a single pass."""
    offers = sorted((chance**place for chance in chances for place in range(1, LONGEST + 1)), reverse=True)[:MOST]
    best, gain = len(chances) / machine(len(chances)), 0.0
    for rows, chance in enumerate(offers, 1):
        gain += chance
        best = max(best, (len(chances) + gain) / machine(len(chances) + rows))
    return best


def decision_seconds(sequences: int, layout: Layout, length: int = 16, times: int = 500) -> float:
    """Returns the median seconds of one decision between two drafts of `length` tokens for each of `sequences`."""
    cost = calibrated(jumping, (1, 2, 4, 8, 16, 32, 64, 128), layout)
    load = Load(tuple(SequenceRows(seq, 1, 60) for seq in range(sequences)), sequences, 1000, MOST)
    random, chooser, spent = Random(0), Chooser(cost), list[float]()
    for _ in range(times):
        chances = [[random.uniform(0.5, 1.0) for _ in range(2)] for _ in range(sequences)]
        slots = [[[chance**place for place in range(1, length + 1)] for chance in pair] for pair in chances]
        begun = time.perf_counter()
        chooser.decide(slots, range(sequences), load)
        spent.append(time.perf_counter() - begun)
    return median(spent)


def main() -> None:
    """Prints a table and writes `simulated.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of each simulation")
    options = parser.parse_args()
    rows: list[list[object]] = []
    for name, machine in MACHINES.items():
        for chance, clients, (kind, layout) in product((0.0, 0.3, 0.6, 0.8, 0.95), (1, 4, 16), LAYOUTS.items()):
            rates: list[Rate] = [lambda _, chance=chance: chance] * clients  # type: ignore[misc]
            ran = simulate(machine, rates, options.steps, layout=layout)
            none, best = clients / machine(clients), oracle(machine, [chance] * clients)
            tried = f"{100 * ran.tried / ran.rows:.2f} %"
            each = sum(ran.drafted) / len(ran.drafted) / clients
            rows.append([name, kind, chance, clients, ran.rate / none, best / none, ran.rate / best, each, tried])
    columns = ("machine", "KV", "right", "clients", "auto / none", "oracle / none", "auto / oracle", "drafted", "tried")
    show("tokens per second; drafted tokens of a sequence and step; rows of trials", columns, rows)
    decisions = {
        kind: {sequences: round(1e6 * decision_seconds(sequences, layout), 1) for sequences in (1, 4, 16)}
        for kind, layout in LAYOUTS.items()
    }
    print(f"microseconds of a decision by sequences: {decisions}")
    save("simulated", {"columns": columns, "rows": rows, "decision_us": decisions})


if __name__ == "__main__":
    main()
