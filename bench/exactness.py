"""Token ids and log probabilities of the same requests, served in many ways and compared.

The reference is each request alone, without speculation, its prompt prefilled in one step. In the deterministic profile
every other way must give the same to the bit, or the exit code is 1; for the default profile the table shows how far
the ways differ.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, islice
from pathlib import Path
from random import Random
from unittest.mock import patch

import msgspec
from msgspec import Struct, structs

from api.schema.requests import ChatRequest
from api.templates.prompts import Prompts
from bench.figures import save, show
from bench.models import SOURCES
from bench.proposers import Question, questions
from engine.config import EngineConfig
from engine.contract import PROPOSER_TYPES, Finished, Logprob, Request, SamplingParams, Usage
from engine.engine import Engine
from engine.pace import StepCost
from engine.runner import Runner
from engine.speculate.draft import matching

# The workloads of the requests, in turn.
WORKLOADS = ("edit", "chat", "completion", "chat", "completion")
# Requests at most, as there are twenty prompts of `chat`.
MOST_REQUESTS = 50
# Mean pause of a client before a request.
PAUSE_SECONDS = 0.03
# One of so many tokens of a prediction is wrong.
WRONG_EVERY = 4
# With per-slot KV the cells of a slot.
SLOT_CELLS = 1024
# Settings with which drafts are frequent, and verified whatever that costs.
EAGER = {"order": "fixed", "size_n": 3, "size_m": 8, "mod_match": 3, "mod_min": 0}


class Output(Struct, frozen=True):
    """The tokens of a request, with their log probabilities."""

    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    usage: Usage


class Way(Struct, frozen=True):
    """How requests are served: by an engine of their own, to so many clients that take the next one each."""

    name: str
    """The first letter names the group."""
    clients: int = 4
    types: tuple[str, ...] = ()
    """Types of speculation. A prediction, which every request has for `prediction` and every second one for `auto`, is
    the reference with errors."""
    shares: bool = True
    """False if no request may use a prefix of another."""
    times: int = 1
    """How often each request is sent, one time after the other."""
    rows: int = 0
    """Prefill rows of a step at most; 0 is what fits by the measured cost."""
    slots: int = 0
    """0 is one for each client."""
    cells: int = 0
    """Cells of one pool, with unified KV; 0 is per-slot KV with enough for each slot."""
    preempt: float = 0.0
    """The chance that after an update some running request is preempted."""


ALONE = Way("a alone", clients=1, shares=False, rows=2**20)
WAYS = (
    *(Way(f"b {kind}", types=(kind,)) for kind in PROPOSER_TYPES if kind != "grammar"),
    Way("c auto", types=("auto",)),
    *(Way(f"d {clients} at once", clients=clients) for clients in (1, 3, 8, 16)),
    *(Way(f"e {rows} rows", rows=rows) for rows in (5, 33, 200)),
    Way("f sent twice", times=2),
    Way("g preempted", types=("auto",), preempt=0.2),
)
# With the deterministic profile, which has per-slot KV: slots are overwritten, and their contents saved and restored.
FEW_SLOTS = (Way("g 2 slots", clients=8, slots=2), Way("g 1 slot, auto", clients=8, slots=1, types=("auto",)))
# With the default profile: sequences are preempted, and blocks saved and restored.
FEW_CELLS = (
    Way("g 512 cells", clients=8, cells=512),
    Way("g 256 cells, auto", clients=8, cells=256, types=("auto",)),
)


# ── requests ──


def requests_of(engine: Engine, count: int, tokens: int) -> list[Request]:
    """Requests of the workloads in turn, the shortest prompts of each first; every second one is sampled."""
    made = Prompts(engine.info, engine.vocab)
    prompts = {
        workload: iter(sorted((prompt_of(made, question) for question in questions(workload, 1000)), key=len))
        for workload in set(WORKLOADS)
    }
    turns = islice(cycle(WORKLOADS), count)
    return [request_of(next(prompts[workload]), number, tokens) for number, workload in enumerate(turns)]


def prompt_of(made: Prompts, question: Question) -> tuple[int, ...]:
    """The tokens of a conversation, or of a prompt without a template."""
    asked, _ = question
    if isinstance(asked, str):
        return made.tokens(asked)
    return made.tokens(made.render(msgspec.convert({"messages": asked}, ChatRequest)))


def request_of(prompt: tuple[int, ...], number: int, tokens: int) -> Request:
    """The request of this number."""
    noisy = SamplingParams(temperature=0.8, top_p=0.9, repeat_penalty=1.1, presence_penalty=0.3, seed=number)
    sampling = noisy if number % 2 else SamplingParams(temperature=0.0)
    return Request(prompt=prompt, max_tokens=tokens, sampling=sampling, logprobs=3, id=str(number))


def in_way(way: Way, requests: Sequence[Request], reference: Sequence[Output]) -> list[Request]:
    """The requests as they are sent; without a reference they have no predictions."""
    every = 1 if "prediction" in way.types else 2 if "auto" in way.types else 0
    sent = [structs.replace(asked, salt="" if way.shares else asked.id) for asked in requests]
    for number in range(0, len(reference) if every else 0, every or 1):
        sent[number] = structs.replace(sent[number], prediction=mistaken(reference[number].ids))
    return sent


def mistaken(ids: Sequence[int]) -> tuple[int, ...]:
    """Tokens of which some are wrong."""
    return tuple(0 if place % WRONG_EVERY == WRONG_EVERY - 1 else token for place, token in enumerate(ids))


# ── serving ──


async def serve(engine: Engine, way: Way, requests: Sequence[Request]) -> list[list[Output]]:
    """The outputs of each request. Clients take requests in shuffled order and pause before each."""
    rng = Random(way.name)
    outputs: list[list[Output]] = [[] for _ in requests]
    order = iter(rng.sample(range(len(requests)), len(requests)))

    async def updated() -> None:
        if rng.random() < way.preempt:
            await engine.ask(preempt_one)

    async def client() -> None:
        for number in order:
            for _ in range(way.times):
                await asyncio.sleep(rng.expovariate(1 / PAUSE_SECONDS))
                outputs[number].append(await collect(engine, requests[number], updated))

    await asyncio.gather(*(client() for _ in range(way.clients)))
    return outputs


def preempt_one(runner: Runner) -> None:
    """Preempts some running sequence, as the scheduler does when cells run out."""
    if runner.running:
        runner._preempt(random.choice([*runner.running.values()]))


async def collect(engine: Engine, request: Request, updated: Callable[[], Awaitable[None]]) -> Output:
    """The output of one request; `updated` is called after each update."""
    ids: list[int] = []
    logprobs: list[Logprob] = []
    async with engine.generate(request) as updates:
        async for update in updates:
            if isinstance(update, Finished):
                return Output(tuple(ids), tuple(logprobs), update.usage)
            ids += update.ids
            logprobs += update.logprobs
            await updated()
    raise AssertionError("no terminal update")


def config(way: Way, model: Path, draft: Path | None, *, deterministic: bool) -> EngineConfig:
    """The configuration of a way."""
    slots = way.slots or way.clients
    wanted = draft is not None and bool({"auto", "draft"} & set(way.types))
    return EngineConfig.of(
        path=model,
        deterministic=deterministic,
        slots=slots,
        context=way.cells or SLOT_CELLS * slots,
        kv_unified=bool(way.cells),
        speculation={"types": way.types, **EAGER},
        draft={"path": str(draft), "n_max": 4} if wanted else {},
    )


def prompt_rows(rows: int) -> AbstractContextManager[object]:
    """While entered, steps have so many prefill rows at most."""
    return patch.object(StepCost, "prompt_rows", lambda *_: rows) if rows else nullcontext()


# ── comparison ──


class Outcome(Struct, frozen=True):
    """A way compared with the reference."""

    equal: int
    """Requests with the same tokens, and log probabilities equal to the bit."""
    differing: dict[str, int]
    """By request the position of the first token that differs."""
    drift: float
    """The largest difference of a log probability before that."""
    preemptions: int
    seconds: float
    completion: int
    cached: int
    drafted: int
    accepted: int

    def row(self) -> list[object]:
        """As a row of a table under `COLUMNS`."""
        first = min(self.differing.values(), default="")
        outputs = [self.completion, self.equal, len(self.differing), first, f"{self.drift:.1g}"]
        return [*outputs, self.cached, self.drafted, self.accepted, self.preemptions, f"{self.seconds:.0f}"]


# Tokens emitted; requests equal to the bit, those with other tokens and the first position of one; the largest
# difference of log probabilities before that; prompt tokens cached; tokens drafted and accepted; preemptions; seconds.
COLUMNS = ("way", "tokens", "equal", "other", "from", "drift", "cached", "drafted", "accepted", "preempted", "s")


def compared(one: Output, other: Output) -> tuple[int | None, float]:
    """The first position with another token, if there is one, and the largest difference of a log probability before
    it."""
    same = matching(one.ids, other.ids)
    drift = 0.0
    for a, b in zip(one.logprobs[:same], other.logprobs[:same], strict=True):
        there = {**dict(b.top), b.token: b.logprob}
        here = {**dict(a.top), a.token: a.logprob}
        drift = max(drift, *(abs(here[token] - there[token]) for token in here.keys() & there.keys()))
    return None if same == len(one.ids) == len(other.ids) else same, drift


class Series(Struct):
    """Ways in which requests are served one after the other, each compared with the first, the reference."""

    model: Path
    draft: Path | None
    deterministic: bool
    requests: Sequence[Request]
    reference: Sequence[Output] = ()

    async def run(self, way: Way) -> Outcome:
        """Serves one way; the outputs of the first are the reference."""
        opened = Engine.open(config(way, self.model, self.draft, deterministic=self.deterministic))
        with prompt_rows(way.rows):
            async with opened as engine:
                sent = in_way(way, self.requests, self.reference)
                begun = time.perf_counter()
                outputs = await serve(engine, way, sent)
                seconds = time.perf_counter() - begun
                stats = engine.stats()
        self.reference = self.reference or [first for first, *_ in outputs]
        return self.outcome(outputs, stats.retractions, seconds)

    def outcome(self, outputs: Sequence[Sequence[Output]], preemptions: int, seconds: float) -> Outcome:
        """The outputs compared with the reference."""
        equal, drift, differing = 0, 0.0, dict[str, int]()
        for request, before, times in zip(self.requests, self.reference, outputs, strict=True):
            equal += all((now.ids, now.logprobs) == (before.ids, before.logprobs) for now in times)
            for now in times:
                place, apart = compared(before, now)
                drift = max(drift, apart)
                if place is not None:
                    differing[request.id] = min(place, differing.get(request.id, place))
        every = [now for times in outputs for now in times]
        sums = {
            name: sum(getattr(now.usage, name) for now in every)
            for name in ("completion", "cached", "drafted", "accepted")
        }
        return Outcome(equal, differing, drift, preemptions, seconds, **sums)


def chosen(ways: str, draft: Path | None, *, deterministic: bool) -> Iterator[Way]:
    """The ways of a profile whose names begin like one of `ways`; without a draft model not that of type `draft`."""
    for way in (*WAYS, *(FEW_SLOTS if deterministic else FEW_CELLS)):
        if way.name.startswith(tuple(ways.split(","))) and (draft or way.types != ("draft",)):
            yield way


async def compare(options: argparse.Namespace) -> dict[str, Outcome]:
    """The outcome of each way, by its name."""
    deterministic = options.profile == "deterministic"
    async with Engine.open(config(ALONE, options.model, None, deterministic=deterministic)) as engine:
        requests = requests_of(engine, options.requests, options.tokens)
    series = Series(options.model, options.model_draft, deterministic, requests)
    outcomes: dict[str, Outcome] = {}
    for way in (ALONE, *chosen(options.ways, options.model_draft, deterministic=deterministic)):
        outcomes[way.name] = await series.run(way)
        print(way.name, *outcomes[way.name].row(), flush=True)
    return outcomes


def main() -> None:
    """Prints a table, writes it as JSON, and exits with 1 if an output differs that must not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("-md", "--model-draft", type=Path, help="GGUF file of a draft model")
    parser.add_argument("--requests", type=int, default=40, help=f"at most {MOST_REQUESTS}")
    parser.add_argument("--tokens", type=int, default=24, help="of each output at most")
    parser.add_argument("--profile", choices=["deterministic", "default", "both"], default="deterministic")
    parser.add_argument("--ways", default="", help="beginnings of names, separated by commas, like b,g; all if empty")
    options = parser.parse_args()
    if not 0 < options.requests <= MOST_REQUESTS:
        parser.error(f"--requests is {options.requests}, from 1 to {MOST_REQUESTS} are possible")
    if options.profile == "both":  # a process each, as the library decides once how it multiplies
        command = [sys.executable, "-m", "bench.exactness", *sys.argv[1:], "--profile"]
        sys.exit(max(subprocess.run([*command, profile]).returncode for profile in ("deterministic", "default")))
    outcomes = asyncio.run(compare(options))
    title = f"{options.model.stem}, {options.profile} profile, {options.requests} requests"
    show(title, COLUMNS, [[name, *outcome.row()] for name, outcome in outcomes.items()])
    save(f"exactness_{options.profile}_{options.model.stem}", outcomes)
    if options.profile == "deterministic" and any(outcome.equal < options.requests for outcome in outcomes.values()):
        sys.exit("An output depends on how it is served.")


if __name__ == "__main__":
    main()
