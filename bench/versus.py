"""Paceline, llama-server and llama-cpp-python's example server, side by side: `python -m bench.versus -m model.gguf`.

All servers run all the while, with equal threads, context and slots, and take turns: in each round
each is asked the same, and the order alternates. Ratios compare runs of one round; the median of the rounds counts,
and of llama-server's modes the best one. `python -m bench.peers build` comes first.

With the throughput stands the bound: what the rows of the same requests alone would take, by the cost of a step as
`paceline cost` measures it here before each round. With `--stall` instead: the gaps of four running streams while a
long prompt is read.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import Struct, structs
from rich.progress import Progress

from bench.client import Outcome
from bench.example import EXAMPLE, adapted, example_server
from bench.figures import figure, ratios, save, show
from bench.load import closed_loop, measured
from bench.models import SOURCES, Refused
from bench.peers import MODES, PACELINE, TUNED, Settings, started
from bench.scenarios import long_prompt
from bench.server import Server
from bench.workloads import WORKLOADS, Asked, Session, workload
from engine import EngineConfig, Measured, open_vocabulary, step_costs
from engine.config import physical_cores
from engine.pace import Curve

CONTENDERS = (PACELINE, *MODES, *TUNED, EXAMPLE)

Rounds = dict[str, list[dict[str, Any]]]
"""By contender the figures of each round."""


SPEED = "tokens_per_second"


class Field(Struct):
    """Who takes part, and what they run on."""

    settings: Settings
    names: Sequence[str]
    ends: tuple[int, ...]
    """The model's end tokens."""

    def start(self, name: str) -> AbstractContextManager[Server]:
        """A contender, served for the length of a block. Paceline chooses by itself whether attention is flash
        attention; of the others one tries it."""
        if name == PACELINE:
            return started(name, structs.replace(self.settings, flash_attention="auto"))
        return example_server(self.settings) if name == EXAMPLE else started(name, self.settings)

    def adapt(self, name: str, session: Session) -> Session:
        """What it is asked."""
        return [Asked(asked.path, adapted(asked.body, self.ends_for(name))) for asked in session]

    def order(self, number: int) -> list[str]:
        """Who comes after whom in a round: it alternates."""
        return [*self.names] if number % 2 == 0 else [*self.names][::-1]

    def ends_for(self, name: str) -> tuple[int, ...]:
        """The end tokens for who must be told them."""
        return self.ends if name == EXAMPLE else ()


def run(server: Server, sessions: Sequence[Session], clients: int) -> tuple[dict[str, Any], list[Outcome]]:
    """One turn. Raises RuntimeError if a request failed."""
    cpu = server.cpu_seconds()
    figures, outcomes = measured(closed_loop(server.port, clients, sessions))
    for outcome in outcomes:
        if outcome.failed:
            raise RuntimeError(f"a request failed ({outcome.status}): {outcome.error}")
    figures["server_cpu_seconds"] = server.cpu_seconds() - cpu
    figures["resident_mib"] = server.resident() / 2**20
    return figures, outcomes


class Running(Struct):
    """A request of the bound: tokens in cells, and those still to come."""

    cells: int
    left: int


def bound(measured: Measured, outcomes: Sequence[Outcome], clients: int) -> float:
    """Tokens a second if nothing took time but the rows, for the same requests in the order in which they came.

    Each client's next prompt is read at once, at the cost of a row of a prompt read alone; with its last row comes the
    first token. Then a step is a row for each client that still has a request: fewer towards the end, as in life.
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
    """By clients the rounds of all contenders, and of the bound."""
    cells: dict[int, Rounds] = {}
    with ExitStack() as stack, Progress() as progress:
        bar = progress.add_task("starting", total=len(options.clients) * options.rounds * len(field.names))
        servers: dict[str, Server] = {}
        for name in field.names:
            begun = time.perf_counter()
            servers[name] = stack.enter_context(field.start(name))
            options.start[name] = time.perf_counter() - begun
        for name, server in servers.items():
            run(server, [field.adapt(name, session) for session in workload("chat", 1, 8)], 1)
        asked = 1
        for clients in options.clients:
            rounds = cells[clients] = {name: [] for name in [*field.names, "bound"]}
            each = max(options.least, clients * options.each)
            for number in range(options.rounds):
                sessions = workload(options.workload, each, options.tokens, skip=asked)
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
    """How the steps are measured that the bound is made of."""
    return EngineConfig.of(
        path=settings.model, context=settings.context, slots=settings.slots, threads=settings.threads
    )


def keep(options: argparse.Namespace, field: Field, cells: object) -> None:
    """Writes what is measured so far."""
    told = {name: value for name, value in vars(options).items() if isinstance(value, int | str | list | dict)}
    about = {"model": field.settings.model.name, "flags": " ".join(field.settings.flags())}
    save(options.name, {**about, "options": told, "cells": cells}, quiet=True)


def middle(rounds: Sequence[dict[str, Any]], path: str) -> float:
    """The median over rounds of a figure; not a number if there is none."""
    return median(figure(of, path) for of in rounds)


PATHS = ("gap_ms.p50", "gap_ms.p99", "ttft_ms.p50", "server_cpu_seconds", "resident_mib")
COLUMNS = ("clients", "", "tokens/s", "of Paceline's", "gap p50 ms", "p99 ms", "first text ms", "CPU s", "MiB")


def rows(cells: dict[int, Rounds]) -> list[list[object]]:
    """The table under `COLUMNS`."""
    table: list[list[object]] = []
    for clients, rounds in cells.items():
        for name, of in rounds.items():
            if of:
                share = 1 / median(ratios(rounds[PACELINE], of, SPEED))
                table.append([clients, name, middle(of, SPEED), share, *(middle(of, path) for path in PATHS)])
    return table


def stall(field: Field, options: argparse.Namespace) -> dict[str, Rounds]:
    """The rounds of all contenders: each reads a long prompt beside four running streams."""
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
    names = ("median_gap_before_ms", "p99_gap_while_reading_ms", "largest_gap_while_reading_ms", "prompt_seconds")
    table = [
        [name, *(middle(of, path) for path in names), 1 / median(ratios(rounds[PACELINE], of, names[2]))]
        for name, of in rounds.items()
    ]
    show(
        "a long prompt beside four streams", ["", *(name.replace("_", " ") for name in names), "largest, ratio"], table
    )


def main() -> None:
    """Prints a table and writes it as JSON after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], help="not the others")
    parser.add_argument("--workload", choices=WORKLOADS, default="chat", help="what is asked")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="clients at once")
    parser.add_argument("--rounds", type=int, default=3, help="of each number of clients")
    parser.add_argument("--each", type=int, default=2, help="sessions of each client")
    parser.add_argument("--least", type=int, default=4, help="sessions of a run at least")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--context", type=int, default=1024, help="tokens of context for each slot")
    parser.add_argument("--bound", action=argparse.BooleanOptionalAction, default=True, help="measure the bound too")
    parser.add_argument("--stall", action="store_true", help="the other part: a long prompt beside four streams")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of that prompt, about")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="threads of each server")
    parser.add_argument("--name", default="", help="of the file; versus or stall for want of it")
    options = parser.parse_args()
    options.start = {}  # seconds until each is healthy
    options.name = options.name or ("stall" if options.stall else "versus")
    slots = 8 if options.stall else max(options.clients)
    each = (options.prompt + 4096) // 2 if options.stall else options.context
    with open_vocabulary(options.model) as vocab:
        ends = tuple(vocab.ends)
    settings = Settings(options.model, slots * each, slots, options.threads)
    names = [name for name in CONTENDERS if name in {PACELINE, *options.only}]
    field = Field(settings, names, ends)
    try:
        if options.stall:
            show_stall(stall(field, options)["stall"])
            return
        cells = throughput(field, options)
    except (Refused, RuntimeError) as error:
        raise SystemExit(f"\n{error}") from None
    show(f"{options.workload}, {settings.model.stem}", COLUMNS, rows(cells))


if __name__ == "__main__":
    main()
