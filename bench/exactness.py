"""Compares token ids and log probabilities of the same requests, served with many setups.

The reference is the output of each request served alone, without speculation, with its prompt prefilled in one step.
With the deterministic profile every other setup must give bit-equal results; otherwise the exit code is 1. With the
default profile the table shows the differences.
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

# Consecutive requests cycle through these workloads.
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
EAGER_SPECULATION = {"order": "fixed", "size_n": 3, "size_m": 8, "mod_match": 3, "mod_min": 0}


class RequestOutput(Struct, frozen=True):
    """The tokens of a request, with their log probabilities."""

    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    usage: Usage


class ServingSetup(Struct, frozen=True):
    """The clients, the speculation and the memory with which one engine serves the requests, in a closed loop."""

    name: str
    """The first letter names the group."""
    clients: int = 4
    types: tuple[str, ...] = ()
    """Types of speculation. Every request has a prediction with `prediction`, every second request with `auto`; a
    prediction is the reference output with errors."""
    shares: bool = True
    """False if each request has a cache salt of its own."""
    times: int = 1
    """Number of times that each request is sent, one time after the other."""
    rows: int = 0
    """Maximum prefill rows of a step; 0 means the scheduler's choice."""
    slots: int = 0
    """Number of slots; 0 means one for each client."""
    cells: int = 0
    """Cells of unified KV; 0 means per-slot KV with `_SLOT_CELLS` cells for each slot."""
    preempt: float = 0.0
    """Probability that an update of a request is followed by a preemption."""


ALONE = ServingSetup("a alone", clients=1, shares=False, rows=2**20)
SETUPS = (
    *(ServingSetup(f"b {kind}", types=(kind,)) for kind in PROPOSER_TYPES if kind not in ("grammar", "draft-mtp")),
    ServingSetup("c auto", types=("auto",)),
    *(ServingSetup(f"d {clients} at once", clients=clients) for clients in (1, 3, 8, 16)),
    *(ServingSetup(f"e {rows} rows", rows=rows) for rows in (5, 33, 200)),
    ServingSetup("f sent twice", times=2),
    ServingSetup("g preempted", types=("auto",), preempt=0.2),
)
# For the deterministic profile, which has per-slot KV: slots are overwritten, and their states saved and restored.
FEW_SLOT_SETUPS = (
    ServingSetup("g 2 slots", clients=8, slots=2),
    ServingSetup("g 1 slot, auto", clients=8, slots=1, types=("auto",)),
)
# For the default profile with unified KV: sequences are preempted, and KV blocks saved and restored.
FEW_CELL_SETUPS = (
    ServingSetup("g 512 cells", clients=8, cells=512),
    ServingSetup("g 256 cells, auto", clients=8, cells=256, types=("auto",)),
)


# ── requests ──


def requests_of(engine: Engine, count: int, tokens: int) -> list[Request]:
    """Returns requests of alternating workloads, the shortest prompts of each first; every second request is
    sampled."""
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


def requests_for(setup: ServingSetup, requests: Sequence[Request], reference: Sequence[RequestOutput]) -> list[Request]:
    """Returns the requests with the salts and predictions of a setup; without a reference there are no predictions."""
    step = 1 if "prediction" in setup.types else 2 if "auto" in setup.types else 0
    sent = [structs.replace(request, salt="" if setup.shares else request.id) for request in requests]
    for number in range(0, len(reference) if step else 0, step or 1):
        sent[number] = structs.replace(sent[number], prediction=with_errors(reference[number].ids))
    return sent


def with_errors(ids: Sequence[int]) -> tuple[int, ...]:
    """Returns the ids with one in WRONG_EVERY replaced by 0."""
    return tuple(0 if position % WRONG_EVERY == WRONG_EVERY - 1 else token for position, token in enumerate(ids))


# ── serving ──


async def serve(engine: Engine, setup: ServingSetup, requests: Sequence[Request]) -> list[list[RequestOutput]]:
    """Returns the outputs of each request. The order of requests is shuffled; clients pause before each request."""
    rng = Random(setup.name)
    outputs: list[list[RequestOutput]] = [[] for _ in requests]
    order = iter(rng.sample(range(len(requests)), len(requests)))

    async def updated() -> None:
        if rng.random() < setup.preempt:
            await engine.query(preempt_one)

    async def client() -> None:
        for number in order:
            for _ in range(setup.times):
                await asyncio.sleep(rng.expovariate(1 / _PAUSE_SECONDS))
                outputs[number].append(await collect(engine, requests[number], updated))

    await asyncio.gather(*(client() for _ in range(setup.clients)))
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


def config(setup: ServingSetup, model: Path, draft: Path | None, *, deterministic: bool) -> EngineConfig:
    """Returns the engine's configuration for a setup."""
    slots = setup.slots or setup.clients
    has_draft = draft is not None and bool({"auto", "draft"} & set(setup.types))
    return EngineConfig.of(
        path=model,
        deterministic=deterministic,
        slots=slots,
        context=setup.cells or _SLOT_CELLS * slots,
        kv_unified=bool(setup.cells),
        speculation={"types": setup.types, **EAGER_SPECULATION},
        draft={"path": str(draft), "n_max": 4} if has_draft else {},
    )


def prompt_rows(rows: int) -> AbstractContextManager[object]:
    """Returns a context manager that limits the prefill rows of a step; 0 means no limit."""
    return patch.object(StepCost, "prompt_rows", lambda *_, **__: rows) if rows else nullcontext()


# ── comparison ──


class SetupResult(Struct, frozen=True):
    """The comparison of one setup's outputs with the reference."""

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
_COLUMNS = ("setup", "tokens", "equal", "other", "from", "drift", "cached", "drafted", "accepted", "preempted", "s")


def compare_outputs(expected: RequestOutput, output: RequestOutput) -> tuple[int | None, float]:
    """Returns the position of the first differing token, and the largest difference of a log probability before it.

    The position is `None` if all tokens are equal.
    """
    same = num_matching(expected.ids, output.ids)
    drift = 0.0
    for left, right in zip(expected.logprobs[:same], output.logprobs[:same], strict=True):
        output_logprobs = {**dict(right.top), right.token: right.logprob}
        expected_logprobs = {**dict(left.top), left.token: left.logprob}
        drift = max(
            drift,
            *(
                abs(expected_logprobs[token] - output_logprobs[token])
                for token in expected_logprobs.keys() & output_logprobs.keys()
            ),
        )
    return None if same == len(expected.ids) == len(output.ids) else same, drift


class SetupComparison(Struct):
    """Runs setups one after the other; the outputs of the first setup are the reference of the others."""

    model: Path
    draft: Path | None
    deterministic: bool
    requests: Sequence[Request]
    reference: Sequence[RequestOutput] = ()

    async def run(self, setup: ServingSetup) -> SetupResult:
        """Serves the requests with one setup and returns the comparison."""
        opened = Engine.open(config(setup, self.model, self.draft, deterministic=self.deterministic))
        with prompt_rows(setup.rows):
            async with opened as engine:
                sent = requests_for(setup, self.requests, self.reference)
                begun = time.perf_counter()
                outputs = await serve(engine, setup, sent)
                seconds = time.perf_counter() - begun
                stats = engine.stats()
        self.reference = self.reference or [first for first, *_ in outputs]
        return self.outcome(outputs, stats.preemptions, seconds)

    def outcome(self, outputs: Sequence[Sequence[RequestOutput]], preemptions: int, seconds: float) -> SetupResult:
        """Returns the comparison of the outputs with the reference."""
        equal, drift, differing = 0, 0.0, dict[str, int]()
        for request, expected, answers in zip(self.requests, self.reference, outputs, strict=True):
            equal += all((now.ids, now.logprobs) == (expected.ids, expected.logprobs) for now in answers)
            for now in answers:
                position, difference = compare_outputs(expected, now)
                drift = max(drift, difference)
                if position is not None:
                    differing[request.id] = min(position, differing.get(request.id, position))
        all_outputs = [now for answers in outputs for now in answers]
        sums = {
            name: sum(getattr(now.usage, name) for now in all_outputs)
            for name in ("completion", "cached", "drafted", "accepted")
        }
        return SetupResult(equal, differing, drift, preemptions, seconds, **sums)


def selected_setups(prefixes: str, draft: Path | None, *, deterministic: bool) -> Iterator[ServingSetup]:
    """Yields the setups of a profile whose names begin with one of `prefixes`, which are separated by commas.

    Without a draft model the setup with type `draft` is skipped.
    """
    for setup in (*SETUPS, *(FEW_SLOT_SETUPS if deterministic else FEW_CELL_SETUPS)):
        if setup.name.startswith(tuple(prefixes.split(","))) and (draft or setup.types != ("draft",)):
            yield setup


async def compare(options: argparse.Namespace) -> dict[str, SetupResult]:
    """Returns the result of each setup by its name."""
    deterministic = options.profile == "deterministic"
    async with Engine.open(config(ALONE, options.model, None, deterministic=deterministic)) as engine:
        requests = requests_of(engine, options.requests, options.tokens)
    comparison = SetupComparison(options.model, options.model_draft, deterministic, requests)
    outcomes: dict[str, SetupResult] = {}
    for setup in (ALONE, *selected_setups(options.ways, options.model_draft, deterministic=deterministic)):
        outcomes[setup.name] = await comparison.run(setup)
        print(setup.name, *outcomes[setup.name].row(), flush=True)
    return outcomes


def main() -> None:
    """Prints a table, writes it as JSON, and exits with 1 if an output differs in the deterministic profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("-md", "--model-draft", type=Path, help="GGUF file of a draft model")
    parser.add_argument("--requests", type=int, default=40, help=f"requests of each setup, at most {MAX_REQUESTS}")
    parser.add_argument("--tokens", type=int, default=24, help="maximum tokens of each output")
    parser.add_argument(
        "--profile", choices=["deterministic", "default", "both"], default="deterministic", help="profile of the engine"
    )
    parser.add_argument("--ways", default="", help="prefixes of setup names, separated by commas; all setups if empty")
    options = parser.parse_args()
    if not 0 < options.requests <= MAX_REQUESTS:
        parser.error(f"--requests is {options.requests}, expected 1 to {MAX_REQUESTS}")
    if options.profile == "both":  # two processes, since the library chooses its kernels once
        command = [sys.executable, "-m", "bench.exactness", *sys.argv[1:], "--profile"]
        sys.exit(max(subprocess.run([*command, profile]).returncode for profile in ("deterministic", "default")))
    outcomes = asyncio.run(compare(options))
    title = f"{options.model.stem}, {options.profile} profile, {options.requests} requests"
    show(title, _COLUMNS, [[name, *outcome.row()] for name, outcome in outcomes.items()])
    save(f"exactness_{options.profile}_{options.model.stem}", outcomes)
    if options.profile == "deterministic" and any(outcome.equal < options.requests for outcome in outcomes.values()):
        sys.exit("An output depends on how its request is served.")


if __name__ == "__main__":
    main()
