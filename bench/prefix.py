"""What a shared prefix costs, against llama-server: `python -m bench.peers build` once, then this.

24 requests from 8 clients begin with one long system prompt; the servers take turns, each turn on a server of its
own and each round with a system prompt of its own. With `--resident` instead: the decode speed of one stream on a
server that knows so many idle prefixes against one that knows none.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.client import Outcome, chat, closed, stream, user
from bench.figures import save, show
from bench.load import report
from bench.models import Refused
from bench.peers import CONTENDERS, MODES, PACELINE, Settings, started
from bench.server import Server
from bench.workloads import TOPICS, text_of
from engine.config import physical_cores

Figures = dict[str, float]
"""One turn of one server."""

RECALLED = 8
"""Of how many idle prefixes it is asked, in the end, whether the server still knows them."""


async def ask(port: int, body: dict[str, Any]) -> Outcome:
    """One chat request. Raises RuntimeError unless it ends well."""
    outcome = await stream(port, "/v1/chat/completions", body)
    if outcome.failed:
        raise RuntimeError(f"a request failed ({outcome.status}): {outcome.error}")
    return outcome


async def warm_up(server: Server) -> None:
    """A first request, which measures nothing."""
    await ask(server.port, chat(user("Good morning."), 8, temperature=0))


def questions(number: int, prompt: int, requests: int, tokens: int) -> list[dict[str, Any]]:
    """The requests of a round: one system prompt of about `prompt` tokens, unlike that of any other round."""
    system = {"role": "system", "content": f"Volume {number} of the log. {text_of(prompt)}"}
    return [
        chat([system, *user(f"Question {n}: what does it say about {TOPICS[n % len(TOPICS)]}?")], tokens, temperature=0)
        for n in range(requests)
    ]


async def turn(server: Server, clients: int, bodies: Sequence[dict[str, Any]]) -> Figures:
    """All requests from `clients` clients, each of which sends the next one when its last has ended.

    Raises RuntimeError if one fails, since the others then took less than their time.
    """
    await warm_up(server)
    begun, cpu, own = time.perf_counter(), server.cpu_seconds(), time.process_time()
    outcomes = await closed(clients, bodies, partial(ask, server.port))
    seconds = time.perf_counter() - begun
    loaded = report(outcomes, seconds, time.process_time() - own)
    return {
        "seconds": seconds,
        "cpu_seconds": server.cpu_seconds() - cpu,
        "tokens_per_second": loaded["tokens_per_second"],
        "ttft_p50_ms": loaded["ttft_ms"]["p50"],
        "ttft_max_ms": loaded["ttft_ms"]["max"],
        "prompt_tokens_asked": sum(outcome.prompt_tokens for outcome in outcomes),
        "prompt_tokens_computed": sum(outcome.prompt_tokens - outcome.cached_tokens for outcome in outcomes),
        "completion_tokens": loaded["completion_tokens"],
    }


def shared(names: Sequence[str], settings: Settings, options: argparse.Namespace) -> dict[str, list[Figures]]:
    """Every server's turns, by name; in each round all servers have one, one after the other."""
    turns: dict[str, list[Figures]] = {name: [] for name in names}
    for number in range(options.rounds):
        bodies = questions(number, options.prompt, options.requests, options.tokens)
        for name in names:
            with started(name, settings) as server:
                turns[name].append(asyncio.run(turn(server, options.clients, bodies)))
            print(f"round {number + 1}, {name}: {turns[name][-1]['seconds']:.1f} s", flush=True)
    return turns


def medians(turns: Sequence[Figures]) -> Figures:
    """The median of each figure."""
    return {name: median(figures[name] for figures in turns) for name in turns[0]}


def ratios(turns: dict[str, list[Figures]]) -> Figures:
    """How many times Paceline's seconds each server takes: the median over the rounds; nothing without Paceline."""
    return {
        name: median(one["seconds"] / ours["seconds"] for one, ours in zip(rounds, turns[PACELINE], strict=True))
        for name, rounds in turns.items()
        if PACELINE in turns
    }


def best_peer(turns: dict[str, list[Figures]]) -> str:
    """The way to run llama-server that takes the fewest seconds; empty if none ran."""
    peers = {name: medians(rounds)["seconds"] for name, rounds in turns.items() if name != PACELINE}
    return min(peers, key=peers.__getitem__, default="")


def idle_prompt(number: int, tokens: int, answer: int = 1) -> dict[str, Any]:
    """A request whose prompt shares nothing with that of another number."""
    return chat(user(f"{number} is the number of this log. {text_of(tokens)}"), answer, temperature=0)


async def fill(server: Server, prefixes: int, tokens: int) -> None:
    """Makes the server know so many prefixes of about `tokens` tokens; says how far it is."""
    begun = time.perf_counter()
    for number in range(prefixes):
        await ask(server.port, idle_prompt(number, tokens))
        print(f"  {number + 1} of {prefixes} prefixes, {time.perf_counter() - begun:.0f} s", flush=True)


async def decode_speed(server: Server, number: int, tokens: int) -> float:
    """Tokens per second of one stream after its first text."""
    outcome = await ask(server.port, chat(user(f"Story {number}: a lighthouse keeper."), tokens, temperature=0))
    return (outcome.completion_tokens - 1) / (outcome.arrivals[-1] - outcome.arrivals[0])


async def recall(server: Server, numbers: Iterable[int], tokens: int) -> float:
    """The share of these prefixes' tokens that the server needs not compute again."""
    outcomes = [await ask(server.port, idle_prompt(number, tokens)) for number in numbers]
    return sum(one.cached_tokens for one in outcomes) / sum(one.prompt_tokens for one in outcomes)


def resident(name: str, settings: Settings, options: argparse.Namespace) -> list[Figures]:
    """One server's rounds: its decode speed with no idle prefix and with all, in turn on two servers, and what share
    of the prefixes it still knows in the end.
    """
    with started(name, settings) as empty, started(name, settings) as full:
        print(f"{name}: filling", flush=True)
        asyncio.run(fill(full, options.resident, options.prompt))
        asyncio.run(warm_up(empty))
        speeds = [
            [asyncio.run(decode_speed(server, number, options.tokens)) for server in (empty, full)]
            for number in range(options.rounds)
        ]
        numbers = range(0, options.resident, max(1, options.resident // RECALLED))
        known = asyncio.run(recall(full, numbers, options.prompt))
    return [
        {
            "alone_tokens_per_second": alone,
            "beside_tokens_per_second": beside,
            "beside_against_alone": beside / alone,
            "remembered": known,
        }
        for alone, beside in speeds
    ]


def show_servers(title: str, figures: dict[str, dict[str, Any]]) -> None:
    """Prints a table with a column for each server."""
    rows = [[name.replace("_", " "), *(of[name] for of in figures.values())] for name in next(iter(figures.values()))]
    show(title, ["", *figures], rows)


def compare_shared(names: Sequence[str], settings: Settings, options: argparse.Namespace) -> None:
    """Prints a table of medians and writes `prefix.json`."""
    turns = shared(names, settings, options)
    against, peer = ratios(turns), best_peer(turns)
    figures = {name: medians(rounds) for name, rounds in turns.items()}
    for name, ratio in against.items():
        figures[name]["against_paceline"] = ratio
    show_servers(f"{options.requests} requests, {options.clients} clients, one system prompt", figures)
    if peer in against:
        print(f"best of llama-server: {peer}, {against[peer]:.2f} times Paceline's seconds")
    save("prefix", {"settings": told(settings, options), "medians": figures, "best_peer": peer, "rounds": turns})


def compare_resident(names: Sequence[str], settings: Settings, options: argparse.Namespace) -> None:
    """Prints a table and writes `prefix_resident.json`."""
    turns = {name: resident(name, settings, options) for name in names}
    figures = {name: medians(rounds) for name, rounds in turns.items()}
    show_servers(f"one stream beside {options.resident} idle prefixes of about {options.prompt} tokens", figures)
    save("prefix_resident", {"settings": told(settings, options), "medians": figures, "rounds": turns})


def told(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """What a result was measured with."""
    counts = {name: value for name, value in vars(options).items() if isinstance(value, int)}
    return counts | {"model": settings.model.name, "flags": " ".join(settings.flags())}


def main() -> None:
    """Prints one table and writes one file of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("-c", "--context", type=int, default=0, help="tokens of all slots; 0 is enough for the clients")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="threads of either server")
    parser.add_argument("-fa", "--flash-attn", choices=["on", "off"], default="off", help="flash attention in either")
    parser.add_argument("--clients", type=int, default=8, help="clients at once, and slots")
    parser.add_argument("--requests", type=int, default=24, help="requests in all")
    parser.add_argument("--prompt", type=int, default=2100, help="tokens of a long prompt, about")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; medians count")
    parser.add_argument("--resident", type=int, nargs="?", const=64, default=0, help="the other part: idle prefixes")
    parser.add_argument("--only", nargs="+", choices=[PACELINE, "llama-server", *MODES], help="not the others")
    options = parser.parse_args()
    context = options.context or options.clients * (options.prompt + options.tokens + 512)
    settings = Settings(options.model, context, options.clients, options.threads, options.flash_attn)
    names = [name for name in CONTENDERS if name.startswith(tuple(options.only or CONTENDERS))]
    try:
        (compare_resident if options.resident else compare_shared)(names, settings, options)
    except (Refused, RuntimeError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
