"""The cost of structured output: masks as a fraction of a step, compile times of schemas, and gaps of running streams
during the compilation of a large schema.

The schemas are those of the tools of the Berkeley function calling leaderboard (`python bench/models.py bfcl`).
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench import bfcl
from bench.figures import save, show, spread
from engine import Engine, EngineConfig, JsonSchema, Request, RequestRefused, SamplingParams, Speculation, Tokens
from engine.engine import open_vocabulary
from engine.grammar import GrammarCompiler, GrammarError, masks, matcher
from engine.sampling import sampler

_PROMPT = "<|im_start|>user\nDescribe ten people as JSON.<|im_end|>\n<|im_start|>assistant\n"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Lima", "Oslo", "Rome", "Tokyo"]},
        "email": {"type": "string", "pattern": r"^[a-z]{3,12}@[a-z]{3,8}\.(com|org)$"},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "age", "city", "email", "likes"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 10}
_NO_DRAFTS = Speculation()


# ── compile times ──


async def compiled(model: Path) -> dict[str, Any]:
    """Returns the number of tools, the compile times of their distinct schemas, and the errors of the other schemas."""
    with open_vocabulary(model) as vocab:
        grammars = GrammarCompiler(vocab)
        begun = time.perf_counter()
        await grammars.compile(JsonSchema(b"{}"))
        first = time.perf_counter() - begun
        seconds: list[float] = []
        known: dict[bytes, str] = {}
        failed: dict[str, str] = {}
        count = 0
        for where, schema in bfcl.schemas():
            count += 1
            text = msgspec.json.encode(schema)
            if text not in known:
                begun = time.perf_counter()
                try:
                    await grammars.compile(JsonSchema(text))
                    known[text] = ""
                except GrammarError as error:
                    known[text] = str(error)
                seconds.append(time.perf_counter() - begun)
            if known[text]:
                failed[where] = known[text]
        grammars.close()
    wrong = sum(map(bool, known.values()))
    return {
        "tools": count,
        "failed": failed,
        "different": len(known),
        "different_failed": wrong,
        "milliseconds": spread(seconds),
        "first_seconds": first,
    }


# ── masks ──


class Clock:
    """Accumulates the seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def over(self, owner: Any, *names: str) -> Iterator[None]:
        """Measures the attributes `names` of `owner` for the length of the block."""
        before = {name: getattr(owner, name) for name in names}
        for name, function in before.items():
            setattr(owner, name, self._timed(f"{owner.__name__.rpartition('.')[2]}.{name}", function))
        yield
        for name, function in before.items():
            setattr(owner, name, function)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begun

        return timed


async def masked(model: Path, slots: int, tokens: int, temperature: float, drafts: bool) -> dict[str, Any]:
    """Returns the fraction of step time that masks and matchers take, for `slots` streams with a schema.

    `drafts` enables drafts of tokens that the grammar forces.
    """
    clock = Clock()
    config = EngineConfig.of(path=model, slots=slots, context=512 * slots)
    async with Engine.open(config) as engine:
        grammar = await engine.compile(JsonSchema(msgspec.json.encode(PEOPLE)))
        prompt = tuple(engine.vocab.tokenize(_PROMPT, special=True))

        async def one(seed: int, most: int) -> int:
            sampling = SamplingParams(temperature=temperature, seed=seed)
            speculation = Speculation(type=("grammar",), order="fixed") if drafts else _NO_DRAFTS
            request = Request(
                prompt=prompt, max_tokens=most, sampling=sampling, grammar=grammar, speculation=speculation
            )
            async with engine.generate(request) as updates:
                return sum([len(update.ids) async for update in updates if isinstance(update, Tokens)])

        await asyncio.gather(*(one(seed, 8) for seed in range(slots)))
        before = engine.stats()
        with (
            clock.over(masks.Masks, "begin", "of"),
            clock.over(masks, "unpack_bitmask"),
            clock.over(sampler, "mask_row"),
            clock.over(matcher.Matcher, "accept_token", "validate_tokens", "forced_tokens"),
        ):
            begun = time.perf_counter()
            emitted = sum(await asyncio.gather(*(one(100 + seed, tokens) for seed in range(slots))))
            wall = time.perf_counter() - begun
        after = engine.stats()
    busy, steps = after.busy_seconds - before.busy_seconds, after.steps - before.steps
    return {
        "share": sum(clock.spent.values()) / busy,
        "milliseconds_per_step": 1e3 * busy / steps,
        "tokens_per_second": emitted / wall,
        "steps": steps,
        "tokens": emitted,
        "microseconds_per_step": {name: 1e6 * spent / steps for name, spent in clock.spent.items()},
    }


# ── gaps of other streams ──


def large(size: int, number: int) -> bytes:
    """Returns a schema of about `size` bytes that is distinct for each number: sections of fields of all kinds."""
    sections: dict[str, Any] = {}
    schema = {"type": "object", "properties": sections, "required": [], "additionalProperties": False}
    while len(text := msgspec.json.encode(schema)) < size:
        at = f"section_{number}_{len(sections)}"
        fields = {
            **{f"{at}_text_{i}": {"type": "string", "maxLength": 20 + i, "description": "a text"} for i in range(8)},
            **{f"{at}_kind_{i}": {"enum": [f"{at}_{i}_{j}" for j in range(6)]} for i in range(4)},
            **{f"{at}_when_{i}": {"type": "string", "format": "date-time"} for i in range(2)},
            **{f"{at}_list_{i}": {"type": "array", "items": PERSON, "maxItems": 5} for i in range(2)},
        }
        sections[at] = {"type": "object", "properties": fields, "required": [*fields][:10]}
    return text


async def gaps_during_compilation(model: Path, streams: int, size: int, times: int) -> dict[str, Any]:
    """Returns the gaps of running streams, alone and during the compilation of large schemas, in milliseconds."""
    config = EngineConfig.of(path=model, slots=streams, context=4096, speculation={"types": ["none"]})
    gaps: dict[str, list[float]] = {"alone": [], "compiling": []}
    compiling: list[float] = []
    async with Engine.open(config) as engine:
        prompt = tuple(engine.vocab.tokenize(_PROMPT, special=True))
        busy = ended = 0.0

        async def one(seed: int) -> None:
            request = Request(
                prompt=prompt, max_tokens=700, ignore_eos=True, sampling=SamplingParams(seed=seed), salt=str(seed)
            )
            async with engine.generate(request) as updates:
                last = 0.0
                async for _ in updates:
                    now = time.perf_counter()
                    if last > begun:
                        gaps["compiling" if busy or ended > last else "alone"].append(now - last)
                    last = now

        begun = time.perf_counter() + 1.0
        running = [asyncio.create_task(one(seed)) for seed in range(streams)]
        await asyncio.sleep(3.0)
        for number in range(times):
            busy = time.perf_counter()
            try:
                await engine.compile(JsonSchema(large(size, number)))
            except RequestRefused as error:
                print(error)
            ended, start, busy = time.perf_counter(), busy, 0.0
            compiling.append(ended - start)
            await asyncio.sleep(0.7)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return {name: spread(found) for name, found in gaps.items()} | {"compile": spread(compiling)}


def main() -> None:
    """Prints three tables and writes `grammars.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--slots", type=int, default=8, help="concurrent streams with a schema")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--size", type=int, default=60_000, help="bytes of the large schema")
    options = parser.parse_args()
    ways = {
        "greedy": (0.0, False),
        "sampled": (0.8, False),
        "greedy, forced tokens drafted": (0.0, True),
        "sampled, forced tokens drafted": (0.8, True),
    }
    shares = {
        name: asyncio.run(masked(options.model, options.slots, options.tokens, *way)) for name, way in ways.items()
    }
    rows = [
        [name, 100 * made["share"], made["milliseconds_per_step"], made["tokens_per_second"], made["tokens"]]
        for name, made in shares.items()
    ]
    show(f"{options.slots} streams with a schema", ["", "% of a step", "ms per step", "tokens/s", "tokens"], rows)
    gaps = asyncio.run(gaps_during_compilation(options.model, 4, options.size, 8))
    show(
        f"a schema of {options.size} bytes beside 4 streams, milliseconds",
        ["", "p50", "p99", "max"],
        [[name, found["p50"], found["p99"], found["max"]] for name, found in gaps.items()],
    )
    schemas = asyncio.run(compiled(options.model))
    compiling, times = 1 - len(schemas["failed"]) / schemas["tools"], schemas["milliseconds"]
    show(
        "tools of the leaderboard",
        ["tools", "compile, %", "distinct", "of these fail", "ms p50", "p99", "max", "first, s"],
        [
            [
                *(schemas["tools"], f"{100 * compiling:.3f}", schemas["different"], schemas["different_failed"]),
                *(times["p50"], times["p99"], times["max"], schemas["first_seconds"]),
            ]
        ],
    )
    for where, reason in schemas["failed"].items():
        print(f"{where}: {reason}")
    save("grammars", {"masks": shares, "gaps": gaps, "schemas": schemas})


if __name__ == "__main__":
    main()
