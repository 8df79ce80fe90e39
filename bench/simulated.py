"""The policy against simulated machines and drafters: `python -m bench.simulated`.

Time is virtual: a step takes what a curve says, a draft's tokens are right with a set chance, and the engine's own
drafters and chooser decide. Beside them: no drafts, and an oracle that knows curve and chances and always verifies the
one length that yields most tokens a second.
"""

from __future__ import annotations

import argparse
import time
from array import array
from collections.abc import Callable, Sequence
from math import inf
from random import Random
from statistics import median
from typing import Protocol

from msgspec import Struct

from bench.figures import save, show
from engine.config import DraftConfig, SpeculationConfig
from engine.contract import Request
from engine.pace import Chooser, Load, StepCost
from engine.pace.calibration import SEEN
from engine.pace.curve import Curve
from engine.sim.context import flat, linear
from engine.speculate import Draft, Drafter, Drafting, Shared, Wish
from engine.speculate.draft import matching

Machine = Callable[[int], float]
"""Seconds of a step by its rows."""
Rate = Callable[[int], float]
"""The chance of a drafted token by the number of the step."""

MOST = 112
"""Drafted tokens of a step at most."""
LONGEST = 32
"""Tokens of a draft at most."""


def jumping(rows: int) -> float:
    """As measured on two CPU cores: cheap by fours, dear between."""
    return 0.015 + 0.012 * rows + (0.020 if rows % 4 else 0.0)


MACHINES: dict[str, Machine] = {"flat": flat, "linear": linear, "jumps": jumping}


class Text(Protocol):
    """What a request will say."""

    def upto(self, length: int) -> list[int]:
        """Its first tokens."""


class Truth:
    """What a request will say, token after token; nobody else knows."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.tokens: list[int] = []

    def upto(self, length: int) -> list[int]:
        """Its first tokens."""
        while len(self.tokens) < length:
            self.tokens.append(self._random.randrange(1, 1000))
        return self.tokens[:length]


class Synthetic:
    """A speculator that is right with a set chance, and has `length` tokens to say."""

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
        raise AssertionError("nothing is cut here")

    def shift(self, keep: int, discard: int) -> None:
        raise AssertionError("nothing is shifted here")

    def end(self) -> None:
        pass


class Ran(Struct):
    """What came of a simulation."""

    tokens: int = 0
    seconds: float = 0.0
    rows: int = 0
    tried: int = 0
    """Rows of drafts that were expected to yield less than none."""
    drafted: list[int] = []
    """Drafted tokens by step."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class NoVocabulary:
    """A speculator's vocabulary, where none is needed."""

    size = 1000
    ends: frozenset[int] = frozenset()

    def text(self, token: int) -> str:
        """Nothing."""
        return ""


def calibrated(machine: Machine, counts: Sequence[int]) -> StepCost:
    """What is known of a machine once those numbers of rows were measured."""
    return StepCost(Curve({rows: machine(rows) for rows in counts}, SEEN))


def simulate(
    machine: Machine, rates: Sequence[Rate], steps: int, *, seed: int = 0, noise: float = 0.05, before: int = 0
) -> Ran:
    """The engine's policy for one stream for each of `rates`; a step's time varies by about `noise`, and one in fifty
    is held up threefold. Tokens and seconds of the first steps, `before` the others, do not count."""
    random = Random(seed)
    cost = calibrated(machine, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128))
    config = SpeculationConfig()
    ran = Ran()
    streams: list[tuple[Truth, Drafter, array[int]]] = []
    made: dict[str, Synthetic] = {}
    shared = Shared(config, NoVocabulary())  # type: ignore[arg-type]
    drafting = Drafting(shared, config, DraftConfig(), speculate=lambda _: made, cost=cost)
    for rate in rates:
        truth = Truth(random)
        made = {"synthetic": Synthetic(truth, lambda rate=rate: rate(len(ran.drafted)), random)}  # type: ignore[misc]
        streams.append((truth, drafting.drafter(Request(prompt=(1,))), array("i", truth.upto(1))))
    for step in range(before + steps):
        if step == before:
            ran.tokens, ran.seconds = 0, 0.0
        for _, drafter, tokens in streams:
            drafter.learn(tokens, 10)
        load = Load(len(streams), len(streams), 0, MOST)
        wishes = [Wish(drafter, LONGEST) for _, drafter, _ in streams]
        drafts = drafting.propose(wishes, [], load, inf)  # the time that guessing itself takes is not simulated
        total = sum(len(draft.tokens) for draft in drafts)
        held_up = 3.0 if random.random() < 0.02 else 1.0
        seconds = machine(len(streams) + total) * held_up * (1 + noise * random.gauss())
        drafting.chooser.saw(len(streams), total, 0, 0, seconds)
        ran.seconds += machine(len(streams) + total)
        ran.rows += len(streams) + total
        ran.tried += total if drafting.chooser.trying else 0
        ran.drafted.append(total)
        for (truth, drafter, tokens), draft in zip(streams, drafts, strict=True):
            length = len(tokens)
            coming = truth.upto(length + len(draft.tokens) + 1)[length:]
            right = matching(draft.tokens, coming)
            tokens.extend(coming[: right + 1])
            ran.tokens += right + 1
            drafter.observe(tokens, coming[: right + 1], drafting.chooser.verified(len(draft.tokens), right))
    return ran


def oracle(machine: Machine, chances: Sequence[float]) -> float:
    """Tokens a second of somebody who knows the curve and each stream's chance, and does not learn."""
    offers = sorted((chance**place for chance in chances for place in range(1, LONGEST + 1)), reverse=True)[:MOST]
    best, gain = len(chances) / machine(len(chances)), 0.0
    for rows, chance in enumerate(offers, 1):
        gain += chance
        best = max(best, (len(chances) + gain) / machine(len(chances) + rows))
    return best


def decision_seconds(streams: int, length: int = 16, times: int = 500) -> float:
    """Median seconds of one decision: which of two drafts of so many tokens each of the streams gets, and how much."""
    cost = calibrated(jumping, (1, 2, 4, 8, 16, 32, 64, 128))
    random, chooser, spent = Random(0), Chooser(cost), list[float]()
    for _ in range(times):
        chances = [[random.uniform(0.5, 1.0) for _ in range(2)] for _ in range(streams)]
        slots = [[[chance**place for place in range(1, length + 1)] for chance in pair] for pair in chances]
        begun = time.perf_counter()
        chooser.decide(slots, Load(streams, streams, 1000, MOST))
        spent.append(time.perf_counter() - begun)
    return median(spent)


def main() -> None:
    """Prints a table and writes `simulated.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of each simulation")
    options = parser.parse_args()
    rows: list[list[object]] = []
    for name, machine in MACHINES.items():
        for chance in (0.0, 0.3, 0.6, 0.8, 0.95):
            for clients in (1, 4, 16):
                ran = simulate(machine, [lambda _, chance=chance: chance] * clients, options.steps)  # type: ignore[misc]
                none, best = clients / machine(clients), oracle(machine, [chance] * clients)
                tried = f"{100 * ran.tried / ran.rows:.2f} %"
                each = sum(ran.drafted) / len(ran.drafted) / clients
                rows.append([name, chance, clients, ran.rate / none, best / none, ran.rate / best, each, tried])
    columns = ("machine", "right", "clients", "auto / none", "oracle / none", "auto / oracle", "drafted", "tried")
    show("tokens a second; drafted tokens of a stream and step; rows of trials", columns, rows)
    decisions = {streams: round(1e6 * decision_seconds(streams), 1) for streams in (1, 4, 16)}
    print(f"microseconds of a decision by streams: {decisions}")
    save("simulated", {"columns": columns, "rows": rows, "decision_us": decisions})


if __name__ == "__main__":
    main()
