"""Proposers by workload by clients, against none: `python -m bench.grid -m target.gguf [-md draft.gguf]`.

One engine serves all runs; the requests of a run name their proposer and have a salt of their own, so that no run
finds prefixes or outputs of another. The settings take turns and the rounds run in alternating order, each with prompts
of its own; a ratio compares two runs of one round, and the median of the rounds counts. On a shared machine many short
rounds are more reliable than a few long ones. Tokens per second are completion tokens divided by the time of the whole
run, prompts included.

A setting is `none`, `auto`, a type (measured lengths), `type:n` (always n tokens), or `synthetic:p`: a drafter that
knows the target's output and is wrong with chance 1 - p at each token (`synthetic:0` is always wrong).
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
from api.templates.prompts import Prompts
from bench import prompts
from bench.client import Outcome, closed
from bench.figures import OUT, markdown, percentile, plot, save, show
from bench.models import SOURCES
from bench.simulated import Synthetic
from engine.config import EngineConfig
from engine.contract import Finished, Request, SamplingParams, Speculation, Tokens
from engine.engine import Engine
from engine.speculate import Proposer

WORKLOADS = ("edit", "chat", "completion", "copy")
SETTINGS = ("none", "prediction:16", "suffix:8", "suffix:16", "ngram-cache:8", "ngram-map-k:16", "auto")
OF_MODEL = ("draft:3", "draft:8", "auto")
GREEDY = SamplingParams(temperature=0.0)


class Figures(Struct):
    """Result of one run. Gaps are milliseconds between the events of a request."""

    tokens_per_second: float
    drafted: int
    accepted: int
    gap_p50: float
    gap_p99: float
    seconds: float
    ratio: float = 1.0
    """Tokens per second relative to `none` in the same round."""


class Prompt(Struct, frozen=True):
    """The tokens of a request, and those of the client's prediction."""

    tokens: tuple[int, ...]
    predicted: tuple[int, ...] = ()


def workload(engine: Engine, name: str, number: int) -> list[Prompt]:
    """Returns `number` prompts of a workload, repeated if it has fewer."""
    problems = prompts.human_eval()
    if name == "completion":
        texts = prompts.completion(problems)
        return [Prompt(tuple(engine.vocab.tokenize(text, special=True))) for text in islice(cycle(texts), number)]
    made = Prompts(engine.info, engine.vocab)
    asked = {"edit": prompts.edit(problems), "chat": prompts.chat(), "copy": prompts.copy(problems)}[name]
    expected = [problem.code for problem in problems] if name == "edit" else [""]
    return [
        Prompt(
            made.tokens(made.render(msgspec.convert({"messages": messages}, ChatRequest))),
            tuple(engine.vocab.tokenize(text, special=False)),
        )
        for messages, text in islice(zip(cycle(asked), cycle(expected), strict=False), number)
    ]


class Said:
    """The target's outputs by prompt."""

    def __init__(self) -> None:
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def heard(self, prompt: tuple[int, ...], tokens: Sequence[int]) -> None:
        """Records the output of a prompt."""
        self._answers.setdefault(prompt, [*tokens])

    def text(self, prompt: tuple[int, ...]) -> Known:
        """Returns prompt and output as one text, followed by zeros."""
        return Known([*prompt, *self._answers.get(prompt, ())])


class Known:
    """A text for a synthetic drafter."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def upto(self, length: int) -> list[int]:
        """Returns the first tokens."""
        return self._tokens[:length] + [0] * (length - len(self._tokens))


def speculation(setting: str) -> Speculation:
    """Returns the speculation of a request with `setting`. Raises msgspec.ValidationError if there is no such type."""
    kind, _, length = setting.partition(":")
    if kind == "none":
        return Speculation()
    if kind == "synthetic" or not length:
        return msgspec.convert({"type": ["auto" if kind == "synthetic" else kind]}, Speculation)
    return msgspec.convert({"type": [kind], "n_max": int(length), "order": "fixed"}, Speculation)


class Grid:
    """Runs the cells of the grid on one engine."""

    def __init__(self, engine: Engine, said: Said, tokens: int) -> None:
        self._engine = engine
        self._said = said
        self._tokens = tokens
        self._runs = count()

    async def run(self, setting: str, asked: Sequence[Prompt], clients: int) -> Figures:
        """Runs all of `asked` from `clients` clients; each sends its next request when the last was answered."""
        salt = f"run {next(self._runs)}"
        sends = (self._request(setting, prompt, salt) for prompt in asked)
        begun = time.perf_counter()
        outcomes = await closed(clients, sends, self._send)
        seconds = time.perf_counter() - begun
        gaps = [1000 * gap for outcome in outcomes for gap in outcome.gaps]
        return Figures(
            sum(outcome.completion_tokens for outcome in outcomes) / seconds,
            sum(outcome.drafted for outcome in outcomes),
            sum(outcome.accepted for outcome in outcomes),
            percentile(gaps, 0.5),
            percentile(gaps, 0.99),
            seconds,
        )

    async def round(self, settings: Sequence[str], asked: Sequence[Prompt], clients: int) -> dict[str, Figures]:
        """Returns a run of each setting, `none` among them, with the ratios to that."""
        ran = {setting: await self.run(setting, asked, clients) for setting in settings}
        for figures in ran.values():
            figures.ratio = figures.tokens_per_second / ran["none"].tokens_per_second
        return ran

    def _request(self, setting: str, prompt: Prompt, salt: str) -> Request:
        """Returns a request whose `id` is the setting, which names the rate of a synthetic drafter."""
        predicted = prompt.predicted if setting.startswith("prediction") else ()
        return Request(
            prompt=prompt.tokens,
            prediction=predicted,
            max_tokens=self._tokens,
            sampling=GREEDY,
            salt=salt,
            speculation=speculation(setting),
            id=setting,
        )

    async def _send(self, request: Request) -> Answer:
        answer, tokens = Answer(time.perf_counter()), list[int]()
        async with self._engine.generate(request) as updates:
            async for update in updates:
                if isinstance(update, Tokens):
                    answer.arrivals.append(time.perf_counter())
                    tokens += update.ids
                else:
                    answer.take(update)
        self._said.heard(request.prompt, tokens)
        return answer


class Answer(Outcome):
    """Result of one request, with the counts of its drafts."""

    drafted: int = 0
    accepted: int = 0

    def take(self, end: Finished) -> None:
        """Takes the counts of the end."""
        self.completion_tokens = end.usage.completion
        self.drafted, self.accepted = end.usage.drafted, end.usage.accepted


Cells = dict[str, dict[int, dict[str, list[Figures]]]]
"""Rounds by workload, clients and setting."""


async def measure(options: argparse.Namespace, settings: Sequence[str], said: Said, *, synthetic: bool) -> Cells:
    """Measures all cells, round after round, and saves the results after each."""
    config = EngineConfig.of(
        path=options.model,
        slots=max(options.clients),
        context=max(options.clients) * 1024,
        kv_unified=options.kv == "unified",
        draft={"path": str(options.model_draft), "n_max": 16} if options.model_draft and not synthetic else {},
    )

    def proposers(request: Request) -> Mapping[str, Proposer]:
        kind, _, rate = request.id.partition(":")
        if kind != "synthetic":
            return {}
        return {request.id: Synthetic(said.text(request.prompt), lambda: float(rate), Random(0))}

    cells: Cells = {}
    async with Engine.open(config, speculate=proposers if synthetic else None) as engine:
        grid = Grid(engine, said, options.tokens)
        total = len(options.workloads) * len(options.clients) * options.rounds * len(settings)
        with Progress() as progress:
            bar = progress.add_task("warming up", total=total)
            for name, clients in product(options.workloads, options.clients):
                each = max(options.least, clients * options.each)
                asked = workload(engine, name, each * options.rounds)
                await grid.run("none", asked[:1], 1)
                rounds = cells.setdefault(name, {}).setdefault(clients, {})
                for number in range(options.rounds):
                    progress.update(bar, description=f"{name}, {clients} clients", completed=total_of(cells))
                    # A synthetic drafter needs the output of a run without it.
                    order = settings if synthetic or number % 2 == 0 else settings[::-1]
                    ran = await grid.round(order, asked[number * each : (number + 1) * each], clients)
                    for setting, figures in ran.items():
                        rounds.setdefault(setting, []).append(figures)
                    save(options.name, {"settings": settings, "cells": cells})
            progress.update(bar, completed=total)
    return cells


def total_of(cells: Cells) -> int:
    """Returns the number of runs so far."""
    return sum(len(rounds) for of in cells.values() for by in of.values() for rounds in by.values())


def middle(rounds: Sequence[Figures]) -> Figures:
    """Returns the medians of several rounds."""
    values = [msgspec.structs.astuple(figures) for figures in rounds]
    drafted, accepted = (int(median(column)) for column in [*zip(*values, strict=True)][1:3])
    others = [float(median(column)) for column in zip(*values, strict=True)]
    return Figures(others[0], drafted, accepted, *others[3:])


COLUMNS = ("workload", "clients", "setting", "tokens/s", "to none", "accepted", "gap p50 ms", "p99 ms")


def rows(cells: Cells) -> list[list[object]]:
    """Returns the table with the columns `COLUMNS`."""
    table: list[list[object]] = []
    for name, by_clients in cells.items():
        for clients, by_setting in by_clients.items():
            for setting, rounds in by_setting.items():
                of = middle(rounds)
                share = f"{of.accepted} of {of.drafted}"
                table.append([name, clients, setting, of.tokens_per_second, of.ratio, share, of.gap_p50, of.gap_p99])
    return table


def main() -> None:
    """Prints the table, and writes it as JSON, as Markdown and as a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file of the target")
    parser.add_argument("-md", "--model-draft", type=Path, help="GGUF file of a draft model")
    parser.add_argument("--workloads", default="edit,chat,completion,copy", help="separated by commas")
    parser.add_argument("--clients", default="1,2,4,8,16", help="the same")
    parser.add_argument("--settings", default="", help="the same; none comes first by itself")
    parser.add_argument(
        "--synthetic", default="", help="chances of synthetic drafters, as 0,0.5,0.8; nothing else runs"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of each cell")
    parser.add_argument("--each", type=int, default=1, help="requests of each client")
    parser.add_argument("--least", type=int, default=4, help="requests of a run at least")
    parser.add_argument("--tokens", type=int, default=128, help="of each output at most")
    parser.add_argument("--kv", choices=["per-slot", "unified"], default="per-slot", help="KV layout")
    parser.add_argument("--name", default="grid", help="of the files")
    options = parser.parse_args()
    options.workloads = options.workloads.split(",")
    options.clients = [int(number) for number in options.clients.split(",")]
    rates = [f"synthetic:{rate}" for rate in options.synthetic.split(",") if rate]
    usual = [*SETTINGS, *(OF_MODEL if options.model_draft else ())]
    chosen = rates or (options.settings.split(",") if options.settings else usual)
    settings = [*dict.fromkeys(["none", *chosen])]
    cells = asyncio.run(measure(options, settings, Said(), synthetic=bool(rates)))
    title = (
        f"{options.model.stem}: {options.rounds} rounds, {options.kv} KV, at most {options.tokens} tokens of an output"
    )
    show(title, COLUMNS, rows(cells))
    (OUT / f"{options.name}.md").write_text(markdown(COLUMNS, rows(cells)))
    lines = {
        f"{name}, {setting}": [(clients, middle(by_setting[setting]).ratio) for clients, by_setting in of.items()]
        for name, of in cells.items()
        for setting in settings
        if setting != "none"
    }
    plot(options.name, title, "clients", "tokens per second, relative to no drafts", lines)


if __name__ == "__main__":
    main()
