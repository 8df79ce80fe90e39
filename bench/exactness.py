"""Does anything change the text? Token ids and log probabilities of the same requests, served in many ways.

The reference is each request alone, without speculation, its prompt read whole. In the deterministic profile every
other way must give the same to the bit, or the exit code is 1; for the default profile the table tells how far that
is from true.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, islice
from pathlib import Path
from random import Random
from unittest.mock import patch

import msgspec
from msgspec import Struct, structs

from api.prompts import Prompts
from api.schema import ChatRequest
from bench.figures import save, show
from bench.models import SOURCES
from bench.speculators import Question, questions
from engine.config import EngineConfig
from engine.contract import SPECULATOR_TYPES, Finished, Logprob, Request, SamplingParams, Usage
from engine.engine import Engine
from engine.memory import Ordered
from engine.pace import StepCost
from engine.runner import Runner
from engine.speculate.draft import matching

WORKLOADS = ("edit", "chat", "completion", "chat", "completion")
"""Whom requests come from, in turn."""
MOST = 50
"""There are twenty prompts of `chat`."""
ARRIVAL = 0.03
"""Seconds that a client waits before a request, on average."""
WRONG = 4
"""Of so many tokens of a prediction one is wrong."""
EAGER = {"order": "fixed", "size_n": 3, "size_m": 8, "mod_match": 3, "mod_min": 0}
"""Settings with which drafts are frequent, and verified whatever that costs."""


class Said(Struct, frozen=True):
    """What came of a request."""

    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    usage: Usage


class Way(Struct, frozen=True):
    """How requests are served: by an engine of their own, to so many clients that take the next one each."""

    name: str
    """Its first letter says what it is about."""
    clients: int = 4
    types: tuple[str, ...] = ()
    """Who guesses. A prediction, which every request has for `prediction` and every second one for `auto`, is the
    reference with errors."""
    shares: bool = True
    """Whether prefixes of one request may serve another."""
    times: int = 1
    """How often each request is sent, one time after the other."""
    rows: int = 0
    """Prompt rows of a step at most; 0 is what fits by the measured cost."""
    cells: int = 0
    """0 is enough for all."""
    retract: float = 0.0
    """The chance that after an update some running request has to give up its cells."""


ALONE = Way("a alone", clients=1, shares=False, rows=2**20)
WAYS = (
    *(Way(f"b {kind}", types=(kind,)) for kind in SPECULATOR_TYPES if kind != "grammar"),
    Way("c auto", types=("auto",)),
    *(Way(f"d {clients} at once", clients=clients) for clients in (1, 3, 8, 16)),
    *(Way(f"e {rows} rows", rows=rows) for rows in (5, 33, 200)),
    Way("f sent twice", times=2),
    Way("g retracted", types=("auto",), retract=0.2),
    Way("g 512 cells", clients=8, cells=512),
    Way("g 256 cells, auto", clients=8, cells=256, types=("auto",)),
)


# ── what is asked ──


def requests_of(engine: Engine, count: int, tokens: int) -> list[Request]:
    """Workloads in turn, the shortest prompts of each first; every second request with noise."""
    made = Prompts(engine.info, engine.vocab)
    prompts = {
        workload: iter(sorted((prompt_of(made, question) for question in questions(workload, 1000)), key=len))
        for workload in set(WORKLOADS)
    }
    turns = islice(cycle(WORKLOADS), count)
    return [request_of(next(prompts[workload]), number, tokens) for number, workload in enumerate(turns)]


def prompt_of(made: Prompts, question: Question) -> tuple[int, ...]:
    """The tokens of a conversation, or of a text."""
    text, _ = question
    return made.tokens(text if isinstance(text, str) else made.render(msgspec.convert({"messages": text}, ChatRequest)))


def request_of(prompt: tuple[int, ...], number: int, tokens: int) -> Request:
    """The request of this number."""
    noisy = SamplingParams(temperature=0.8, top_p=0.9, repeat_penalty=1.1, presence_penalty=0.3, seed=number)
    sampling = noisy if number % 2 else SamplingParams(temperature=0.0)
    return Request(prompt=prompt, max_tokens=tokens, sampling=sampling, logprobs=3, id=str(number))


def in_way(way: Way, requests: Sequence[Request], reference: Sequence[Said]) -> list[Request]:
    """The requests as they are sent; without a reference nothing is predicted."""
    every = 1 if "prediction" in way.types else 2 if "auto" in way.types else 0
    sent = [structs.replace(asked, salt="" if way.shares else asked.id) for asked in requests]
    for number in range(0, len(reference) if every else 0, every or 1):
        sent[number] = structs.replace(sent[number], prediction=mistaken(reference[number].ids))
    return sent


def mistaken(ids: Sequence[int]) -> tuple[int, ...]:
    """Tokens of which some are wrong."""
    return tuple(0 if place % WRONG == WRONG - 1 else token for place, token in enumerate(ids))


# ── how it is served ──


async def serve(engine: Engine, way: Way, requests: Sequence[Request]) -> list[list[Said]]:
    """What came of each request each time. Clients take them in shuffled order and pause before each."""
    rng = Random(way.name)
    said: list[list[Said]] = [[] for _ in requests]
    order = iter(rng.sample(range(len(requests)), len(requests)))

    def updated() -> None:
        if rng.random() < way.retract:
            engine._inbox.put(retract)

    async def client() -> None:
        for number in order:
            for _ in range(way.times):
                await asyncio.sleep(rng.expovariate(1 / ARRIVAL))
                said[number].append(await read(engine, requests[number], updated))

    await asyncio.gather(*(client() for _ in range(way.clients)))
    return said


def retract(runner: Runner) -> None:
    """Takes the cells of some running request, as the scheduler does when they run out."""
    if runner.running:
        runner._retract(random.choice([*runner.running.values()]))


async def read(engine: Engine, request: Request, updated: Callable[[], None] = lambda: None) -> Said:
    """What comes of one request, calling `updated` at each update."""
    ids: list[int] = []
    logprobs: list[Logprob] = []
    async with engine.generate(request) as updates:
        async for update in updates:
            if isinstance(update, Finished):
                return Said(tuple(ids), tuple(logprobs), update.usage)
            ids += update.ids
            logprobs += update.logprobs
            updated()
    raise AssertionError("no terminal update")


def config(way: Way, model: Path, draft: Path | None, *, deterministic: bool) -> EngineConfig:
    """The engine of a way."""
    wanted = draft is not None and bool({"auto", "draft"} & set(way.types))
    return EngineConfig.of(
        path=model,
        deterministic=deterministic,
        slots=way.clients,
        context=way.cells or max(2048, 256 * way.clients),
        speculation={"types": way.types, **EAGER},
        draft={"path": str(draft), "n_max": 4} if wanted else {},
    )


def prompt_rows(rows: int) -> AbstractContextManager[object]:
    """While entered, steps hold so many prompt rows at most."""
    return patch.object(StepCost, "prompt_rows", lambda *_: rows) if rows else nullcontext()


# ── what came of it ──


class Outcome(Struct, frozen=True):
    """A way beside the reference."""

    equal: int
    """Requests that said the same, with log probabilities equal to the bit."""
    differing: dict[str, int]
    """Of those with other tokens: the place of the first one."""
    drift: float
    """The largest difference of a log probability at places before that."""
    retractions: int
    restarts: int
    """How often all cells were freed because too few could be freed singly."""
    seconds: float
    completion: int
    cached: int
    drafted: int
    accepted: int

    def row(self) -> list[object]:
        """As a row of a table under `COLUMNS`."""
        first = min(self.differing.values(), default="")
        said = [self.completion, self.equal, len(self.differing), first, f"{self.drift:.1g}"]
        work = [self.cached, self.drafted, self.accepted, self.retractions, self.restarts, f"{self.seconds:.0f}"]
        return [*said, *work]


COLUMNS = ("way", "tokens", "equal", "other", "from", "drift", "found", "drafted", "right", "paused", "freed", "s")
"""Tokens said; requests equal to the bit, those with other tokens and the first place of one; how far log
probabilities are apart before that; prompt tokens found; tokens drafted and right; retractions; restarts; seconds."""


def compared(one: Said, other: Said) -> tuple[int | None, float]:
    """The first place with another token, if there is one, and the largest difference of a log probability before."""
    same = matching(one.ids, other.ids)
    drift = 0.0
    for a, b in zip(one.logprobs[:same], other.logprobs[:same], strict=True):
        there = {**dict(b.top), b.token: b.logprob}
        here = {**dict(a.top), a.token: a.logprob}
        drift = max(drift, *(abs(here[token] - there[token]) for token in here.keys() & there.keys()))
    return None if same == len(one.ids) == len(other.ids) else same, drift


class Series(Struct):
    """Ways in which requests are served one after the other, each compared with the first."""

    model: Path
    draft: Path | None
    deterministic: bool
    requests: Sequence[Request]
    reference: Sequence[Said] = ()

    async def run(self, way: Way) -> Outcome:
        """One way; what comes of the first is the reference."""
        opened = Engine.open(config(way, self.model, self.draft, deterministic=self.deterministic))
        with prompt_rows(way.rows), patch.object(Ordered, "clear", autospec=True, side_effect=Ordered.clear) as cleared:
            async with opened as engine:
                sent = in_way(way, self.requests, self.reference)
                begun = time.perf_counter()
                said = await serve(engine, way, sent)
                seconds = time.perf_counter() - begun
                stats = engine.stats()
        self.reference = self.reference or [first for first, *_ in said]
        return self.outcome(said, stats.retractions, cleared.call_count, seconds)

    def outcome(self, said: Sequence[Sequence[Said]], retractions: int, restarts: int, seconds: float) -> Outcome:
        """What was said beside the reference."""
        equal, drift, differing = 0, 0.0, dict[str, int]()
        for request, before, times in zip(self.requests, self.reference, said, strict=True):
            equal += all((now.ids, now.logprobs) == (before.ids, before.logprobs) for now in times)
            for now in times:
                place, apart = compared(before, now)
                drift = max(drift, apart)
                if place is not None:
                    differing[request.id] = min(place, differing.get(request.id, place))
        every = [now for times in said for now in times]
        sums = {
            name: sum(getattr(now.usage, name) for now in every)
            for name in ("completion", "cached", "drafted", "accepted")
        }
        return Outcome(equal, differing, drift, retractions, restarts, seconds, **sums)


def chosen(ways: str, draft: Path | None) -> Iterator[Way]:
    """The ways whose names begin like one of those asked for; without a draft model all but that one."""
    for way in WAYS:
        if way.name.startswith(tuple(ways.split(","))) and (draft or way.types != ("draft",)):
            yield way


async def compare(options: argparse.Namespace) -> dict[str, Outcome]:
    """By way what came of it."""
    deterministic = options.profile == "deterministic"
    async with Engine.open(config(ALONE, options.model, None, deterministic=deterministic)) as engine:
        requests = requests_of(engine, options.requests, options.tokens)
    series = Series(options.model, options.model_draft, deterministic, requests)
    outcomes: dict[str, Outcome] = {}
    for way in (ALONE, *chosen(options.ways, options.model_draft)):
        outcomes[way.name] = await series.run(way)
        print(way.name, *outcomes[way.name].row(), flush=True)
    return outcomes


def main() -> None:
    """Prints a table, writes it as JSON and fails if something differs that must not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("-md", "--model-draft", type=Path, help="GGUF file of a draft model")
    parser.add_argument("--requests", type=int, default=40, help=f"at most {MOST}")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer at most")
    parser.add_argument("--profile", choices=["deterministic", "default", "both"], default="deterministic")
    parser.add_argument("--ways", default="", help="beginnings of names, separated by commas, like b,g; all if empty")
    options = parser.parse_args()
    if not 0 < options.requests <= MOST:
        parser.error(f"--requests is {options.requests}, from 1 to {MOST} are possible")
    if options.profile == "both":  # a process each: the library decides once how it multiplies
        command = [sys.executable, "-m", "bench.exactness", *sys.argv[1:], "--profile"]
        sys.exit(max(subprocess.run([*command, profile]).returncode for profile in ("deterministic", "default")))
    outcomes = asyncio.run(compare(options))
    title = f"{options.model.stem}, {options.profile} profile, {options.requests} requests"
    show(title, COLUMNS, [[name, *outcome.row()] for name, outcome in outcomes.items()])
    save(f"exactness_{options.profile}_{options.model.stem}", outcomes)
    if options.profile == "deterministic" and any(outcome.equal < options.requests for outcome in outcomes.values()):
        sys.exit("Something changes the text.")


if __name__ == "__main__":
    main()
