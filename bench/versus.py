"""Paceline, llama-server and llama-cpp-python's example server, side by side: `python -m bench.versus -m model.gguf`.

All servers are up during the whole measurement, with equal threads, context and slots; Paceline has its default flags
otherwise. In each round every server gets the same requests, one server after the other, and the order alternates.
`python -m bench.peers build` comes first. A second table holds the ratios of Paceline's medians over the rounds to
those of llama-server's mode with the most tokens per second, and to those of the best mode for each figure.

With `--bound` the first table has the throughput that the rows of the same requests alone would have, by the cost of a
step as `paceline cost` measures it before each round. With `--stall` the gaps of four running streams are measured
instead, while a long prompt is prefilled.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import Struct
from rich.progress import Progress

from bench.client import Outcome
from bench.example import EXAMPLE, adapted, example_server
from bench.figures import figure, ratios, save, show
from bench.load import closed_loop, measured
from bench.models import SOURCES, Refused
from bench.peers import MODES, PACELINE, TUNED, Settings, started
from bench.report import best, spread
from bench.scenarios import long_prompt
from bench.server import Server
from bench.workloads import PROMPT_TOKENS, WORKLOADS, Asked, Session, workload
from engine import EngineConfig, Measured, open_vocabulary, step_costs
from engine.config import physical_cores
from engine.pace import Curve

CONTENDERS = (PACELINE, *MODES, *TUNED, EXAMPLE)

# The figures of each round by contender.
Rounds = dict[str, list[dict[str, Any]]]

SPEED = "tokens_per_second"


class Field(Struct):
    """The contenders and their settings. `ends` are the model's end tokens, for the example server only."""

    settings: Settings
    names: Sequence[str]
    ends: tuple[int, ...]

    def start(self, name: str) -> AbstractContextManager[Server]:
        """Runs a contender for the length of a block."""
        return example_server(self.settings) if name == EXAMPLE else started(name, self.settings)

    def adapt(self, name: str, session: Session) -> Session:
        """Returns the session with the bodies that the contender supports."""
        return [Asked(asked.path, adapted(asked.body, self.ends_for(name))) for asked in session]

    def order(self, number: int) -> list[str]:
        """Returns the contenders in the order of a round; odd rounds are reversed."""
        return [*self.names] if number % 2 == 0 else [*self.names][::-1]

    def ends_for(self, name: str) -> tuple[int, ...]:
        """Returns the end tokens that a contender needs in its requests."""
        return self.ends if name == EXAMPLE else ()


def run(server: Server, sessions: Sequence[Session], clients: int) -> tuple[dict[str, Any], list[Outcome]]:
    """Measures one contender in one round. Raises RuntimeError if a request fails."""
    cpu = server.cpu_seconds()
    figures, outcomes = measured(closed_loop(server.port, clients, sessions))
    for outcome in outcomes:
        if outcome.failed:
            raise RuntimeError(f"a request failed ({outcome.status}): {outcome.error}")
    figures["server_cpu_seconds"] = server.cpu_seconds() - cpu
    figures["resident_mib"] = server.resident() / 2**20
    figures["prompt_tokens_per_request"] = figures["prompt_tokens"] / max(1, len(outcomes))
    return figures, outcomes


class Running(Struct):
    """A running request of the bound: tokens in cells, and tokens to generate."""

    cells: int
    left: int


def bound(measured: Measured, outcomes: Sequence[Outcome], clients: int) -> float:
    """Returns the tokens per second of the same requests, in the same order, if only rows took time.

    Each client's next prompt is prefilled at once, at the cost of a row of a prompt alone; its last row yields the
    first token. Each step has a row for every client with a request left, so the last steps have fewer rows.
    """
    curve, seconds = Curve(measured.rows), 0.0
    waiting, running = deque(sorted(outcomes, key=lambda outcome: outcome.begun)), list[Running]()
    while waiting or running:
        while waiting and len(running) < clients:
            asked = waiting.popleft()
            seconds += (asked.prompt_tokens - asked.cached_tokens) * measured.prompt_row
            running.append(Running(asked.prompt_tokens, asked.completion_tokens - 1))
        seconds += curve.seconds(len(running))
        seconds += measured.row_cell * len(running) * sum(one.cells for one in running)
        for one in running:
            one.cells, one.left = one.cells + 1, one.left - 1
        running = [one for one in running if one.left > 0]
    return sum(outcome.completion_tokens for outcome in outcomes) / seconds


def throughput(field: Field, options: argparse.Namespace) -> dict[int, Rounds]:
    """Returns the rounds of all contenders and of the bound, by number of clients."""
    cells: dict[int, Rounds] = {}
    with ExitStack() as stack, Progress() as progress:
        bar = progress.add_task("starting", total=len(options.clients) * options.rounds * len(field.names))
        servers: dict[str, Server] = {}
        for name in field.names:
            begun = time.perf_counter()
            servers[name] = stack.enter_context(field.start(name))
            options.start[name] = time.perf_counter() - begun
        for name, server in servers.items():
            warm = workload(options.workload, 1, 8, prompt_tokens=options.prompt_tokens)
            run(server, [field.adapt(name, session) for session in warm], 1)
        asked = 1
        for clients in options.clients:
            rounds = cells[clients] = {name: [] for name in [*field.names, "bound"]}
            each = max(options.least, clients * options.each)
            for number in range(options.rounds):
                sessions = workload(options.workload, each, options.tokens, asked, options.prompt_tokens)
                asked += each
                costs = step_costs(_config(field.settings), lambda share: None) if options.bound else None
                for name in field.order(number):
                    progress.update(bar, description=f"{clients} clients, {name}")
                    adapted_to = [field.adapt(name, session) for session in sessions]
                    figures, outcomes = run(servers[name], adapted_to, clients)
                    rounds[name].append(figures)
                    if costs is not None and name == PACELINE:
                        rounds["bound"].append({SPEED: bound(costs, outcomes, clients)})
                    progress.advance(bar)
                keep(options, field, cells)
    return cells


def _config(settings: Settings) -> EngineConfig:
    """Returns the engine's settings for the step costs of the bound."""
    return EngineConfig.of(
        path=settings.model, context=settings.context, slots=settings.slots, threads=settings.threads
    )


def keep(options: argparse.Namespace, field: Field, cells: object) -> None:
    """Writes the rounds measured so far."""
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | str | list | dict)}
    about = {"model": field.settings.model.name, "flags": " ".join(field.settings.flags())}
    save(options.name, {**about, "options": settings, "cells": cells}, quiet=True)


# ── tables ──


def middle(rounds: Sequence[dict[str, Any]], path: str) -> float:
    """Returns the median of a figure over the rounds; not a number if no round has it."""
    return median(figure(of, path) for of in rounds)


PATHS = ("gap_ms.p50", "gap_ms.p99", "ttft_ms.p50", "ttft_ms.p99", "finish_s.p50", "finish_s.max", "resident_mib")
COLUMNS = ("", "tok/s", "ratio", "gap p50", "gap p99", "TTFT p50", "TTFT p99", "end p50", "end last", "MiB")


def rows(rounds: Rounds) -> list[list[object]]:
    """Returns the rows of medians under `COLUMNS`, a contender a row; gaps and times to first token in milliseconds,
    finish times in seconds."""
    table: list[list[object]] = []
    for name, of in rounds.items():
        if of:
            share = 1 / median(ratios(rounds[PACELINE], of, SPEED))
            values = [middle(of, path) for path in PATHS]
            table.append([name, middle(of, SPEED), share, *("" if isnan(value) else round(value) for value in values)])
    return table


# Title, path and whether less is better.
COMPARED = (
    ("tokens/s", SPEED, False),
    ("gap p99", "gap_ms.p99", True),
    ("time to first token p50", "ttft_ms.p50", True),
    ("time to first token p99", "ttft_ms.p99", True),
    ("end of the last request", "finish_s.max", True),
)
RATIO_COLUMNS = ("", "Paceline", "peer", "mode of the peer", "ratio", "by round")


def ratio_rows(rounds: Rounds) -> list[list[object]]:
    """Returns the rows of ratios under `RATIO_COLUMNS`; none without a mode of llama-server.

    Each figure is compared with that of the mode with the most tokens per second, and with that of the best mode for
    the figure, if it is another. A ratio is Paceline's median to the mode's; `by round` has those within the rounds.
    """
    table: list[list[object]] = []
    fastest = best(rounds, SPEED)
    for title, path, less in COMPARED if fastest else ():
        for mode in dict.fromkeys((fastest, best(rounds, path, least=less))):
            ours, theirs = middle(rounds[PACELINE], path), middle(rounds[mode], path)
            ratio = ours / theirs if theirs else float("nan")
            within = ratios(rounds[PACELINE], rounds[mode], path)
            kind = "fastest" if mode == fastest else "best here"
            where = f"{mode.removeprefix('llama-server-')} ({kind})"
            table.append([title, ours, theirs, where, ratio, spread(within) if within else ""])
    return table


def show_throughput(options: argparse.Namespace, model: str, cells: dict[int, Rounds]) -> None:
    """Prints the medians of all contenders and the ratios, for each number of clients."""
    for clients, rounds in cells.items():
        asked = round(middle(rounds[PACELINE], "prompt_tokens_per_request"))
        title = f"{options.workload}, {model}, {clients} clients, prompts of {asked} tokens on average"
        units = "gap and TTFT (time to first token) in ms, end in s, ratio to Paceline's tok/s"
        show(f"{title}\n{units}", COLUMNS, rows(rounds))
        if table := ratio_rows(rounds):
            show(f"{clients} clients, Paceline to llama-server, ratios of medians", RATIO_COLUMNS, table)


# ── a long prompt beside running streams ──


def stall(field: Field, options: argparse.Namespace) -> dict[str, Rounds]:
    """Returns the rounds of all contenders; in each a long prompt is prefilled beside four running streams."""
    cells: dict[str, Rounds] = {"stall": {name: [] for name in field.names}}
    rounds = cells["stall"]
    for number in range(options.rounds):
        for name in field.order(number):
            with field.start(name) as server:
                change = partial(adapted, ends=field.ends_for(name))
                rounds[name].append(asyncio.run(long_prompt(server, prompt=options.prompt, change=change)))
            print(f"round {number + 1}, {name}: {rounds[name][-1]['largest_gap_while_reading_ms']:.0f} ms", flush=True)
        keep(options, field, cells)
    return cells


def show_stall(rounds: Rounds) -> None:
    """Prints the medians, a contender a line."""
    titles = {
        "median_gap_before_ms": "median gap before, ms",
        "p99_gap_while_reading_ms": "p99 gap during prefill, ms",
        "largest_gap_while_reading_ms": "largest gap during prefill, ms",
        "prompt_seconds": "prefill, s",
    }
    table = [
        [
            name,
            *(middle(of, path) for path in titles),
            1 / median(ratios(rounds[PACELINE], of, "largest_gap_while_reading_ms")),
        ]
        for name, of in rounds.items()
    ]
    show("a long prompt beside four streams", ["", *titles.values(), "largest gap to Paceline's"], table)


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], help="Paceline and these only")
    parser.add_argument("--workload", choices=WORKLOADS, default="chat", help="kind of requests")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="of each prompt of context")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="concurrent clients")
    parser.add_argument("--rounds", type=int, default=3, help="for each number of clients")
    parser.add_argument("--each", type=int, default=2, help="sessions of each client")
    parser.add_argument("--least", type=int, default=4, help="sessions of a run at least")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--context", type=int, default=1024, help="tokens of context for each slot")
    parser.add_argument("--bound", action=argparse.BooleanOptionalAction, default=True, help="measure the bound too")
    parser.add_argument("--stall", action="store_true", help="measure a long prompt beside four streams instead")
    parser.add_argument("--prompt", type=int, default=4000, help="approximate tokens of that prompt")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="threads of each server")
    parser.add_argument("--name", default="", help="of the result file (default: versus or stall)")
    return parser


def main() -> None:
    """Prints the tables and writes the figures as JSON after each round."""
    options = arguments().parse_args()
    options.start = {}  # seconds until each server is healthy
    options.name = options.name or ("stall" if options.stall else "versus")
    slots = 8 if options.stall else max(options.clients)
    each = (options.prompt + 4096) // 2 if options.stall else options.context
    settings = Settings(options.model, slots * each, slots, options.threads)
    names = [name for name in CONTENDERS if name in {PACELINE, *options.only}]
    ends: tuple[int, ...] = ()
    if EXAMPLE in names:
        with open_vocabulary(options.model) as vocab:
            ends = tuple(vocab.ends)
    field = Field(settings, names, ends)
    try:
        if options.stall:
            show_stall(stall(field, options)["stall"])
        else:
            show_throughput(options, settings.model.stem, throughput(field, options))
    except (Refused, RuntimeError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
