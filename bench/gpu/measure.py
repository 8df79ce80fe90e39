"""What is to be known of a GPU host: `bench/gpu/run.sh` runs every part for every model, and makes the table.

`python -m bench.gpu.measure PART MODEL` measures what of a part is not measured yet, cell by cell, so that it can be
cut off at any time, and writes all that is known so far to `gpu.json` and `gpu.md`.
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
from bench.load import closed_loop, measured
from bench.models import FOLDER
from bench.peers import MODES, PACELINE, Settings, llama_server
from bench.server import Server, free_port, running, serving
from bench.workloads import story
from engine.config import EngineConfig, physical_cores
from engine.llama import open_gguf

KEPT = Path(__file__).parents[1] / "out" / "gpu"
"""What is measured already: a file for each part and model, which later calls go on from."""
PEER = "llama-server-unified"
FIXED = (3, 8)
"""Lengths of llama-server's drafts: its default, and a longer one."""


class Extent(Struct, frozen=True):
    """How much is measured."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    resident: tuple[int, ...] = (0, 4096, 16384, 65536)
    slots: tuple[int, ...] = (1, 8, 32, 64, 128, 254)
    """The library has 256 sequences, of which Paceline keeps two."""
    tokens: int = 192
    """Of each answer."""
    words: int = 60
    """Of each prompt."""
    rate: float = 0.8
    """The chance of a drafted token."""
    streams: int = 16
    """Streams beside a long prompt."""
    prompt: int = 16_000
    """Tokens of the long prompt."""
    lead: float = 4.0
    """Seconds for which the streams run before it."""


QUICK = Extent((1, 4, 16), (0, 256), (1, 4), 12, 10, streams=2, prompt=600, lead=1.0)
"""For a rehearsal."""


class Cells:
    """The figures of one part and model, kept from call to call."""

    def __init__(self, part: str, model: str) -> None:
        self._path = KEPT / f"{part}-{model.replace(':', '-')}.json"
        self.figures: dict[str, Any] = msgspec.json.decode(self._path.read_bytes()) if self._path.exists() else {}

    def fill(self, cell: str, measure: Callable[[], Any]) -> None:
        """Measures a cell unless it is known."""
        if cell in self.figures:
            return
        begun = time.perf_counter()
        self.figures[cell] = measure()
        KEPT.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(msgspec.json.encode(self.figures))
        print(f"{self._path.stem}, {cell}: {time.perf_counter() - begun:.1f} s", flush=True)


class Bench(Struct, frozen=True):
    """A model, how much of it is on the GPU, and how much is measured."""

    model: Path
    draft: Path
    layers: int
    extent: Extent

    def settings(self, slots: int, cells: int) -> Settings:
        """What both servers are told."""
        return Settings(self.model, cells, slots, physical_cores(), "auto")

    @property
    def placed(self) -> tuple[str, ...]:
        """What both are told besides. Prompts are unique here: what is kept of them would help nobody."""
        return ("-ngl", str(self.layers), "--cache-ram", "0")

    @contextmanager
    def started(self, name: str, settings: Settings, more: Sequence[str] = ()) -> Iterator[Server]:
        """One of the two servers, with further flags; Paceline guesses only if they say so."""
        if name != PACELINE:
            with llama_server(settings, [*MODES[PEER], *self.placed, *more], 300) as server:
                yield server
            return
        flags = [*settings.flags(), *self.placed, *(more or ["--spec-type", "none"])]
        with serving(self.model, flags, 300) as server:
            yield server

    @contextmanager
    def synthetic(self, settings: Settings, more: Sequence[str]) -> Iterator[Server]:
        """Paceline whose drafts are right by chance."""
        port = free_port()
        where = ["-m", str(self.model), "--port", str(port), *settings.flags(), *self.placed]
        command = [sys.executable, "-m", "bench.gpu.synthetic", str(self.extent.rate), *where, *more]
        with running(command, port, 300) as server:
            yield server


# ── the parts ──


def cost(bench: Bench, cells: Cells) -> None:
    """Milliseconds of a step by rows and resident cells."""
    extent = bench.extent
    slots, room = min(254, max(extent.rows)), max(extent.resident) + 2 * max(extent.rows) + 256
    config = EngineConfig.of(
        path=bench.model, slots=slots, context=room, outputs=max(extent.rows), gpu_layers=bench.layers
    )

    def measure() -> dict[str, dict[int, dict[int, float]]]:
        backend = open_gguf(config, lambda share: None, lambda: True)
        try:
            return step_cost.measure(backend.context, 3, extent.rows, extent.resident)
        finally:
            backend.close()

    cells.fill("step", measure)


def share(bench: Bench, cells: Cells) -> None:
    """Python's share of a step, and the engine against a bare loop, by slots."""
    for slots in bench.extent.slots:
        compare = partial(overhead.compare, bench.model, slots, bench.extent.tokens, 2, gpu_layers=bench.layers)
        cells.fill(str(slots), lambda compare=compare: asyncio.run(compare()))  # type: ignore[misc]


def load(server: Server, extent: Extent, slots: int) -> dict[str, Any]:
    """So many clients who each ask twice, after one who warms the server up."""
    measured(closed_loop(server.port, 1, [[story(10**6, 4, extent.words)]]))
    sessions = [[story(number, extent.tokens, extent.words)] for number in range(2 * slots)]
    return measured(closed_loop(server.port, slots, sessions))[0]


def served(bench: Bench, slots: int) -> Settings:
    """Settings with cells for every client's prompt and answer."""
    return bench.settings(slots, max(4096, slots * (2 * bench.extent.tokens + 4 * bench.extent.words)))


def serve(bench: Bench, cells: Cells) -> None:
    """Tokens a second over HTTP without speculation, by slots, of both servers."""
    for slots in bench.extent.slots:
        for name in (PACELINE, PEER):

            def measure(name: str = name, slots: int = slots) -> dict[str, Any]:
                with bench.started(name, served(bench, slots)) as server:
                    return load(server, bench.extent, slots)

            cells.fill(f"{slots} {name}", measure)


def synthetic(bench: Bench, cells: Cells) -> None:
    """The same with a draft model whose tokens are right by chance: llama-server's drafts have a fixed length."""
    draft = ["-md", str(bench.draft), "-ngld", str(bench.layers)]
    for slots in bench.extent.slots:
        settings = served(bench, slots)
        own = [*draft, "--spec-type", "draft", "--draft-max", str(max(FIXED))]

        def ours(settings: Settings = settings, own: Sequence[str] = own, slots: int = slots) -> dict[str, Any]:
            with bench.synthetic(settings, own) as server:
                return load(server, bench.extent, slots)

        cells.fill(f"{slots} {PACELINE}, measured lengths", ours)
        for length in FIXED:
            drafts = [*draft, "--spec-type", "draft-simple", "--spec-draft-n-max", str(length)]
            drafts += ["--spec-synth-rates", rates(bench.extent.rate, length)]

            def peer(settings: Settings = settings, more: Sequence[str] = drafts, slots: int = slots) -> dict[str, Any]:
                with bench.started(PEER, settings, more) as server:
                    return load(server, bench.extent, slots)

            cells.fill(f"{slots} {PEER}, {length}", peer)


def gaps(bench: Bench, cells: Cells) -> None:
    """Gaps between texts of running streams while a long prompt is read, of both servers."""
    extent = bench.extent
    for name in (PACELINE, PEER):

        def measure(name: str = name) -> dict[str, Any]:
            settings = bench.settings(extent.streams + 1, extent.prompt + extent.streams * 3000)
            with bench.started(name, settings) as server:
                return asyncio.run(scenarios.long_prompt(server, extent.streams, extent.prompt, extent.lead))

        cells.fill(name, measure)


PARTS: Mapping[str, Callable[[Bench, Cells], None]] = {
    "cost": cost,
    "share": share,
    "serve": serve,
    "synthetic": synthetic,
    "gaps": gaps,
}


def summary() -> None:
    """Writes what is known so far as `gpu.json` and `gpu.md`."""
    figures = {path.stem: msgspec.json.decode(path.read_bytes()) for path in sorted(KEPT.glob("*.json"))}
    save("gpu", figures)
    (OUT / "gpu.md").write_text(tables.all_of(figures))


def main() -> None:
    """Measures one part for one model, as far as it is not measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table"], help="table measures nothing")
    parser.add_argument("model", nargs="?", default="", help="as bench.gpu.models names it, such as 8b:q4_0")
    parser.add_argument("--draft", default="0.1b:q8_0", help="the draft model, likewise")
    parser.add_argument("-ngl", "--layers", type=int, default=99, help="layers on the GPU")
    parser.add_argument("--quick", action="store_true", help="little of everything, as a rehearsal")
    options = parser.parse_args()
    folder, extent = FOLDER / "random", QUICK if options.quick else Extent()
    if options.part != "table":
        bench = Bench(path_of(options.model, folder), path_of(options.draft, folder), options.layers, extent)
        PARTS[options.part](bench, Cells(options.part, options.model))
    summary()


if __name__ == "__main__":
    main()
