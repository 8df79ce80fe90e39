"""Compares token ids and log probabilities of the same requests, served in many ways.

The reference is each request alone, without speculation, its prompt prefilled in one step. With the deterministic
profile every other way must give bit-equal results, or the exit code is 1. With the default profile the table has the
differences.
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
from api.templates.prompts import PromptRenderer
from bench.figures import save, show
from bench.models import SOURCES
from bench.outputs import WorkloadPrompt, questions
from engine.config import EngineConfig
from engine.contract import PROPOSER_TYPES, Finished, Logprob, Request, SamplingParams, Usage
from engine.engine import Engine
from engine.pace import StepCost
from engine.speculate import num_matching
from engine.step import EngineCore

# The workloads of consecutive requests.
_WORKLOADS = ("edit", "chat", "completion", "chat", "completion")
# `chat` has twenty prompts, which limits the number of requests.
MAX_REQUESTS = 50
# Mean pause of a client before a request.
_PAUSE_SECONDS = 0.03
# One in WRONG_EVERY tokens of a prediction is wrong.
WRONG_EVERY = 4
# Cells of each slot with per-slot KV.
_SLOT_CELLS = 1024
# Speculation settings with frequent drafts, which are verified independently of their cost.
EAGER = {"order": "fixed", "size_n": 3, "size_m": 8, "mod_match": 3, "mod_min": 0}


class RequestOutput(Struct, frozen=True):
    """The tokens of a request, with their log probabilities."""

    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    usage: Usage


class Way(Struct, frozen=True):
    """A way of serving the requests: `clients` clients of one engine in a closed loop."""

    name: str
    """The first letter names the group."""
    clients: int = 4
    types: tuple[str, ...] = ()
    """Types of speculation. With `prediction` every request has a prediction, with `auto` every second one: the
    reference with errors."""
    shares: bool = True
    """False if each request has a cache salt of its own."""
    times: int = 1
    """Number of times that each request is sent, one after the other."""
    rows: int = 0
    """Maximum prefill rows of a step; 0 means the scheduler's choice."""
    slots: int = 0
    """Number of slots; 0 means one for each client."""
    cells: int = 0
    """Cells of unified KV; 0 means per-slot KV with `_SLOT_CELLS` cells for each slot."""
    preempt: float = 0.0
    """Probability that an update of a request is followed by a preemption."""


ALONE = Way("a alone", clients=1, shares=False, rows=2**20)
WAYS = (
    *(Way(f"b {kind}", types=(kind,)) for kind in PROPOSER_TYPES if kind != "grammar"),
    Way("c auto", types=("auto",)),
    *(Way(f"d {clients} at once", clients=clients) for clients in (1, 3, 8, 16)),
    *(Way(f"e {rows} rows", rows=rows) for rows in (5, 33, 200)),
    Way("f sent twice", times=2),
    Way("g preempted", types=("auto",), preempt=0.2),
)
# For the deterministic profile, which has per-slot KV: slots are overwritten, and their states saved and restored.
FEW_SLOTS = (Way("g 2 slots", clients=8, slots=2), Way("g 1 slot, auto", clients=8, slots=1, types=("auto",)))
# For the default profile with unified KV: sequences are preempted, and KV blocks saved and restored.
FEW_CELLS = (
    Way("g 512 cells", clients=8, cells=512),
    Way("g 256 cells, auto", clients=8, cells=256, types=("auto",)),
)


# ── requests ──


def requests_of(engine: Engine, count: int, tokens: int) -> list[Request]:
    """Returns requests of alternating workloads, those with short prompts first; every second request is sampled."""
    renderer = PromptRenderer(engine.info, engine.vocab)
    prompts = {
        workload: iter(sorted((prompt_of(renderer, question) for question in questions(workload, 1000)), key=len))
        for workload in set(_WORKLOADS)
    }
    turns = islice(cycle(_WORKLOADS), count)
    return [request_of(next(prompts[workload]), number, tokens) for number, workload in enumerate(turns)]


def prompt_of(renderer: PromptRenderer, question: WorkloadPrompt) -> tuple[int, ...]:
    """Returns the tokens of a rendered conversation, or of a text."""
    content, _ = question
    if isinstance(content, str):
        return renderer.tokenize(content)
    return renderer.tokenize(renderer.render(msgspec.convert({"messages": content}, ChatRequest)))


def request_of(prompt: tuple[int, ...], number: int, tokens: int) -> Request:
    """Returns request `number`: greedy if the number is even, else sampled with the number as its seed."""
    sampled = SamplingParams(temperature=0.8, top_p=0.9, repeat_penalty=1.1, presence_penalty=0.3, seed=number)
    sampling = sampled if number % 2 else SamplingParams(temperature=0.0)
    return Request(prompt=prompt, max_tokens=tokens, sampling=sampling, logprobs=3, id=str(number))


def in_way(way: Way, requests: Sequence[Request], reference: Sequence[RequestOutput]) -> list[Request]:
    """Returns the requests with the salts and predictions of a way; without a reference there are no predictions."""
    every = 1 if "prediction" in way.types else 2 if "auto" in way.types else 0
    sent = [structs.replace(request, salt="" if way.shares else request.id) for request in requests]
    for number in range(0, len(reference) if every else 0, every or 1):
        sent[number] = structs.replace(sent[number], prediction=mistaken(reference[number].ids))
    return sent


def mistaken(ids: Sequence[int]) -> tuple[int, ...]:
    """Returns the ids with one in WRONG_EVERY replaced by 0."""
    return tuple(0 if place % WRONG_EVERY == WRONG_EVERY - 1 else token for place, token in enumerate(ids))


# ── serving ──


async def serve(engine: Engine, way: Way, requests: Sequence[Request]) -> list[list[RequestOutput]]:
    """Returns the outputs of each request. The order of requests is shuffled; clients pause before each request."""
    rng = Random(way.name)
    outputs: list[list[RequestOutput]] = [[] for _ in requests]
    order = iter(rng.sample(range(len(requests)), len(requests)))

    async def updated() -> None:
        if rng.random() < way.preempt:
            await engine.query(preempt_one)

    async def client() -> None:
        for number in order:
            for _ in range(way.times):
                await asyncio.sleep(rng.expovariate(1 / _PAUSE_SECONDS))
                outputs[number].append(await collect(engine, requests[number], updated))

    await asyncio.gather(*(client() for _ in range(way.clients)))
    return outputs


def preempt_one(core: EngineCore) -> None:
    """Preempts a random running sequence, as the scheduler does without free cells. Runs on the engine thread."""
    if core.running:
        core.lifecycle.preempt(random.choice([*core.running.values()]))


async def collect(engine: Engine, request: Request, updated: Callable[[], Awaitable[None]]) -> RequestOutput:
    """Returns the output of one request; `updated` is called after each update."""
    ids: list[int] = []
    logprobs: list[Logprob] = []
    async with engine.generate(request) as updates:
        async for update in updates:
            if isinstance(update, Finished):
                return RequestOutput(tuple(ids), tuple(logprobs), update.usage)
            ids += update.ids
            logprobs += update.logprobs
            await updated()
    raise AssertionError("no terminal update")


def config(way: Way, model: Path, draft: Path | None, *, deterministic: bool) -> EngineConfig:
    """Returns the engine's configuration for a way."""
    slots = way.slots or way.clients
    has_draft = draft is not None and bool({"auto", "draft"} & set(way.types))
    return EngineConfig.of(
        path=model,
        deterministic=deterministic,
        slots=slots,
        context=way.cells or _SLOT_CELLS * slots,
        kv_unified=bool(way.cells),
        speculation={"types": way.types, **EAGER},
        draft={"path": str(draft), "n_max": 4} if has_draft else {},
    )


def prompt_rows(rows: int) -> AbstractContextManager[object]:
    """Limits the prefill rows of a step while entered; 0 means no change."""
    return patch.object(StepCost, "prompt_rows", lambda *_: rows) if rows else nullcontext()


# ── comparison ──


class WayResult(Struct, frozen=True):
    """The comparison of a way with the reference."""

    equal: int
    """Requests with equal tokens and bit-equal log probabilities."""
    differing: dict[str, int]
    """Position of the first differing token by request id."""
    drift: float
    """The largest difference of a log probability before the first differing token."""
    preemptions: int
    seconds: float
    completion: int
    cached: int
    drafted: int
    accepted: int

    def row(self) -> list[object]:
        """Returns the row under `_COLUMNS`."""
        first = min(self.differing.values(), default="")
        outputs = [self.completion, self.equal, len(self.differing), first, f"{self.drift:.1g}"]
        return [*outputs, self.cached, self.drafted, self.accepted, self.preemptions, f"{self.seconds:.0f}"]


# `from` is the smallest position of a differing token; the other columns are the fields of `WayResult`.
_COLUMNS = ("way", "tokens", "equal", "other", "from", "drift", "cached", "drafted", "accepted", "preempted", "s")


def compared(one: RequestOutput, other: RequestOutput) -> tuple[int | None, float]:
    """Returns the position of the first differing token, `None` if there is none, and the largest difference of a log
    probability before it."""
    same = num_matching(one.ids, other.ids)
    drift = 0.0
    for a, b in zip(one.logprobs[:same], other.logprobs[:same], strict=True):
        there = {**dict(b.top), b.token: b.logprob}
        here = {**dict(a.top), a.token: a.logprob}
        drift = max(drift, *(abs(here[token] - there[token]) for token in here.keys() & there.keys()))
    return None if same == len(one.ids) == len(other.ids) else same, drift


class Series(Struct):
    """Runs ways one after the other; the outputs of the first way are the reference of the others."""

    model: Path
    draft: Path | None
    deterministic: bool
    requests: Sequence[Request]
    reference: Sequence[RequestOutput] = ()

    async def run(self, way: Way) -> WayResult:
        """Serves the requests in one way and returns the comparison."""
        opened = Engine.open(config(way, self.model, self.draft, deterministic=self.deterministic))
        with prompt_rows(way.rows):
            async with opened as engine:
                sent = in_way(way, self.requests, self.reference)
                begun = time.perf_counter()
                outputs = await serve(engine, way, sent)
                seconds = time.perf_counter() - begun
                stats = engine.stats()
        self.reference = self.reference or [first for first, *_ in outputs]
        return self.outcome(outputs, stats.preemptions, seconds)

    def outcome(self, outputs: Sequence[Sequence[RequestOutput]], preemptions: int, seconds: float) -> WayResult:
        """Returns the comparison of the outputs with the reference."""
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
        return WayResult(equal, differing, drift, preemptions, seconds, **sums)


def chosen(ways: str, draft: Path | None, *, deterministic: bool) -> Iterator[Way]:
    """Yields the ways of a profile whose names begin with one of `ways`; without a draft model type `draft` is
    skipped."""
    for way in (*WAYS, *(FEW_SLOTS if deterministic else FEW_CELLS)):
        if way.name.startswith(tuple(ways.split(","))) and (draft or way.types != ("draft",)):
            yield way


async def compare(options: argparse.Namespace) -> dict[str, WayResult]:
    """Returns the result of each way by its name."""
    deterministic = options.profile == "deterministic"
    async with Engine.open(config(ALONE, options.model, None, deterministic=deterministic)) as engine:
        requests = requests_of(engine, options.requests, options.tokens)
    series = Series(options.model, options.model_draft, deterministic, requests)
    outcomes: dict[str, WayResult] = {}
    for way in (ALONE, *chosen(options.ways, options.model_draft, deterministic=deterministic)):
        outcomes[way.name] = await series.run(way)
        print(way.name, *outcomes[way.name].row(), flush=True)
    return outcomes


def main() -> None:
    """Prints a table, writes it as JSON, and exits with 1 if an output differs in the deterministic profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("-md", "--model-draft", type=Path, help="GGUF file of a draft model")
    parser.add_argument("--requests", type=int, default=40, help=f"requests of each way, at most {MAX_REQUESTS}")
    parser.add_argument("--tokens", type=int, default=24, help="maximum tokens of each output")
    parser.add_argument(
        "--profile", choices=["deterministic", "default", "both"], default="deterministic", help="profile of the engine"
    )
    parser.add_argument("--ways", default="", help="prefixes of names of ways, separated by commas; all if empty")
    options = parser.parse_args()
    if not 0 < options.requests <= MAX_REQUESTS:
        parser.error(f"--requests is {options.requests}, expected 1 to {MAX_REQUESTS}")
    if options.profile == "both":  # a process each, since the library chooses its kernels once
        command = [sys.executable, "-m", "bench.exactness", *sys.argv[1:], "--profile"]
        sys.exit(max(subprocess.run([*command, profile]).returncode for profile in ("deterministic", "default")))
    outcomes = asyncio.run(compare(options))
    title = f"{options.model.stem}, {options.profile} profile, {options.requests} requests"
    show(title, _COLUMNS, [[name, *outcome.row()] for name, outcome in outcomes.items()])
    save(f"exactness_{options.profile}_{options.model.stem}", outcomes)
    if options.profile == "deterministic" and any(outcome.equal < options.requests for outcome in outcomes.values()):
        sys.exit("An output depends on how it is served.")


if __name__ == "__main__":
    main()
