"""Compares speculation with none, by workload and number of clients: `python -m bench.grid -m target.gguf [-md
draft.gguf]`.

One engine serves all runs; each run has a cache salt of its own, so that it reuses no prefix or output of another run.
In each round every setting gets the same prompts, and the order of the settings alternates. A ratio compares two runs
of one round; the table has the medians over the rounds. On a shared machine many short rounds are more reliable than a
few long ones. Tokens per second are completion tokens divided by the time of the whole run, prefill included.

A setting is `none`, `auto`, a type of proposer (draft lengths from measured costs), `type:n` (always n tokens), or
`synthetic:p`: drafts of the target's recorded output in which each token is right with probability p.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import count, cycle, islice, product
from pathlib import Path
from random import Random
from statistics import median

import msgspec
from msgspec import Struct
from rich.progress import Progress

from api.schema.requests import ChatRequest
from api.templates.prompts import PromptRenderer
from bench import prompts
from bench.client import Outcome, run_closed_loop
from bench.figures import OUT, markdown, percentile, plot, save, show
from bench.models import SOURCES
from bench.simulated import SyntheticProposer
from engine.config import EngineConfig
from engine.contract import Request, SamplingParams, Speculation, Tokens
from engine.engine import Engine
from engine.speculate import Proposer

_WORKLOADS = ("edit", "chat", "completion", "copy")
_SETTINGS = ("none", "prediction:16", "suffix:8", "suffix:16", "ngram-cache:8", "ngram-map-k:16", "auto")
_DRAFT_MODEL_SETTINGS = ("draft:3", "draft:8", "auto")
# Upper bound of prompts: those of `copy` are the longest, some 1,100 tokens with the chat template.
_PROMPT_TOKENS = 1152
_GREEDY = SamplingParams(temperature=0.0)


class RunFigures(Struct):
    """The figures of one run; gaps are milliseconds between consecutive events of a request."""

    tokens_per_second: float
    drafted: int
    accepted: int
    gap_p50: float
    gap_p99: float
    seconds: float
    ratio: float = 1.0
    """Tokens per second relative to `none` in the same round."""


class Prompt(Struct, frozen=True):
    """The tokens of a prompt and of the client's prediction."""

    tokens: tuple[int, ...]
    prediction: tuple[int, ...] = ()


def workload(engine: Engine, name: str, number: int) -> list[Prompt]:
    """Returns `number` prompts of a workload; a workload with fewer prompts is repeated."""
    problems = prompts.human_eval()
    if name == "completion":
        texts = prompts.completion(problems)
        return [Prompt(tuple(engine.vocab.tokenize(text, special=True))) for text in islice(cycle(texts), number)]
    renderer = PromptRenderer(engine.info, engine.vocab)
    conversations = {"edit": prompts.edit(problems), "chat": prompts.chat(), "copy": prompts.copy(problems)}[name]
    expected = [problem.code for problem in problems] if name == "edit" else [""]
    return [
        Prompt(
            renderer.tokenize(renderer.render(msgspec.convert({"messages": messages}, ChatRequest))),
            tuple(engine.vocab.tokenize(text, special=False)),
        )
        for messages, text in islice(zip(cycle(conversations), cycle(expected), strict=False), number)
    ]


class RecordedOutputs:
    """The first output of the target for each prompt."""

    def __init__(self) -> None:
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def record(self, prompt: tuple[int, ...], tokens: Sequence[int]) -> None:
        """Stores the output of a prompt unless the prompt has one."""
        self._answers.setdefault(prompt, [*tokens])

    def sequence(self, prompt: tuple[int, ...]) -> KnownOutput:
        """Returns prompt and output as one sequence."""
        return KnownOutput([*prompt, *self._answers.get(prompt, ())])


class KnownOutput:
    """A fixed sequence of tokens, followed by zeros."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def prefix(self, length: int) -> list[int]:
        """Returns the first `length` tokens."""
        return self._tokens[:length] + [0] * (length - len(self._tokens))


def speculation(setting: str) -> Speculation:
    """Returns the speculation of a request with `setting`. Raises msgspec.ValidationError for an unknown type."""
    kind, _, length = setting.partition(":")
    if kind == "none":
        return Speculation()
    if kind == "synthetic" or not length:
        return msgspec.convert({"type": ["auto" if kind == "synthetic" else kind]}, Speculation)
    return msgspec.convert({"type": [kind], "n_max": int(length), "order": "fixed"}, Speculation)


class Grid:
    """Runs the cells of the grid on one engine."""

    def __init__(self, engine: Engine, outputs: RecordedOutputs, tokens: int) -> None:
        self._engine = engine
        self._outputs = outputs
        self._tokens = tokens
        self._runs = count()

    async def run(self, setting: str, sent: Sequence[Prompt], clients: int) -> RunFigures:
        """Sends a request for each prompt from `clients` clients in a closed loop."""
        salt = f"run {next(self._runs)}"
        requests = (self._request(setting, prompt, salt) for prompt in sent)
        begun = time.perf_counter()
        outcomes = await run_closed_loop(clients, requests, self._send)
        seconds = time.perf_counter() - begun
        gaps = [1000 * gap for outcome in outcomes for gap in outcome.gaps]
        return RunFigures(
            sum(outcome.completion_tokens for outcome in outcomes) / seconds,
            sum(outcome.draft_tokens for outcome in outcomes),
            sum(outcome.accepted_tokens for outcome in outcomes),
            percentile(gaps, 0.5),
            percentile(gaps, 0.99),
            seconds,
        )

    async def round(self, settings: Sequence[str], sent: Sequence[Prompt], clients: int) -> dict[str, RunFigures]:
        """Returns the figures of a run of each setting, with the ratios to `none`, which must be one of them."""
        runs = {setting: await self.run(setting, sent, clients) for setting in settings}
        for figures in runs.values():
            figures.ratio = figures.tokens_per_second / runs["none"].tokens_per_second
        return runs

    def _request(self, setting: str, prompt: Prompt, salt: str) -> Request:
        """Returns a request with the setting as its `id`; the rate of a synthetic proposer is parsed from the id."""
        return Request(
            prompt=prompt.tokens,
            prediction=prompt.prediction if setting.startswith("prediction") else (),
            max_tokens=self._tokens,
            sampling=_GREEDY,
            salt=salt,
            speculation=speculation(setting),
            id=setting,
        )

    async def _send(self, request: Request) -> Outcome:
        outcome, tokens = Outcome(time.perf_counter()), list[int]()
        async with self._engine.generate(request) as updates:
            async for update in updates:
                if isinstance(update, Tokens):
                    outcome.arrivals.append(time.perf_counter())
                    tokens += update.ids
                else:
                    usage = update.usage
                    outcome.completion_tokens = usage.completion
                    outcome.draft_tokens, outcome.accepted_tokens = usage.drafted, usage.accepted
        self._outputs.record(request.prompt, tokens)
        return outcome


# Rounds by workload, clients and setting.
GridRounds = dict[str, dict[int, dict[str, list[RunFigures]]]]


async def measure(
    options: argparse.Namespace, settings: Sequence[str], outputs: RecordedOutputs, *, synthetic: bool
) -> GridRounds:
    """Measures all cells, round after round, and saves the results after each round."""
    config = EngineConfig.of(
        path=options.model,
        slots=max(options.clients),
        context=max(options.clients) * (_PROMPT_TOKENS + options.tokens),
        kv_unified=options.kv == "unified",
        draft={"path": str(options.model_draft), "n_max": 16} if options.model_draft and not synthetic else {},
    )

    def proposers(request: Request) -> Mapping[str, Proposer]:
        kind, _, rate = request.id.partition(":")
        if kind != "synthetic":
            return {}
        known = outputs.sequence(request.prompt)
        return {request.id: SyntheticProposer(known, lambda: float(rate), Random(0))}

    cells: GridRounds = {}
    async with Engine.open(config, proposer_factory=proposers if synthetic else None) as engine:
        grid = Grid(engine, outputs, options.tokens)
        total = len(options.workloads) * len(options.clients) * options.rounds * len(settings)
        with Progress() as progress:
            bar = progress.add_task("warming up", total=total)
            for name, clients in product(options.workloads, options.clients):
                requests_per_run = max(options.least, clients * options.each)
                prompts = workload(engine, name, requests_per_run * options.rounds)
                await grid.run("none", prompts[:1], 1)
                rounds = cells.setdefault(name, {}).setdefault(clients, {})
                for number in range(options.rounds):
                    progress.update(bar, description=f"{name}, {clients} clients", completed=num_runs(cells))
                    # A synthetic proposer needs the output of the run with `none`.
                    order = settings if synthetic or number % 2 == 0 else settings[::-1]
                    runs = await grid.round(
                        order, prompts[number * requests_per_run : (number + 1) * requests_per_run], clients
                    )
                    for setting, figures in runs.items():
                        rounds.setdefault(setting, []).append(figures)
                    save(options.name, {"settings": settings, "cells": cells})
            progress.update(bar, completed=total)
    return cells


def num_runs(cells: GridRounds) -> int:
    """Returns the number of completed runs."""
    return sum(len(rounds) for workloads in cells.values() for by in workloads.values() for rounds in by.values())


def median_figures(rounds: Sequence[RunFigures]) -> RunFigures:
    """Returns the medians of several rounds."""
    columns = zip(*map(msgspec.structs.astuple, rounds), strict=True)
    speed, drafted, accepted, *others = (median(column) for column in columns)
    return RunFigures(speed, int(drafted), int(accepted), *others)


_COLUMNS = ("workload", "clients", "setting", "tokens/s", "ratio to none", "accepted", "gap p50 ms", "p99 ms")


def rows(cells: GridRounds) -> list[list[object]]:
    """Returns the rows of medians under `_COLUMNS`."""
    table: list[list[object]] = []
    for name, by_clients in cells.items():
        for clients, by_setting in by_clients.items():
            for setting, rounds in by_setting.items():
                one = median_figures(rounds)
                share = f"{one.accepted} of {one.drafted}"
                table.append(
                    [name, clients, setting, one.tokens_per_second, one.ratio, share, one.gap_p50, one.gap_p99]
                )
    return table


def main() -> None:
    """Prints the table, and writes it as JSON, as Markdown and as a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file of the target")
    parser.add_argument("-md", "--model-draft", type=Path, help="GGUF file of a draft model")
    parser.add_argument("--workloads", default=",".join(_WORKLOADS), help="workloads, separated by commas")
    parser.add_argument("--clients", default="1,2,4,8,16", help="numbers of concurrent clients, separated by commas")
    parser.add_argument(
        "--settings", default="", help="settings, separated by commas; the setting `none` is always included"
    )
    parser.add_argument(
        "--synthetic",
        default="",
        help="measure only synthetic proposers with these probabilities of a right token, such as 0,0.5,0.8",
    )
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each cell")
    parser.add_argument("--each", type=int, default=1, help="requests of each client")
    parser.add_argument("--least", type=int, default=4, help="minimum requests of a run")
    parser.add_argument("--tokens", type=int, default=128, help="maximum tokens of each output")
    parser.add_argument("--kv", choices=["per-slot", "unified"], default="per-slot", help="KV layout")
    parser.add_argument("--name", default="grid", help="name of the result files")
    options = parser.parse_args()
    options.workloads = options.workloads.split(",")
    options.clients = [int(number) for number in options.clients.split(",")]
    rates = [f"synthetic:{rate}" for rate in options.synthetic.split(",") if rate]
    usual = [*_SETTINGS, *(_DRAFT_MODEL_SETTINGS if options.model_draft else ())]
    chosen = rates or (options.settings.split(",") if options.settings else usual)
    settings = [*dict.fromkeys(["none", *chosen])]
    cells = asyncio.run(measure(options, settings, RecordedOutputs(), synthetic=bool(rates)))
    title = (
        f"{options.model.stem}: {options.rounds} rounds, {options.kv} KV, at most {options.tokens} tokens of an output"
    )
    show(title, _COLUMNS, rows(cells))
    (OUT / f"{options.name}.md").write_text(markdown(_COLUMNS, rows(cells)))
    lines = {
        f"{name}, {setting}": [(clients, median_figures(runs[setting]).ratio) for clients, runs in by_clients.items()]
        for name, by_clients in cells.items()
        for setting in settings
        if setting != "none"
    }
    plot(options.name, title, "clients", "tokens per second, relative to no drafts", lines)


if __name__ == "__main__":
    main()
