"""Which slot of a per-slot KV context takes a sequence, and when a running one changes its slot. Pure policy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from msgspec import Struct

# Steps for which a request is expected to run: a gap among the running ids costs a pass in each of them.
EXPECTED_STEPS = 64
# How many times as long as moving a token computing it takes, where that was not measured: 2,000 times with a small
# model on two cores.
COMPUTE_FACTOR = 1000
# The chance that the content of a slot just used is asked for again, and the steps after which it is half of that.
REUSE_CHANCE, HALF_LIFE_STEPS = 0.5, 512


class Costs(Struct, frozen=True):
    """Measured costs in seconds; 0 where nothing was measured."""

    compute: float = 0.0
    """Computing a token of a prompt."""
    move: float = 5e-6
    """Saving or loading a cell."""
    resident: float = 0.0
    """By how much a resident cell lengthens a step, with unified KV."""
    extra_pass: float = 0.0
    """One more pass over the weights in a step, with per-slot KV."""

    @property
    def recompute(self) -> float:
        """`compute`, or an estimate of it."""
        return self.compute or COMPUTE_FACTOR * self.move


class SlotOption(Struct, frozen=True):
    """A slot without a running request, from the point of view of one prompt."""

    seq: int
    kept: int
    """Tokens of the prompt that it holds already."""
    lost: int
    """Tokens of other prompts that leave it."""
    unsaved: int
    """Of these, the tokens that have to be saved first."""
    age: int
    """Steps since its last use."""


def choose(
    options: Sequence[SlotOption], source: int, running: Collection[int], costs: Costs, *, offloads: bool
) -> SlotOption:
    """The slot in which a prompt starts soonest and which costs the others least. There is at least one option.

    `source` is the length of the longest prefix that can be copied into a slot: one that holds less gets the copy, if
    that is cheaper than computing. Of equal slots the lowest id is taken.
    """
    longest = max(source, *(option.kept for option in options))

    def cost(option: SlotOption) -> tuple[float, int]:
        seconds = displacement(option, costs, offloads=offloads)
        seconds += EXPECTED_STEPS * costs.extra_pass * gaps(option.seq, running)
        if worth_copying(source, option.kept, costs):
            seconds += costs.move * source
        else:
            seconds += costs.recompute * (longest - option.kept)
        return seconds, option.seq

    return min(options, key=cost)


def displacement(option: SlotOption, costs: Costs, *, offloads: bool) -> float:
    """The cost of what leaves a slot: it is saved first, and has to be restored if it is asked for again, or computed
    where nothing is offloaded; that is less likely the longer it is unused."""
    restore = costs.move if offloads else costs.recompute
    chance = REUSE_CHANCE / (1 + option.age / HALF_LIFE_STEPS)
    return costs.move * option.unsaved + restore * option.lost * chance


def worth_copying(source: int, kept: int, costs: Costs) -> bool:
    """True if copying a prefix of `source` tokens is cheaper than computing those beyond `kept`."""
    return costs.move * source < costs.recompute * (source - kept)


def gaps(seq: int, running: Collection[int]) -> int:
    """By how many passes a step grows if `seq` runs beside `running`, as rows of consecutive ids share a pass: 0 beside
    one neighbour, -1 between two, else 1; 0 where nothing runs."""
    return 1 - (seq - 1 in running) - (seq + 1 in running) if running else 0


def move_target(running: Collection[int]) -> tuple[int, int] | None:
    """A running id, and the free id to which it can be moved so that a step takes fewer passes; None if no single move
    does that: neither an id alone between gaps nor a gap of one id is left."""
    runs: list[list[int]] = []
    for seq in sorted(running):
        if runs and runs[-1][-1] == seq - 1:
            runs[-1].append(seq)
        else:
            runs.append([seq])
    holes = [run[-1] + 1 for run, above in pairwise(runs) if above[0] == run[-1] + 2]
    alone = next((place for place in reversed(range(len(runs))) if len(runs[place]) == 1), None)
    if len(runs) < 2 or (alone is None and not holes):
        return None
    source = runs[-1][-1] if alone is None else runs[alone][0]
    if holes:
        return source, holes[0]
    return source, runs[alone - 1][-1] + 1 if alone else runs[1][0] - 1
