"""The grid in virtual time: what the target said, replayed with the real speculators and the measured cost of a step.

`python -m bench.replay -m target.gguf` asks the target once (see `bench.speculators`) and measures its steps (see
`paceline cost`). Then a step takes what its rows cost by that curve, a prompt what its rows cost, and guessing what it
really takes, so that a shared machine's moods change nothing and a few per cent can be told. Steps are the engine's own
choices; drafts of a model are not replayed.
"""

from __future__ import annotations

import argparse
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from random import Random

from msgspec import Struct

from bench.figures import save, show
from bench.models import SOURCES
from bench.simulated import MOST, Ran
from bench.speculators import Case, cases
from engine import Measured, step_costs
from engine.backend import Vocab
from engine.config import DraftConfig, EngineConfig, SpeculationConfig
from engine.contract import Request, Speculation
from engine.engine import open_vocabulary
from engine.pace import Load, StepCost
from engine.pace.calibration import SEEN
from engine.pace.curve import Curve
from engine.speculate import Drafter, Drafting, Shared, Wish
from engine.speculate.draft import matching

NOISE = 0.05
"""By how much a step's time varies for those who learn from it."""


class Going(Struct):
    """A request under way."""

    case: Case
    drafter: Drafter
    history: array[int]
    said: int = 1


def replay(
    said: Sequence[Case], measured: Measured, clients: int, asked: Speculation, vocab: Vocab, tokens: int, seed: int = 0
) -> Ran:
    """All of `said` from so many clients, each of which asks again when it was answered."""
    seconds_of, random = Curve(measured.rows).seconds, Random(seed)
    config = SpeculationConfig()
    drafting = Drafting(Shared(config, vocab), config, DraftConfig(), cost=StepCost(Curve(measured.rows, SEEN)))
    waiting = [Case(case.prompt, case.predicted, case.said[:tokens]) for case in said]
    going, ran, last = list[Going](), Ran(), 0.0
    while waiting or going:
        while waiting and len(going) < clients:
            begun = time.perf_counter()
            going.append(start(drafting, waiting.pop(0), asked))
            ran.tokens += 1
            ran.seconds += len(going[-1].case.prompt) * measured.prompt_row + time.perf_counter() - begun
        begun = time.perf_counter()
        wishes = [
            Wish(one.drafter, room, room)
            for one in going
            if one.drafter.knows(one.history) and (room := min(MOST, len(one.case.said) - one.said - 1)) > 0
        ]
        made = drafting.propose(wishes, [], Load(len(going), len(going), 0, MOST), last)
        drafts = dict(zip((id(wish.drafter) for wish in wishes), made, strict=True))
        guessing = time.perf_counter() - begun
        total = sum(len(draft.tokens) for draft in made)
        last = seconds_of(len(going) + total)
        drafting.chooser.saw(len(going), total, 0, 0, last * (1 + NOISE * random.gauss()))
        begun = time.perf_counter()
        for one in going:
            draft = drafts.get(id(one.drafter))
            ran.tokens += verify(drafting, one, draft.tokens if draft is not None else ())
        ran.seconds += last + guessing + time.perf_counter() - begun
        ran.drafted.append(total)
        going = [one for one in going if one.said < len(one.case.said)]
    return ran


def start(drafting: Drafting, case: Case, asked: Speculation) -> Going:
    """A request whose prompt has been read."""
    history = array("i", [*case.prompt, *case.said[:1]])
    drafter = drafting.drafter(Request(prompt=case.prompt, speculation=asked))
    drafter.learn(history, len(history))
    return Going(case, drafter, history)


def verify(drafting: Drafting, one: Going, draft: Sequence[int]) -> int:
    """Takes the next tokens of the answer, and returns how many those are."""
    coming = one.case.said[one.said : one.said + len(draft) + 1]
    right = matching(draft, coming)
    emitted = coming[: right + 1]
    one.history.extend(emitted)
    one.said += len(emitted)
    one.drafter.observe(one.history, emitted, drafting.chooser.verified(len(draft), right))
    if one.said >= len(one.case.said):
        one.drafter.end()
    return len(emitted)


SETTINGS = {
    "auto": Speculation(type=("auto",)),
    "suffix:8": Speculation(type=("suffix",), n_max=8, order="fixed"),
    "suffix:16": Speculation(type=("suffix",), n_max=16, order="fixed"),
    "ngram-cache:8": Speculation(type=("ngram-cache",), n_max=8, order="fixed"),
    "ngram-simple:16": Speculation(type=("ngram-simple",), n_max=16, order="fixed"),
}


def main() -> None:
    """Prints a table and writes `replay.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file of the target")
    parser.add_argument("--workloads", default="edit,chat,completion", help="separated by commas")
    parser.add_argument("--clients", default="1,2,4,8,16", help="the same")
    parser.add_argument("--requests", type=int, default=20, help="of each workload")
    parser.add_argument("--tokens", type=int, default=192, help="of each answer at most")
    options = parser.parse_args()
    measured = step_costs(EngineConfig.of(path=options.model), lambda share: None)
    rows: list[list[object]] = []
    with open_vocabulary(options.model) as vocab:
        for workload in options.workloads.split(","):
            said = cases(options.model, workload, options.requests, options.tokens)
            for clients in map(int, options.clients.split(",")):
                none = replay(said, measured, clients, Speculation(), vocab, options.tokens)
                rates = [
                    replay(said, measured, clients, asked, vocab, options.tokens).rate / none.rate
                    for asked in SETTINGS.values()
                ]
                rows.append([workload, clients, none.rate, *rates])
    columns = ("workload", "clients", "none, tokens/s", *SETTINGS)
    show(f"{options.model.stem} in virtual time: tokens a second to none", columns, rows)
    save("replay", {"measured": measured, "columns": columns, "rows": rows})


if __name__ == "__main__":
    main()
