"""Measures the overhead of Paceline over llama.cpp.

The table has the decode speed relative to a bare loop, Python's fraction of a step, and the event loop's CPU time per
token. The bare loop only calls `llama_decode`, with the same rows at the same positions. Bare loop and engine alternate
in one process, so that changes of the machine's speed affect both, and begin with empty cells.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench.client import Outcome, chat, stream, user
from bench.figures import save, show
from bench.models import SOURCES
from bench.server import serving
from bench.workloads import CHAT_PATH
from engine import Engine, EngineConfig, Request, SamplingParams, Tokens
from engine.backend import Backend, LoadProgress
from engine.llama import open_gguf
from engine.step import EngineCore

_PROMPT = "Write a story about a lighthouse keeper who finds a map."
# Minimum cells of a slot with which per-slot KV is the default.
_SLOT_CELLS = 1024


class BackendCapture:
    """Opens the model for an Engine and keeps the backend, whose context the bare loop uses too."""

    backend: Backend

    def __call__(self, config: EngineConfig, progress: LoadProgress, go_on: object) -> Backend:
        self.backend = open_gguf(config, progress, lambda: True)
        return self.backend


def bare_decode_speed(backend: Backend, streams: int, prompt: int, tokens: int) -> float:
    """Returns the tokens per second of bare decodes of `streams` rows. Must run on the engine thread."""
    context = backend.context
    for seq in range(context.sequences):
        context.cut(seq, 0)
    for first in range(0, streams, sequences_per_batch := context.batch.capacity // prompt):
        context.batch.clear()
        for seq in range(first, min(streams, first + sequences_per_batch)):
            context.batch.add(seq, 0, [5 + seq] * prompt, 1)
        context.decode()
    begun = time.perf_counter()
    for step in range(tokens - 1):
        context.batch.clear()
        for seq in range(streams):
            context.batch.add(seq, prompt + step, [7 + seq], 1)
        context.decode()
    seconds = time.perf_counter() - begun
    for seq in range(context.sequences):
        context.cut(seq, 0)
    return streams * (tokens - 1) / seconds


async def engine_speed(
    engine: Engine, prompt: tuple[int, ...], streams: int, tokens: int, greedy: bool
) -> dict[str, float]:
    """Returns the tokens per second of `streams` requests, and Python's fraction of the time of their steps.

    Both begin after as many updates as there are streams; the fraction covers the steps until the first stream ends.
    """
    first_times: list[float] = []
    times: list[float] = []
    marks: list[tuple[float, float]] = []
    ready = asyncio.Event()

    async def run_stream(seed: int) -> None:
        sampling = SamplingParams(temperature=0.0 if greedy else 0.8, seed=seed)
        request = Request(
            prompt=(*prompt, 100 + seed), max_tokens=tokens, ignore_eos=True, sampling=sampling, salt=str(time.time())
        )
        async with engine.generate(request) as generation:
            async for update in generation:
                if isinstance(update, Tokens):
                    times.append(time.perf_counter())
                    if not ready.is_set() and len(first_times) < streams:
                        first_times.append(times[-1])
                        if len(first_times) == streams:
                            ready.set()
                            stats = engine.stats()
                            marks.append((stats.busy_seconds, stats.native_seconds))
        stats = engine.stats()
        marks.append((stats.busy_seconds, stats.native_seconds))

    await asyncio.gather(*(run_stream(seed) for seed in range(streams)))
    (busy, native), (busy_end, native_end) = marks[0], marks[1]
    counted = [at for at in times if at > max(first_times)]
    return {
        "tokens_per_second": len(counted) / (max(counted) - max(first_times)),
        "python_share": 1 - (native_end - native) / (busy_end - busy),
    }


async def compare(model: Path, streams: int, tokens: int, rounds: int, gpu_layers: int = -1) -> dict[str, float]:
    """Returns the medians over interleaved rounds of the bare loop and the engine, greedy and sampled."""
    capture, cells = BackendCapture(), streams * max(_SLOT_CELLS, tokens + 64)
    config = EngineConfig.of(
        path=model, slots=streams, context=cells, gpu_layers=gpu_layers, speculation={"types": ["none"]}
    )
    figures: dict[str, list[float]] = {"bare": [], "greedy": [], "sampled": [], "share_greedy": [], "share_sampled": []}
    async with Engine.open(config, opener=capture) as engine:
        prompt = tuple(engine.vocab.tokenize(_PROMPT, special=True))

        async def on_empty_cells(function: Callable[[], float]) -> float:
            """Runs `function` on the engine thread between two steps, after the eviction of idle prefixes."""

            def work(core: EngineCore) -> float:
                core.kv.drop_idle()
                return function()

            return await engine.query(work)

        def bare_loop() -> float:
            return bare_decode_speed(capture.backend, streams, len(prompt) + 1, tokens)

        for _ in range(rounds):
            figures["bare"].append(await on_empty_cells(bare_loop))
            for name, greedy in (("greedy", True), ("sampled", False)):
                await on_empty_cells(float)
                result = await engine_speed(engine, prompt, streams, tokens, greedy)
                figures[name].append(result["tokens_per_second"])
                figures[f"share_{name}"].append(result["python_share"])
    return {name: median(values) for name, values in figures.items()}


async def event_loop_cost(model: Path, streams: int, seconds: float = 10.0) -> dict[str, float]:
    """Returns the event loop's microseconds per token streamed over HTTP, and its fraction of a core, while all streams
    run.

    Without speculation each token is one event, so events are counted.
    """
    flags = ["-np", str(streams), "-c", str(_SLOT_CELLS * streams), "--spec-type", "none"]
    with serving(model, flags) as server:
        outcomes = [Outcome(time.perf_counter()) for _ in range(streams)]
        bodies = [chat(user(f"{_PROMPT} {n}"), 900, seed=n) for n in range(streams)]
        tasks = [
            asyncio.create_task(stream(server.port, CHAT_PATH, body, outcome=outcome, abandon_after=4 + seconds))
            for body, outcome in zip(bodies, outcomes, strict=True)
        ]
        await asyncio.sleep(3)
        before = server.loop_seconds(), sum(len(outcome.arrivals) for outcome in outcomes)
        await asyncio.sleep(seconds)
        after = server.loop_seconds(), sum(len(outcome.arrivals) for outcome in outcomes)
        await asyncio.gather(*tasks)
    return {
        "microseconds_per_token": 1e6 * (after[0] - before[0]) / (after[1] - before[1]),
        "share_of_one_core": (after[0] - before[0]) / seconds,
    }


def main() -> None:
    """Prints one table and writes `overhead.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("--streams", type=int, default=8, help="concurrent requests")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the figures are their medians")
    options = parser.parse_args()
    engine = asyncio.run(compare(options.model, options.streams, options.tokens, options.rounds))
    loop = asyncio.run(event_loop_cost(options.model, options.streams))
    rows = [
        ["bare llama_decode loop, tokens/s", engine["bare"]],
        ["engine, greedy, tokens/s", engine["greedy"]],
        ["engine, sampled (default parameters), tokens/s", engine["sampled"]],
        ["engine relative to bare loop, greedy, %", 100 * engine["greedy"] / engine["bare"]],
        ["engine relative to bare loop, sampled, %", 100 * engine["sampled"] / engine["bare"]],
        ["Python's share of a step, greedy, %", 100 * engine["share_greedy"]],
        ["Python's share of a step, sampled, %", 100 * engine["share_sampled"]],
        ["event loop per token over HTTP, microseconds", loop["microseconds_per_token"]],
        ["event loop over HTTP, % of one core", 100 * loop["share_of_one_core"]],
    ]
    show(f"{options.streams} streams of {options.tokens} tokens", ["", ""], rows)
    save("overhead", {"engine": engine, "loop": loop, "streams": options.streams, "tokens": options.tokens})


if __name__ == "__main__":
    main()
