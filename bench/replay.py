"""Replays the grid in virtual time: recorded outputs, the real proposers and the measured cost of a step.

`python -m bench.replay -m target.gguf` records the outputs of the target once (see `bench.outputs`) and measures its
passes (see `paceline cost`). A step takes the measured cost of its passes and attended cells, a prompt the measured
cost of its rows, and drafting its real time. Other load on the machine therefore hardly changes the result, and
differences of a few per cent are visible. The engine chooses the draft lengths; a draft model is not replayed. With
per-slot KV each request has the lowest free sequence id.
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
from bench.outputs import RecordedRequest, recorded_requests
from bench.simulated import MAX_DRAFT_ROWS, SimulationResult
from engine import Calibration, measure_step_costs, open_vocabulary
from engine.backend import Vocab
from engine.config import DraftConfig, EngineConfig, SpeculationConfig
from engine.contract import Request, Speculation
from engine.pace import Layout, SequenceRows, StepCost, UpcomingStep
from engine.pace.calibration import CALIBRATED_WEIGHT
from engine.pace.curve import Curve
from engine.speculate import (
    DraftCandidate,
    LastStep,
    SequenceProposers,
    SharedDraftData,
    SpeculativeDecoding,
    num_matching,
)

# Relative standard deviation of the step times that the policy observes.
NOISE = 0.05


class ReplayedRequest(Struct):
    """A running request; `emitted` counts its output tokens in `history`."""

    case: RecordedRequest
    proposers: SequenceProposers
    history: array[int]
    seq: int = 0
    emitted: int = 1

    def rows(self, drafts: int = 0) -> SequenceRows:
        """Returns the rows of the next step: the last token, which has no cell yet, and `drafts` draft tokens."""
        return SequenceRows(self.seq, 1 + drafts, len(self.history) - 1)


def replay(
    recorded: Sequence[RecordedRequest],
    measured: Calibration,
    clients: int,
    speculation: Speculation,
    vocab: Vocab,
    tokens: int,
    seed: int = 0,
) -> SimulationResult:
    """Replays `recorded` from `clients` clients in a closed loop, each output truncated to `tokens`."""
    random, true_cost = Random(seed), step_cost_of(measured)
    config = SpeculationConfig()
    decoding = SpeculativeDecoding(SharedDraftData(config, vocab), config, DraftConfig(), cost=step_cost_of(measured))
    waiting = [RecordedRequest(case.prompt, case.prediction, case.output[:tokens]) for case in recorded]
    running, result, step_seconds = list[ReplayedRequest](), SimulationResult(), 0.0
    while waiting or running:
        while waiting and len(running) < clients:
            begun = time.perf_counter()
            running.append(start(decoding, waiting.pop(0), speculation))
            running[-1].seq = min({*range(clients)} - {request.seq for request in running[:-1]})
            result.tokens += 1
            result.seconds += len(running[-1].case.prompt) * measured.prompt_row + time.perf_counter() - begun
        running.sort(key=lambda request: request.seq)
        begun = time.perf_counter()
        candidates = [
            DraftCandidate(request.proposers, limit, limit, request.seq)
            for request in running
            if request.proposers.can_draft(request.history)
            and (limit := min(MAX_DRAFT_ROWS, len(request.case.output) - request.emitted - 1)) > 0
        ]
        cells = sum(len(request.history) - 1 for request in running)
        upcoming = UpcomingStep(tuple(request.rows() for request in running), len(running), cells, MAX_DRAFT_ROWS)
        planned = decoding.planner.plan(candidates, [], upcoming, LastStep(step_seconds))
        drafts = {candidate.seq: draft.tokens for candidate, draft in zip(candidates, planned, strict=True)}
        drafting_seconds = time.perf_counter() - begun
        rows = [request.rows(len(drafts.get(request.seq, ()))) for request in running]
        step_seconds = true_cost.decode_seconds(true_cost.layout.shape(rows, cells))
        decoding.chooser.observe_step(rows, 0, cells, step_seconds * (1 + NOISE * random.gauss()))
        begun = time.perf_counter()
        for request in running:
            result.tokens += verify(decoding, request, drafts.get(request.seq, ()))
        result.seconds += step_seconds + drafting_seconds + time.perf_counter() - begun
        result.drafted.append(sum(map(len, drafts.values())))
        running = [request for request in running if request.emitted < len(request.case.output)]
    return result


def step_cost_of(measured: Calibration) -> StepCost:
    """Returns the step cost of a calibration in its KV layout."""
    cost = StepCost(Curve(measured.rows, CALIBRATED_WEIGHT), Layout(measured.unified, flash=measured.flash))
    cost.row_cell = measured.row_cell
    return cost


def start(decoding: SpeculativeDecoding, case: RecordedRequest, speculation: Speculation) -> ReplayedRequest:
    """Returns a running request whose prompt and first output token are in its history."""
    history = array("i", [*case.prompt, *case.output[:1]])
    proposers = decoding.sequence_proposers(Request(prompt=case.prompt, speculation=speculation))
    proposers.feed(history, len(history))
    return ReplayedRequest(case, proposers, history)


def verify(decoding: SpeculativeDecoding, request: ReplayedRequest, draft: Sequence[int]) -> int:
    """Verifies a draft against the recorded output, appends the emitted tokens and returns their number."""
    expected = request.case.output[request.emitted : request.emitted + len(draft) + 1]
    accepted = num_matching(draft, expected)
    emitted = expected[: accepted + 1]
    request.history.extend(emitted)
    request.emitted += len(emitted)
    request.proposers.observe(request.history, emitted, decoding.chooser.assess(len(draft), accepted))
    if request.emitted >= len(request.case.output):
        request.proposers.end()
    return len(emitted)


_SETTINGS = {
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
    parser.add_argument("--workloads", default="edit,chat,completion", help="workloads, separated by commas")
    parser.add_argument("--clients", default="1,2,4,8,16", help="numbers of concurrent clients, separated by commas")
    parser.add_argument("--requests", type=int, default=20, help="requests of each workload")
    parser.add_argument("--tokens", type=int, default=192, help="maximum tokens of each answer")
    parser.add_argument("--kv", choices=["per-slot", "unified"], default="per-slot", help="KV layout")
    options = parser.parse_args()
    slots, unified = max(map(int, options.clients.split(","))), options.kv == "unified"
    config = EngineConfig.of(path=options.model, slots=slots, context=slots * 1024, kv_unified=unified)
    measured = measure_step_costs(config, lambda share: None)
    rows: list[list[object]] = []
    with open_vocabulary(options.model) as vocab:
        for workload in options.workloads.split(","):
            recorded = recorded_requests(options.model, workload, options.requests, options.tokens)
            for clients in map(int, options.clients.split(",")):
                none = replay(recorded, measured, clients, Speculation(), vocab, options.tokens)
                rates = [
                    replay(recorded, measured, clients, speculation, vocab, options.tokens).rate / none.rate
                    for speculation in _SETTINGS.values()
                ]
                rows.append([workload, clients, none.rate, *rates])
    columns = ("workload", "clients", "none, tokens/s", *_SETTINGS)
    show(f"{options.model.stem} in virtual time, {options.kv} KV: tokens per second to none", columns, rows)
    save(f"replay_{options.kv}", {"measured": measured, "columns": columns, "rows": rows})


if __name__ == "__main__":
    main()
