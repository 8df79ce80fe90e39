"""The grid in virtual time: recorded output, replayed with the real proposers and the measured cost of a step.

`python -m bench.replay -m target.gguf` asks the target once (see `bench.proposers`) and measures its passes (see
`paceline cost`). Then a step takes what its passes and attended cells cost, a prompt what its rows cost, and drafting
the time that it really takes, so that load on a shared machine changes nothing and differences of a few per cent show.
Lengths of drafts are the engine's own choices; drafts of a model are not replayed. With per-slot KV each request has
the lowest free sequence id.
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
from bench.proposers import Case, cases
from bench.simulated import MOST, Ran
from engine import Measured, step_costs
from engine.backend import Vocab
from engine.config import DraftConfig, EngineConfig, SpeculationConfig
from engine.contract import Request, Speculation
from engine.engine import open_vocabulary
from engine.pace import Layout, Load, SequenceRows, StepCost
from engine.pace.calibration import SEEN
from engine.pace.curve import Curve
from engine.speculate import Drafter, Drafting, Shared, Wish
from engine.speculate.draft import matching

# Standard deviation of the step times that the engine learns from, as a share of a step.
NOISE = 0.05


class Going(Struct):
    """A request under way."""

    case: Case
    drafter: Drafter
    history: array[int]
    seq: int = 0
    said: int = 1

    def rows(self, drafts: int = 0) -> SequenceRows:
        """Returns the rows of the next step: the last token, which has no cell yet, and a draft."""
        return SequenceRows(self.seq, 1 + drafts, len(self.history) - 1)


def replay(
    said: Sequence[Case],
    measured: Measured,
    clients: int,
    asked: Speculation,
    vocab: Vocab,
    tokens: int,
    seed: int = 0,
) -> Ran:
    """Runs all of `said` from `clients` clients, each of which sends its next request when the last was answered."""
    random, truth = Random(seed), learned(measured)
    config = SpeculationConfig()
    drafting = Drafting(Shared(config, vocab), config, DraftConfig(), cost=learned(measured))
    waiting = [Case(case.prompt, case.predicted, case.said[:tokens]) for case in said]
    going, ran, last = list[Going](), Ran(), 0.0
    while waiting or going:
        while waiting and len(going) < clients:
            begun = time.perf_counter()
            going.append(start(drafting, waiting.pop(0), asked))
            going[-1].seq = min({*range(clients)} - {one.seq for one in going[:-1]})
            ran.tokens += 1
            ran.seconds += len(going[-1].case.prompt) * measured.prompt_row + time.perf_counter() - begun
        going.sort(key=lambda one: one.seq)
        begun = time.perf_counter()
        wishes = [
            Wish(one.drafter, room, room, one.seq)
            for one in going
            if one.drafter.knows(one.history) and (room := min(MOST, len(one.case.said) - one.said - 1)) > 0
        ]
        cells = sum(len(one.history) - 1 for one in going)
        load = Load(tuple(one.rows() for one in going), len(going), cells, MOST)
        made = drafting.propose(wishes, [], load, last)
        drafts = {wish.seq: draft.tokens for wish, draft in zip(wishes, made, strict=True)}
        spent = time.perf_counter() - begun
        rows = [one.rows(len(drafts.get(one.seq, ()))) for one in going]
        last = truth.decode_seconds(truth.layout.shape(rows, cells))
        drafting.chooser.saw(rows, 0, cells, last * (1 + NOISE * random.gauss()))
        begun = time.perf_counter()
        for one in going:
            ran.tokens += verify(drafting, one, drafts.get(one.seq, ()))
        ran.seconds += last + spent + time.perf_counter() - begun
        ran.drafted.append(sum(map(len, drafts.values())))
        going = [one for one in going if one.said < len(one.case.said)]
    return ran


def learned(measured: Measured) -> StepCost:
    """Returns the cost of steps by a calibration, in the KV layout that was measured."""
    cost = StepCost(Curve(measured.rows, SEEN), Layout(measured.unified, flash=measured.flash))
    cost.row_cell = measured.row_cell
    return cost


def start(drafting: Drafting, case: Case, asked: Speculation) -> Going:
    """Returns a request whose prompt is computed."""
    history = array("i", [*case.prompt, *case.said[:1]])
    drafter = drafting.drafter(Request(prompt=case.prompt, speculation=asked))
    drafter.learn(history, len(history))
    return Going(case, drafter, history)


def verify(drafting: Drafting, one: Going, draft: Sequence[int]) -> int:
    """Appends the next tokens of the recorded output, and returns their number."""
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
    """Prints a table and writes `replay_<layout>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file of the target")
    parser.add_argument("--workloads", default="edit,chat,completion", help="separated by commas")
    parser.add_argument("--clients", default="1,2,4,8,16", help="the same")
    parser.add_argument("--requests", type=int, default=20, help="of each workload")
    parser.add_argument("--tokens", type=int, default=192, help="of each answer at most")
    parser.add_argument("--kv", choices=["per-slot", "unified"], default="per-slot", help="KV layout")
    options = parser.parse_args()
    slots, unified = max(map(int, options.clients.split(","))), options.kv == "unified"
    config = EngineConfig.of(path=options.model, slots=slots, context=slots * 1024, kv_unified=unified)
    measured = step_costs(config, lambda share: None)
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
    show(f"{options.model.stem} in virtual time, {options.kv} KV: tokens per second to none", columns, rows)
    save(f"replay_{options.kv}", {"measured": measured, "columns": columns, "rows": rows})


if __name__ == "__main__":
    main()
