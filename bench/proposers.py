"""Measures the acceptance of each type of proposer, and of llama-server's types as described in `bench.described`.

The target's greedy outputs are recorded once without speculation and stored in the folder of the models. Speculation
does not change the output, so every type is replayed over the recorded tokens, as in a server that gets the requests of
a workload one after the other.
"""

from __future__ import annotations

import argparse
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Protocol

from msgspec import Struct

from bench import described, prompts
from bench.figures import percentile, save, show
from bench.models import SOURCES
from bench.outputs import RecordedRequest, recorded_requests
from bench.simulated import MAX_DRAFT_ROWS
from engine import open_vocabulary
from engine.backend import Vocab
from engine.config import DraftConfig, EngineConfig, SpeculationConfig
from engine.contract import PROPOSER_TYPES, ProposerType, Request, Speculation
from engine.llama import open_gguf
from engine.pace import VerifiedDraft
from engine.speculate import (
    NO_DRAFT,
    Draft,
    DraftBounds,
    DraftModel,
    SequenceProposers,
    SharedDraftData,
    SpeculativeDecoding,
)
from engine.speculate.draft_model import DraftSequence
from engine.speculate.planner import poll
from engine.speculate.proposer import BatchedDraftRequest, num_matching
from engine.speculate.sampled_draft import PickToken

# Time limit of one draft; long enough for the draft model to prefill a whole prompt.
PREFILL_SECONDS = 60.0


# ── proposers ──


class ReplayProposer(Protocol):
    """The methods of `engine.speculate.proposer.Proposer` that a replay calls."""

    def begin(self, tokens: Sequence[int]) -> None: ...
    def propose(self, limit: int) -> Draft: ...
    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None: ...
    def end(self) -> None: ...


# Creates the proposer of a request. Proposers of one factory share the state that requests of one engine share.
ReplayProposerFactory = Callable[[RecordedRequest], ReplayProposer]


def paceline_proposers(vocab: Vocab) -> dict[str, ReplayProposerFactory]:
    """Returns factories of every type without a draft model, and of `auto`, which chooses among these types.

    Each factory has default settings and shares no state with the others.
    """
    config = SpeculationConfig()

    def engine() -> SpeculativeDecoding:
        return SpeculativeDecoding(SharedDraftData(config, vocab), config, DraftConfig())

    auto_factories = {"auto": all_types(engine(), predict=False), "auto+prediction": all_types(engine(), predict=True)}
    return {
        kind: single_type(engine(), kind) for kind in PROPOSER_TYPES if kind not in ("draft", "draft-mtp", "grammar")
    } | auto_factories


def single_type(decoding: SpeculativeDecoding, kind: ProposerType) -> ReplayProposerFactory:
    """Returns the factory of proposers of one type."""
    speculation = Speculation(type=(kind,))

    def new_proposer(case: RecordedRequest) -> ReplayProposer:
        return decoding.proposers(Request(prompt=case.prompt, prediction=case.prediction, speculation=speculation))[
            kind
        ]

    return new_proposer


def all_types(decoding: SpeculativeDecoding, *, predict: bool) -> ReplayProposerFactory:
    """Returns the factory of proposers of all types, one of which drafts in each step."""
    speculation = Speculation(type=("auto",))

    def new_proposer(case: RecordedRequest) -> ReplayProposer:
        prediction = case.prediction if predict else ()
        return CombinedProposer(
            decoding.sequence_proposers(Request(prompt=case.prompt, prediction=prediction, speculation=speculation))
        )

    return new_proposer


class CombinedProposer:
    """All proposers of a request as one proposer."""

    def __init__(self, proposers: SequenceProposers) -> None:
        self._proposers = proposers
        self._tokens = array("i")

    def begin(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)
        self._proposers.feed(self._tokens, len(self._tokens))

    def propose(self, limit: int) -> Draft:
        poll(self._proposers, limit)
        return self._proposers.choose_longest()

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self._tokens.extend(emitted)
        self._proposers.observe(self._tokens, emitted, VerifiedDraft(drafted, accepted))

    def end(self) -> None:
        self._proposers.end()


def described_proposers() -> dict[str, ReplayProposerFactory]:
    """Returns factories of llama-server's types as described, with the settings of Paceline's types."""
    config, table, slot = SpeculationConfig(), described.ModTable(), described.CacheSlot()
    sizes = (config.size_n, config.size_m)
    return {
        "ngram-simple": lambda case: described.Simple(*sizes),
        "ngram-map-k": lambda case: described.MapK(*sizes, config.min_hits),
        "ngram-map-k4v": lambda case: described.MapK4v(*sizes, config.min_hits),
        "ngram-mod": lambda case: described.Mod(table, config.mod_match, config.mod_min, config.mod_max),
        "ngram-cache": lambda case: described.Cache(slot),
    }


class EagerDraftSequence(DraftSequence):
    """A draft-model sequence that runs the draft model in `propose`, instead of in a batch with other sequences."""

    def __init__(self, model: DraftModel, n_max: int, case: RecordedRequest, pick: PickToken | None = None) -> None:
        super().__init__(model, "", DraftBounds(n_max), pick)

    def propose(self, limit: int) -> Draft:
        self._model.draft([BatchedDraftRequest(self, min(limit, self.bounds.n_max or limit))], PREFILL_SECONDS)
        return super().propose(limit)


# ── the replay ──


class ReplayCounts(Struct):
    """The counts of one type in a workload; `proposals` and `observations` are the seconds of each call.

    `steps` excludes the step of the first token of each output.
    """

    steps: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    first_accepted: int = 0  # drafts whose first token is accepted
    proposals: list[float] = []
    observations: list[float] = []

    def row(self) -> list[object]:
        """Returns the row under `_COLUMNS`."""
        drafts, share = max(1, self.drafts), 100 * self.accepted / max(1, self.drafted)
        rates = [self.drafted / drafts, self.accepted / drafts, self.accepted / self.steps, f"{share:.0f} %"]
        return [self.drafts, *rates, *microseconds(self.proposals), *microseconds(self.observations)[:1]]


# `tokens` and `accepted` are means over the drafts, `per step` is the mean of accepted tokens over the steps.
_COLUMNS = ("type", "drafts", "tokens", "accepted", "per step", "rate", "propose", "p99", "observe")


def microseconds(times: Sequence[float]) -> list[str]:
    """Returns median and 99th percentile of `times`, which are in seconds and not empty, in microseconds."""
    return [f"{1e6 * spent:.{int(spent < 1e-3)}f}" for spent in (median(times), percentile(times, 0.99))]


def replay(new_proposer: ReplayProposerFactory, recorded: Sequence[RecordedRequest], tokens: int) -> ReplayCounts:
    """Replays one request after the other, with the calls that the engine makes to a proposer."""
    count = ReplayCounts()
    for case in recorded:
        proposer = new_proposer(case)
        proposer.begin(case.prompt)
        proposer.observe(case.output[:1])
        emitted = 1
        while emitted < len(case.output):
            emitted += replay_step(proposer, case.output[emitted:], min(tokens - emitted - 1, MAX_DRAFT_ROWS), count)
        proposer.end()
    return count


def replay_step(proposer: ReplayProposer, expected: Sequence[int], limit: int, count: ReplayCounts) -> int:
    """Verifies one draft against `expected`, the rest of the output, and returns the number of emitted tokens."""
    begun = time.perf_counter()
    draft = proposer.propose(limit) if limit > 0 else NO_DRAFT
    proposed = time.perf_counter()
    accepted = num_matching(draft.tokens, expected)
    emitted = expected[: accepted + 1]
    verified = time.perf_counter()
    proposer.observe(emitted, len(draft.tokens), accepted)
    count.observations.append(time.perf_counter() - verified)
    count.proposals.append(proposed - begun)
    count.steps += 1
    count.drafts += bool(draft.tokens)
    count.drafted += len(draft.tokens)
    count.accepted += accepted
    count.first_accepted += accepted > 0
    return len(emitted)


def replay_all(
    vocab: Vocab, recorded: Sequence[RecordedRequest], types: str, tokens: int
) -> Iterator[tuple[str, ReplayCounts]]:
    """Yields name and counts of every type, followed by llama-server's type of the same name if there is one."""
    as_described = described_proposers()
    for name, new_proposer in paceline_proposers(vocab).items():
        if (types and name not in types.split(",")) or ("prediction" in name and not recorded[0].prediction):
            continue
        yield name, replay(new_proposer, recorded, tokens)
        if name in as_described:
            yield f"{name} described", replay(as_described[name], recorded, tokens)


def replay_draft(
    options: argparse.Namespace, vocabulary: int, recorded: Sequence[RecordedRequest]
) -> Iterator[tuple[str, ReplayCounts]]:
    """Yields name and counts of the draft model for two draft lengths."""
    config = EngineConfig.of(path=options.model_draft, slots=1, context=4096)
    with closing(open_gguf(config, lambda share: None, lambda: True)) as backend:
        model = DraftModel(backend, vocabulary)
        for n_max in (3, 8):
            yield f"draft, {n_max}", replay(partial(EagerDraftSequence, model, n_max), recorded, options.tokens)


# ── cost of calls ──

HISTORY_TOKENS, NEW_TOKENS = 32_768, 512
CALL_COLUMNS = ("type", "begin ms", "propose µs", "p99", "per new token µs", "p99")


def measure_calls(vocab: Vocab) -> dict[str, dict[str, list[object]]]:
    """Returns the row under `CALL_COLUMNS` by history and type."""
    code_tokens = [token for problem in prompts.human_eval() for token in vocab.tokenize(problem.code, special=False)]
    figures: dict[str, dict[str, list[object]]] = {}
    periods = {
        "code, twice": code_tokens[: HISTORY_TOKENS // 2],
        "period 7": code_tokens[:7],
        "all equal": code_tokens[:1],
    }
    for title, period in periods.items():
        history = tuple(islice(cycle(period), HISTORY_TOKENS))
        case = RecordedRequest(
            history, history, tuple(islice(cycle(period), HISTORY_TOKENS, HISTORY_TOKENS + NEW_TOKENS))
        )
        figures[title] = {
            name: call_costs(new_proposer, case) for name, new_proposer in paceline_proposers(vocab).items()
        }
        show(f"{HISTORY_TOKENS} tokens: {title}", CALL_COLUMNS, [[name, *row] for name, row in figures[title].items()])
    return figures


def call_costs(new_proposer: ReplayProposerFactory, case: RecordedRequest) -> list[object]:
    """Returns the row of a type under `CALL_COLUMNS`."""
    times = [time.perf_counter()]
    proposer = new_proposer(case)
    proposer.begin(case.prompt)
    for token in case.output:
        times.append(time.perf_counter())
        proposer.propose(64)
        times.append(time.perf_counter())
        proposer.observe((token,))
    times.append(time.perf_counter())
    spent = [later - earlier for earlier, later in pairwise(times)]
    return [1000 * spent[0], *microseconds(spent[1::2]), *microseconds(spent[2::2])]


def main() -> None:
    """Prints a table for each workload, or with `--micro` for each history, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file of the target")
    parser.add_argument("-md", "--model-draft", type=Path, help="GGUF file of a draft model")
    parser.add_argument("--requests", type=int, default=20, help="requests of each workload")
    parser.add_argument("--tokens", type=int, default=192, help="maximum tokens of each answer")
    parser.add_argument("--workloads", default="edit,chat,completion", help="workloads, separated by commas")
    parser.add_argument("--types", default="", help="types, separated by commas; all if empty")
    parser.add_argument("--draft-requests", type=int, default=6, help="requests of each workload for the draft model")
    parser.add_argument("--micro", action="store_true", help="only the time of calls with a long history")
    options = parser.parse_args()
    with open_vocabulary(options.model) as vocab:
        figures = measure_calls(vocab) if options.micro else compare(options, vocab)
    save("proposers_micro" if options.micro else "proposers", figures)


def compare(options: argparse.Namespace, vocab: Vocab) -> dict[str, dict[str, list[object]]]:
    """Returns the row under `_COLUMNS` by workload and type."""
    figures: dict[str, dict[str, list[object]]] = {}
    for workload in options.workloads.split(","):
        recorded = recorded_requests(options.model, workload, options.requests, options.tokens)
        counts = dict(replay_all(vocab, recorded, options.types, options.tokens))
        if options.model_draft:
            counts |= dict(replay_draft(options, vocab.size, recorded[: options.draft_requests]))
        figures[workload] = {name: count.row() for name, count in counts.items()}
        show(f"{workload}, times in µs", _COLUMNS, [[name, *row] for name, row in figures[workload].items()])
    return figures


if __name__ == "__main__":
    main()
