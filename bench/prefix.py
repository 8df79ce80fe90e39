"""Measures the cost of a shared prefix, compared with llama-server; `python -m bench.peers build` must have run once.

24 requests from 8 clients begin with one long system prompt. In each round every server is restarted, one after the
other, and each round has its own system prompt. Paceline has its default flags except context, slots and threads.
With `--resident` the command measures the decode speed of one stream instead, with and without cached idle prefixes.
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

from bench.client import Outcome, chat, run_closed_loop, stream, user
from bench.figures import save, show
from bench.load import report
from bench.models import SOURCES, SetupError
from bench.peers import MODES, PACELINE, Settings, started
from bench.server import Server
from bench.workloads import CHAT_PATH, TOPICS, text_of
from engine.config import physical_cores

_CONTENDERS = (PACELINE, *MODES)

# Figures of one server in one round.
ServerFigures = dict[str, float]

# Number of idle prefixes that are requested again at the end.
RECALLED_PREFIXES = 8


async def send(port: int, body: dict[str, Any]) -> Outcome:
    """Sends one chat request. Raises RuntimeError if the request fails."""
    outcome = await stream(port, CHAT_PATH, body)
    if outcome.failed:
        raise RuntimeError(f"a request failed ({outcome.status}): {outcome.error}")
    return outcome


async def warm_up(server: Server) -> None:
    """Sends a request that is not measured."""
    await send(server.port, chat(user("Good morning."), 8, temperature=0))


def questions(number: int, prompt: int, requests: int, tokens: int) -> list[dict[str, Any]]:
    """Returns the requests of round `number`; its system prompt has about `prompt` tokens and is used in no other
    round."""
    system = {"role": "system", "content": f"Volume {number} of the log. {text_of(prompt)}"}
    return [
        chat([system, *user(f"Question {n}: what does it say about {TOPICS[n % len(TOPICS)]}?")], tokens, temperature=0)
        for n in range(requests)
    ]


async def run_round(server: Server, clients: int, bodies: Sequence[dict[str, Any]]) -> ServerFigures:
    """Sends all requests from `clients` clients in a closed loop. Raises RuntimeError if a request fails."""
    await warm_up(server)
    begun, cpu, own = time.perf_counter(), server.cpu_seconds(), time.process_time()
    outcomes = await run_closed_loop(clients, bodies, partial(send, server.port))
    seconds = time.perf_counter() - begun
    loaded = report(outcomes, seconds, time.process_time() - own)
    return {
        "seconds": seconds,
        "cpu_seconds": server.cpu_seconds() - cpu,
        "tokens_per_second": loaded["tokens_per_second"],
        "ttft_p50_ms": loaded["ttft_ms"]["p50"],
        "ttft_max_ms": loaded["ttft_ms"]["max"],
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in outcomes),
        "prompt_tokens_computed": sum(outcome.prompt_tokens - outcome.cached_tokens for outcome in outcomes),
        "completion_tokens": loaded["completion_tokens"],
    }


def run_shared(names: Sequence[str], settings: Settings, options: argparse.Namespace) -> dict[str, list[ServerFigures]]:
    """Returns the rounds of every server by name; in each round the servers run one after the other."""
    turns: dict[str, list[ServerFigures]] = {name: [] for name in names}
    for number in range(options.rounds):
        bodies = questions(number, options.prompt, options.requests, options.tokens)
        for name in names:
            with started(name, settings) as server:
                turns[name].append(asyncio.run(run_round(server, options.clients, bodies)))
            print(f"round {number + 1}, {name}: {turns[name][-1]['seconds']:.1f} s", flush=True)
    return turns


def medians(turns: Sequence[ServerFigures]) -> ServerFigures:
    """Returns the median of each figure."""
    return {name: median(figures[name] for figures in turns) for name in turns[0]}


def ratios(turns: dict[str, list[ServerFigures]]) -> ServerFigures:
    """Returns the ratio of each server's seconds to Paceline's, the median over the rounds; empty without Paceline."""
    return {
        name: median(one["seconds"] / ours["seconds"] for one, ours in zip(rounds, turns[PACELINE], strict=True))
        for name, rounds in turns.items()
        if PACELINE in turns
    }


def best_peer(turns: dict[str, list[ServerFigures]]) -> str:
    """Returns the mode of llama-server with the fewest seconds; empty if none ran."""
    peers = {name: medians(rounds)["seconds"] for name, rounds in turns.items() if name != PACELINE}
    return min(peers, key=peers.__getitem__, default="")


def idle_prompt(number: int, tokens: int, answer: int = 1) -> dict[str, Any]:
    """Returns a request whose prompt shares only the chat template with the prompts of other numbers."""
    return chat(user(f"{number} is the number of this log. {text_of(tokens)}"), answer, temperature=0)


async def fill(server: Server, prefixes: int, tokens: int) -> None:
    """Fills the server's cache with `prefixes` prefixes of about `tokens` tokens; prints its progress."""
    begun = time.perf_counter()
    for number in range(prefixes):
        await send(server.port, idle_prompt(number, tokens))
        print(f"  {number + 1} of {prefixes} prefixes, {time.perf_counter() - begun:.0f} s", flush=True)


async def decode_speed(server: Server, number: int, tokens: int) -> float:
    """Returns the tokens per second of one stream after its first token."""
    outcome = await send(server.port, chat(user(f"Story {number}: a lighthouse keeper."), tokens, temperature=0))
    return (outcome.completion_tokens - 1) / (outcome.arrivals[-1] - outcome.arrivals[0])


async def recall(server: Server, numbers: Iterable[int], tokens: int) -> float:
    """Returns the cached fraction of the prompt tokens of the prefixes `numbers`."""
    outcomes = [await send(server.port, idle_prompt(number, tokens)) for number in numbers]
    return sum(one.cached_tokens for one in outcomes) / sum(one.prompt_tokens for one in outcomes)


def run_resident(name: str, settings: Settings, options: argparse.Namespace) -> list[ServerFigures]:
    """Returns the rounds of one server: decode speeds without idle prefixes and with `--resident` idle prefixes.

    The two speeds are measured alternately on two instances. `recalled` is the fraction of the tokens of sampled
    prefixes that is still cached at the end.
    """
    with started(name, settings) as empty, started(name, settings) as full:
        print(f"{name}: filling", flush=True)
        asyncio.run(fill(full, options.resident, options.prompt))
        asyncio.run(warm_up(empty))
        speeds = [
            [asyncio.run(decode_speed(server, number, options.tokens)) for server in (empty, full)]
            for number in range(options.rounds)
        ]
        numbers = range(0, options.resident, max(1, options.resident // RECALLED_PREFIXES))
        recalled = asyncio.run(recall(full, numbers, options.prompt))
    return [
        {
            "alone_tokens_per_second": alone,
            "beside_tokens_per_second": beside,
            "beside_against_alone": beside / alone,
            "recalled": recalled,
        }
        for alone, beside in speeds
    ]


def show_servers(title: str, figures: dict[str, dict[str, Any]]) -> None:
    """Prints a table with a column for each server."""
    rows = [[name.replace("_", " "), *(of[name] for of in figures.values())] for name in next(iter(figures.values()))]
    show(title, ["", *figures], rows)


def compare_shared(names: Sequence[str], settings: Settings, options: argparse.Namespace) -> None:
    """Prints a table of medians and writes `prefix.json`."""
    rounds_of = run_shared(names, settings, options)
    ratios_to_paceline, peer = ratios(rounds_of), best_peer(rounds_of)
    figures = {name: medians(server_rounds) for name, server_rounds in rounds_of.items()}
    for name, ratio in ratios_to_paceline.items():
        figures[name]["against_paceline"] = ratio
    show_servers(f"{options.requests} requests, {options.clients} clients, one system prompt", figures)
    if peer in ratios_to_paceline:
        print(f"best of llama-server: {peer}, {ratios_to_paceline[peer]:.2f} times Paceline's seconds")
    save(
        "prefix",
        {"settings": described_settings(settings, options), "medians": figures, "best_peer": peer, "rounds": rounds_of},
    )


def compare_resident(names: Sequence[str], settings: Settings, options: argparse.Namespace) -> None:
    """Prints a table and writes `prefix_resident.json`."""
    turns = {name: run_resident(name, settings, options) for name in names}
    figures = {name: medians(rounds) for name, rounds in turns.items()}
    show_servers(f"one stream beside {options.resident} idle prefixes of about {options.prompt} tokens", figures)
    save("prefix_resident", {"settings": described_settings(settings, options), "medians": figures, "rounds": turns})


def described_settings(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that are saved with the figures."""
    counts = {name: value for name, value in vars(options).items() if isinstance(value, int)}
    return counts | {"model": settings.model.name, "flags": " ".join(settings.flags())}


def main() -> None:
    """Prints one table and writes one file of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument(
        "-c", "--context", type=int, default=0, help="tokens of all slots; 0 means enough for all clients and prompts"
    )
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="threads of each server")
    parser.add_argument("--clients", type=int, default=8, help="concurrent clients, and slots")
    parser.add_argument("--requests", type=int, default=24, help="requests of a round")
    parser.add_argument("--prompt", type=int, default=2100, help="approximate tokens of a long prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--resident", type=int, nargs="?", const=64, default=0, help="idle prefixes beside one stream")
    parser.add_argument("--only", nargs="+", choices=[PACELINE, "llama-server", *MODES], help="only these servers")
    options = parser.parse_args()
    context = options.context or options.clients * (options.prompt + options.tokens + 512)
    settings = Settings(options.model, context, options.clients, options.threads)
    names = [name for name in _CONTENDERS if name.startswith(tuple(options.only or _CONTENDERS))]
    try:
        (compare_resident if options.resident else compare_shared)(names, settings, options)
    except (SetupError, RuntimeError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
