"""Compares Paceline, llama-server and llama-cpp-python's example server: `python -m bench.versus -m model.gguf`.

All servers are up during the whole measurement, with equal threads, context and slots; Paceline has its default flags
otherwise. In each round every server gets the same requests, one server after the other, and the order alternates.
`python -m bench.peers build` must have run before. A second table has the ratios of Paceline's medians over the rounds
to the medians of llama-server's fastest mode, and of the best mode for each figure.

With `--bound` the first table has an upper bound: the throughput if only the rows of the same requests took time, by
the cost of a step as measured before each round (see `paceline cost`). `--stall` measures the gaps of four running
streams during the prefill of a long prompt instead.
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
from bench.load import closed_loop, run_measured
from bench.models import SOURCES, SetupError
from bench.peers import MODES, PACELINE, TUNED, Settings, started
from bench.report import best, spread
from bench.scenarios import long_prompt
from bench.scenarios import slot_tokens as long_prompt_slot_tokens
from bench.server import Server
from bench.workloads import PROMPT_TOKENS, WORKLOADS, HttpRequest, Session, slot_tokens, workload
from engine import Calibration, EngineConfig, measure_step_costs, open_vocabulary
from engine.config import physical_cores
from engine.pace import Curve

CONTENDERS = (PACELINE, *MODES, *TUNED, EXAMPLE)

# The figures of each round by contender.
Rounds = dict[str, list[dict[str, Any]]]

SPEED = "tokens_per_second"


class ServerGroup(Struct):
    """The names of the contenders and their common settings. `ends` are the model's end tokens, which only the example
    server needs."""

    settings: Settings
    names: Sequence[str]
    ends: tuple[int, ...]

    def start(self, name: str) -> AbstractContextManager[Server]:
        """Returns a context manager that runs a contender."""
        return example_server(self.settings) if name == EXAMPLE else started(name, self.settings)

    def adapt(self, name: str, session: Session) -> Session:
        """Returns the session with the bodies that the contender supports."""
        ends = self.ends_for(name)
        return [HttpRequest(request.path, adapted(request.body, ends)) for request in session]

    def order(self, number: int) -> list[str]:
        """Returns the contenders in the order of a round; odd rounds are reversed."""
        return [*self.names] if number % 2 == 0 else [*self.names][::-1]

    def ends_for(self, name: str) -> tuple[int, ...]:
        """Returns the end tokens that a contender needs in its requests."""
        return self.ends if name == EXAMPLE else ()


def run(server: Server, sessions: Sequence[Session], clients: int) -> tuple[dict[str, Any], list[Outcome]]:
    """Measures one contender in one round. Raises RuntimeError if a request fails."""
    cpu = server.cpu_seconds()
    figures, outcomes = run_measured(closed_loop(server.port, clients, sessions))
    for outcome in outcomes:
        if outcome.failed:
            raise RuntimeError(f"a request failed ({outcome.status}): {outcome.error}")
    figures["server_cpu_seconds"] = server.cpu_seconds() - cpu
    figures["resident_mib"] = server.resident_bytes() / 2**20
    figures["prompt_tokens_per_request"] = figures["prompt_tokens"] / max(1, len(outcomes))
    return figures, outcomes


class BoundRequest(Struct):
    """A running request in the computation of the bound: its cells, and its tokens left to generate."""

    cells: int
    left: int


def bound(measured: Calibration, outcomes: Sequence[Outcome], clients: int) -> float:
    """Returns the tokens per second of the same requests, in the same order, if only rows took time.

    A prompt is prefilled as soon as a client is free, each row at the cost of a row of a prompt alone, and its last row
    yields the first token. Each step has one row for every client with a request, so the last steps have fewer rows.
    """
    curve, seconds = Curve(measured.rows), 0.0
    waiting, running = deque(sorted(outcomes, key=lambda outcome: outcome.begun)), list[BoundRequest]()
    while waiting or running:
        while waiting and len(running) < clients:
            one = waiting.popleft()
            seconds += (one.prompt_tokens - one.cached_tokens) * measured.prompt_row
            running.append(BoundRequest(one.prompt_tokens, one.completion_tokens - 1))
        seconds += curve.seconds(len(running))
        seconds += measured.row_cell * len(running) * sum(request.cells for request in running)
        for request in running:
            request.cells, request.left = request.cells + 1, request.left - 1
        running = [request for request in running if request.left > 0]
    return sum(outcome.completion_tokens for outcome in outcomes) / seconds


def throughput(group: ServerGroup, options: argparse.Namespace) -> dict[int, Rounds]:
    """Returns the rounds of all contenders and of the bound, by number of clients."""
    cells: dict[int, Rounds] = {}
    with ExitStack() as stack, Progress() as progress:
        bar = progress.add_task("starting", total=len(options.clients) * options.rounds * len(group.names))
        servers: dict[str, Server] = {}
        for name in group.names:
            begun = time.perf_counter()
            servers[name] = stack.enter_context(group.start(name))
            options.start[name] = time.perf_counter() - begun
        for name, server in servers.items():
            warm = workload(options.workload, 1, 8, prompt_tokens=options.prompt_tokens)
            run(server, [group.adapt(name, session) for session in warm], 1)
        used = 1
        for clients in options.clients:
            rounds = cells[clients] = {name: [] for name in [*group.names, "bound"]}
            each = max(options.least, clients * options.each)
            for number in range(options.rounds):
                sessions = workload(options.workload, each, options.tokens, used, options.prompt_tokens)
                used += each
                costs = measure_step_costs(_config(group.settings), lambda share: None) if options.bound else None
                for name in group.order(number):
                    progress.update(bar, description=f"{clients} clients, {name}")
                    adapted_to = [group.adapt(name, session) for session in sessions]
                    figures, outcomes = run(servers[name], adapted_to, clients)
                    rounds[name].append(figures)
                    if costs is not None and name == PACELINE:
                        rounds["bound"].append({SPEED: bound(costs, outcomes, clients)})
                    progress.advance(bar)
                save_rounds(options, group, cells)
    return cells


def _config(settings: Settings) -> EngineConfig:
    """Returns the engine's settings for the step costs of the bound."""
    return EngineConfig.of(
        path=settings.model, context=settings.context, slots=settings.slots, threads=settings.threads
    )


def save_rounds(options: argparse.Namespace, group: ServerGroup, cells: object) -> None:
    """Writes the rounds measured so far."""
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | str | list | dict)}
    about = {"model": group.settings.model.name, "flags": " ".join(group.settings.flags())}
    save(options.name, {**about, "options": settings, "cells": cells}, quiet=True)


# ── tables ──


def median_figure(rounds: Sequence[dict[str, Any]], path: str) -> float:
    """Returns the median of a figure over the rounds; NaN if no round has the figure."""
    return median(figure(turn, path) for turn in rounds)


PATHS = ("gap_ms.p50", "gap_ms.p99", "ttft_ms.p50", "ttft_ms.p99", "finish_s.p50", "finish_s.max", "resident_mib")
COLUMNS = ("", "tok/s", "ratio", "gap p50", "gap p99", "TTFT p50", "TTFT p99", "end p50", "end last", "MiB")


def rows(rounds: Rounds) -> list[list[object]]:
    """Returns a row of medians under `COLUMNS` for each contender: gaps and times to first token in milliseconds,
    finish times in seconds."""
    table: list[list[object]] = []
    for name, runs in rounds.items():
        if runs:
            share = 1 / median(ratios(rounds[PACELINE], runs, SPEED))
            values = ["" if isnan(value := median_figure(runs, path)) else round(value) for path in PATHS]
            table.append([name, median_figure(runs, SPEED), share, *values])
    return table


# Title, path, and True if less is better.
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
    the figure if that is another mode. `ratio` divides Paceline's median by the mode's; `by round` has the ratios
    within the rounds.
    """
    table: list[list[object]] = []
    fastest = best(rounds, SPEED)
    for title, path, less in COMPARED if fastest else ():
        for mode in dict.fromkeys((fastest, best(rounds, path, smallest=less))):
            ours, theirs = median_figure(rounds[PACELINE], path), median_figure(rounds[mode], path)
            ratio = ours / theirs if theirs else float("nan")
            within = ratios(rounds[PACELINE], rounds[mode], path)
            kind = "fastest" if mode == fastest else "best here"
            where = f"{mode.removeprefix('llama-server-')} ({kind})"
            table.append([title, ours, theirs, where, ratio, spread(within) if within else ""])
    return table


def show_throughput(options: argparse.Namespace, model: str, cells: dict[int, Rounds]) -> None:
    """Prints the medians of all contenders and the ratios, for each number of clients."""
    for clients, rounds in cells.items():
        prompt = round(median_figure(rounds[PACELINE], "prompt_tokens_per_request"))
        title = f"{options.workload}, {model}, {clients} clients, prompts of {prompt} tokens on average"
        units = "gap and TTFT (time to first token) in ms, end in s, ratio to Paceline's tok/s"
        show(f"{title}\n{units}", COLUMNS, rows(rounds))
        if table := ratio_rows(rounds):
            show(f"{clients} clients, Paceline to llama-server, ratios of medians", RATIO_COLUMNS, table)


# ── a long prompt beside running streams ──


def stall(group: ServerGroup, options: argparse.Namespace) -> dict[str, Rounds]:
    """Returns the rounds of all contenders; a round runs a long prompt beside four running streams."""
    cells: dict[str, Rounds] = {"stall": {name: [] for name in group.names}}
    rounds = cells["stall"]
    for number in range(options.rounds):
        for name in group.order(number):
            with group.start(name) as server:
                adapt_body = partial(adapted, ends=group.ends_for(name))
                rounds[name].append(asyncio.run(long_prompt(server, prompt=options.prompt, adapt_body=adapt_body)))
            print(f"round {number + 1}, {name}: {rounds[name][-1]['largest_gap_during_prefill_ms']:.0f} ms", flush=True)
        save_rounds(options, group, cells)
    return cells


def show_stall(rounds: Rounds) -> None:
    """Prints a row of medians for each contender."""
    titles = {
        "median_gap_before_ms": "median gap before, ms",
        "p99_gap_during_prefill_ms": "p99 gap during prefill, ms",
        "largest_gap_during_prefill_ms": "largest gap during prefill, ms",
        "prompt_seconds": "prefill, s",
    }
    table = [
        [
            name,
            *(median_figure(runs, path) for path in titles),
            1 / median(ratios(rounds[PACELINE], runs, "largest_gap_during_prefill_ms")),
        ]
        for name, runs in rounds.items()
    ]
    show("a long prompt beside four streams", ["", *titles.values(), "largest gap to Paceline's"], table)


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CONTENDERS,
        default=[*CONTENDERS],
        help="measure only Paceline and these contenders",
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="chat", help="kind of requests")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="tokens of each prompt of context")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="concurrent clients")
    parser.add_argument("--rounds", type=int, default=3, help="rounds for each number of clients")
    parser.add_argument("--each", type=int, default=2, help="sessions of each client")
    parser.add_argument("--least", type=int, default=4, help="minimum sessions of a run")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--context", type=int, default=0, help="tokens of context of each slot; 0 fits the workload")
    parser.add_argument("--bound", action=argparse.BooleanOptionalAction, default=True, help="measure the bound too")
    parser.add_argument("--stall", action="store_true", help="measure a long prompt beside four streams instead")
    parser.add_argument("--prompt", type=int, default=4000, help="approximate tokens of the long prompt of --stall")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="threads of each server")
    parser.add_argument("--name", default="", help="name of the result file (default: versus or stall)")
    return parser


def main() -> None:
    """Prints the tables and writes the figures as JSON after each round."""
    options = arguments().parse_args()
    options.start = {}  # seconds until each server is healthy
    options.name = options.name or ("stall" if options.stall else "versus")
    slots = 8 if options.stall else max(options.clients)
    fitting = long_prompt_slot_tokens(options.prompt)
    if not options.stall:
        fitting = slot_tokens(options.workload, options.tokens, options.prompt_tokens)
    settings = Settings(options.model, slots * (options.context or fitting), slots, options.threads)
    names = [name for name in CONTENDERS if name in {PACELINE, *options.only}]
    ends: tuple[int, ...] = ()
    if EXAMPLE in names:
        with open_vocabulary(options.model) as vocab:
            ends = tuple(vocab.ends)
    group = ServerGroup(settings, names, ends)
    try:
        if options.stall:
            show_stall(stall(group, options)["stall"])
        else:
            show_throughput(options, settings.model.stem, throughput(group, options))
    except (SetupError, RuntimeError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
