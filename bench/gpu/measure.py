"""Measures a GPU host: `bench/gpu/run.sh` runs every part for every model.

`python -m bench.gpu.measure PART MODEL` measures the missing cells of a part and stores each at once, so that an
interrupted call can be repeated. It writes all stored cells to `gpu.json` and `gpu.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from bench import overhead, scenarios, step_cost
from bench.figures import OUT, save
from bench.gpu import tables
from bench.gpu.models import path_of
from bench.gpu.synthetic import rates
from bench.load import closed_loop, run_measured
from bench.models import MODELS_FOLDER
from bench.peers import MODES, PACELINE, Settings, llama_server
from bench.server import Server, free_port, running, serving
from bench.workloads import story
from engine.config import EngineConfig, physical_cores
from engine.llama import open_gguf

# Stored cells: one file for each part and model.
RESULTS_FOLDER = Path(__file__).parents[1] / "out" / "gpu"
PEER = "llama-server-unified"
# Lengths of llama-server's drafts: its default, and a longer one.
PEER_DRAFT_TOKENS = (3, 8)


class MeasurementSizes(Struct, frozen=True):
    """The sizes of the measurements."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    resident: tuple[int, ...] = (0, 4096, 16384, 65536)
    slots: tuple[int, ...] = (1, 8, 32, 64, 128, 254)
    """The library has 256 sequence ids, two of which Paceline reserves."""
    tokens: int = 192
    """Tokens of each answer."""
    words: int = 60
    """Words of each prompt."""
    rate: float = 0.8
    """Probability that a draft token is accepted."""
    streams: int = 16
    """Streams beside a long prompt."""
    prompt: int = 16_000
    """Tokens of the long prompt."""
    lead: float = 4.0
    """Seconds between the start of the streams and the long prompt."""


# Small sizes for a trial run.
QUICK = MeasurementSizes((1, 4, 16), (0, 256), (1, 4), 12, 10, streams=2, prompt=600, lead=1.0)


class PartFigures:
    """The figures of one part and model by cell, stored in a file."""

    def __init__(self, part: str, model: str) -> None:
        self._path = RESULTS_FOLDER / f"{part}-{model.replace(':', '-')}.json"
        self.figures: dict[str, Any] = msgspec.json.decode(self._path.read_bytes()) if self._path.exists() else {}

    def fill(self, cell: str, measure: Callable[[], Any]) -> None:
        """Measures and stores a cell unless it is stored."""
        if cell in self.figures:
            return
        begun = time.perf_counter()
        self.figures[cell] = measure()
        RESULTS_FOLDER.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(msgspec.json.encode(self.figures))
        print(f"{self._path.stem}, {cell}: {time.perf_counter() - begun:.1f} s", flush=True)


class GpuBench(Struct, frozen=True):
    """The target model, the draft model, the number of layers on the GPU, and the sizes of the measurements."""

    model: Path
    draft: Path
    layers: int
    extent: MeasurementSizes

    def settings(self, slots: int, cells: int) -> Settings:
        """Returns the common settings of both servers."""
        return Settings(self.model, cells, slots, physical_cores(), "auto")

    @property
    def common_flags(self) -> tuple[str, ...]:
        """Further flags of both servers. All prompts are distinct, so a prefix cache in RAM has no use."""
        return ("-ngl", str(self.layers), "--cache-ram", "0")

    @contextmanager
    def started(self, name: str, settings: Settings, extra_flags: Sequence[str] = ()) -> Iterator[Server]:
        """Runs one of the two servers for the length of the block, without speculation unless `extra_flags` enable
        it."""
        if name != PACELINE:
            with llama_server(settings, [*MODES[PEER], *self.common_flags, *extra_flags], 300) as server:
                yield server
            return
        flags = [*settings.flags(), *self.common_flags, "--spec-type", "none", *extra_flags]
        with serving(self.model, flags, 300) as server:
            yield server

    @contextmanager
    def synthetic(self, settings: Settings, extra_flags: Sequence[str]) -> Iterator[Server]:
        """Runs Paceline with random acceptance of draft tokens for the length of the block."""
        port = free_port()
        where = ["-m", str(self.model), "--port", str(port), *settings.flags(), *self.common_flags]
        command = [sys.executable, "-m", "bench.gpu.synthetic", str(self.extent.rate), *where, *extra_flags]
        with running(command, port, 300) as server:
            yield server


# ── the parts ──


def measure_cost(bench: GpuBench, cells: PartFigures) -> None:
    """Measures the milliseconds of a step by numbers of rows and of resident cells."""
    extent = bench.extent
    slots, context = min(254, max(extent.rows)), max(extent.resident) + 2 * max(extent.rows) + 256
    config = EngineConfig.of(
        path=bench.model, slots=slots, context=context, outputs=max(extent.rows), gpu_layers=bench.layers
    )

    def measure() -> dict[str, dict[int, dict[int, float]]]:
        backend = open_gguf(config, lambda share: None, lambda: True)
        try:
            return step_cost.measure(backend.context, 3, extent.rows, extent.resident)
        finally:
            backend.close()

    cells.fill("step", measure)


def measure_python_share(bench: GpuBench, cells: PartFigures) -> None:
    """Measures Python's fraction of a step, and the engine's speed relative to a bare loop, by number of slots."""
    for slots in bench.extent.slots:
        compare = partial(overhead.compare, bench.model, slots, bench.extent.tokens, 2, gpu_layers=bench.layers)
        cells.fill(str(slots), lambda compare=compare: asyncio.run(compare()))  # type: ignore[misc]


def load(server: Server, extent: MeasurementSizes, slots: int) -> dict[str, Any]:
    """Returns the figures of `slots` clients with two requests each, after a warm-up."""
    run_measured(closed_loop(server.port, 1, [[story(10**6, 4, extent.words)]]))
    sessions = [[story(number, extent.tokens, extent.words)] for number in range(2 * slots)]
    return run_measured(closed_loop(server.port, slots, sessions))[0]


def serving_settings(bench: GpuBench, slots: int) -> Settings:
    """Returns settings with cells for the prompts and answers of all clients."""
    return bench.settings(slots, max(4096, slots * (2 * bench.extent.tokens + 4 * bench.extent.words)))


def measure_throughput(bench: GpuBench, cells: PartFigures) -> None:
    """Measures the tokens per second of both servers over HTTP without speculation, by number of slots."""
    for slots in bench.extent.slots:
        for name in (PACELINE, PEER):

            def measure(name: str = name, slots: int = slots) -> dict[str, Any]:
                with bench.started(name, serving_settings(bench, slots)) as server:
                    return load(server, bench.extent, slots)

            cells.fill(f"{slots} {name}", measure)


def measure_backend_sampling(bench: GpuBench, cells: PartFigures) -> None:
    """Measures the tokens per second of both servers with and without backend sampling, by number of slots."""
    variants = [(PACELINE, ["-bs", "off"]), (PACELINE, ["-bs", "on"]), (PEER, []), (PEER, ["-bs"])]
    for slots in bench.extent.slots:
        for name, flags in variants:

            def measure(name: str = name, flags: Sequence[str] = flags, slots: int = slots) -> dict[str, Any]:
                with bench.started(name, serving_settings(bench, slots), flags) as server:
                    return load(server, bench.extent, slots)

            cells.fill(" ".join([str(slots), name, *flags]), measure)


def measure_synthetic(bench: GpuBench, cells: PartFigures) -> None:
    """Measures both servers with a draft model and random acceptance; llama-server's drafts have a fixed length."""
    draft = ["-md", str(bench.draft), "-ngld", str(bench.layers)]
    for slots in bench.extent.slots:
        settings = serving_settings(bench, slots)
        paceline_flags = [*draft, "--spec-type", "draft", "--draft-max", str(max(PEER_DRAFT_TOKENS))]

        def ours(
            settings: Settings = settings, paceline_flags: Sequence[str] = paceline_flags, slots: int = slots
        ) -> dict[str, Any]:
            with bench.synthetic(settings, paceline_flags) as server:
                return load(server, bench.extent, slots)

        cells.fill(f"{slots} {PACELINE}, measured lengths", ours)
        for length in PEER_DRAFT_TOKENS:
            drafts = [*draft, "--spec-type", "draft-simple", "--spec-draft-n-max", str(length)]
            drafts += ["--spec-synth-rates", rates(bench.extent.rate, length)]

            def peer(
                settings: Settings = settings, extra_flags: Sequence[str] = drafts, slots: int = slots
            ) -> dict[str, Any]:
                with bench.started(PEER, settings, extra_flags) as server:
                    return load(server, bench.extent, slots)

            cells.fill(f"{slots} {PEER}, {length}", peer)


def measure_gaps(bench: GpuBench, cells: PartFigures) -> None:
    """Measures the gaps of running streams during the prefill of a long prompt, on both servers.

    KV is unified, since one slot needs far more cells than the others.
    """
    extent = bench.extent
    for name in (PACELINE, PEER):

        def measure(name: str = name) -> dict[str, Any]:
            settings = bench.settings(extent.streams + 1, extent.prompt + extent.streams * scenarios.slot_tokens(0))
            with bench.started(name, settings, ["--kv-unified"]) as server:
                return asyncio.run(scenarios.long_prompt(server, extent.streams, extent.prompt, extent.lead))

        cells.fill(name, measure)


MEASUREMENTS: Mapping[str, Callable[[GpuBench, PartFigures], None]] = {
    "cost": measure_cost,
    "share": measure_python_share,
    "serve": measure_throughput,
    "sampling": measure_backend_sampling,
    "synthetic": measure_synthetic,
    "gaps": measure_gaps,
}


def summary() -> None:
    """Writes all stored cells to `gpu.json` and `gpu.md`."""
    figures = {path.stem: msgspec.json.decode(path.read_bytes()) for path in sorted(RESULTS_FOLDER.glob("*.json"))}
    save("gpu", figures)
    (OUT / "gpu.md").write_text(tables.render_tables(figures))


def main() -> None:
    """Measures the missing cells of one part for one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*MEASUREMENTS, "table"], help="part to measure; table only writes gpu.md")
    parser.add_argument("model", nargs="?", default="", help="name of the model in bench.gpu.models, such as 8b:q4_0")
    parser.add_argument("--draft", default="0.1b:q8_0", help="name of the draft model")
    parser.add_argument("-ngl", "--layers", type=int, default=99, help="layers on the GPU")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a trial run")
    options = parser.parse_args()
    folder, extent = MODELS_FOLDER / "random", QUICK if options.quick else MeasurementSizes()
    if options.part != "table":
        bench = GpuBench(path_of(options.model, folder), path_of(options.draft, folder), options.layers, extent)
        MEASUREMENTS[options.part](bench, PartFigures(options.part, options.model))
    summary()


if __name__ == "__main__":
    main()
