"""Measures the cost of structured output.

The tables have masks as a fraction of a step, compile times of schemas, and gaps of running streams during the
compilation of a large schema. The schemas are those of the tools of the Berkeley function calling leaderboard
(`python bench/models.py bfcl`), and those in the forms that clients send (`bench/client_schemas.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench import bfcl
from bench.client_schemas import client_schemas
from bench.figures import save, show, spread
from bench.models import SOURCES
from engine import (
    Engine,
    EngineConfig,
    JsonSchema,
    Request,
    RequestRefused,
    SamplingParams,
    Speculation,
    Tokens,
    open_vocabulary,
)
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


async def compile_schemas(model: Path, schemas: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Returns the number of named schemas, the compile times of the distinct ones without strict, the keywords that are
    not enforced, and the errors of the schemas that do not compile."""
    with open_vocabulary(model) as vocab:
        grammars = GrammarCompiler(vocab)
        begun = time.perf_counter()
        await grammars.compile(JsonSchema(b"{}"))
        first_seconds = time.perf_counter() - begun
        seconds: list[float] = []
        unenforced: dict[bytes, tuple[str, ...]] = {}
        errors: dict[bytes, str] = {}
        names: dict[str, bytes] = {}
        for name, schema in schemas:
            names[name] = text = msgspec.json.encode(schema)
            if text in unenforced:
                continue
            begun = time.perf_counter()
            unenforced[text] = ()
            try:
                relaxed = (await grammars.compile(JsonSchema(text, strict=False))).relaxed
                unenforced[text] = () if relaxed is None else relaxed.unenforced
            except GrammarError as error:
                errors[text] = str(error)
            seconds.append(time.perf_counter() - begun)
        grammars.close()
    return {
        "schemas": len(names),
        "different": len(unenforced),
        "failed": {name: errors[text] for name, text in names.items() if text in errors},
        "unenforced": {name: unenforced[text] for name, text in names.items() if unenforced[text]},
        "milliseconds": spread(seconds),
        "first_seconds": first_seconds,
    }


# ── masks ──


class FunctionTimer:
    """Accumulates the seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def measure(self, owner: Any, *names: str) -> Iterator[None]:
        """Measures the attributes `names` of `owner` for the length of the block."""
        before = {name: getattr(owner, name) for name in names}
        for name, function in before.items():
            setattr(owner, name, self._timed(f"{owner.__name__.rpartition('.')[2]}.{name}", function))
        yield
        for name, function in before.items():
            setattr(owner, name, function)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begun

        return timed


async def measure_masks(model: Path, slots: int, tokens: int, temperature: float, drafts: bool) -> dict[str, Any]:
    """Returns the figures of `slots` streams with a schema; `share` is the fraction of step time of masks and matchers.

    `drafts` enables drafts of tokens that the grammar forces.
    """
    timer = FunctionTimer()
    config = EngineConfig.of(path=model, slots=slots, context=512 * slots)
    async with Engine.open(config) as engine:
        grammar = await engine.compile(JsonSchema(msgspec.json.encode(PEOPLE)))
        prompt = tuple(engine.vocab.tokenize(_PROMPT, special=True))

        async def generate(seed: int, max_tokens: int) -> int:
            sampling = SamplingParams(temperature=temperature, seed=seed)
            speculation = Speculation(type=("grammar",), order="fixed") if drafts else _NO_DRAFTS
            request = Request(
                prompt=prompt, max_tokens=max_tokens, sampling=sampling, grammar=grammar, speculation=speculation
            )
            async with engine.generate(request) as updates:
                return sum([len(update.ids) async for update in updates if isinstance(update, Tokens)])

        await asyncio.gather(*(generate(seed, 8) for seed in range(slots)))
        before = engine.stats()
        with (
            timer.measure(masks.Masks, "begin", "of"),
            timer.measure(masks, "unpack_bitmask"),
            timer.measure(sampler, "mask_row"),
            timer.measure(matcher.Matcher, "accept_token", "validate_tokens", "forced_tokens"),
        ):
            begun = time.perf_counter()
            emitted = sum(await asyncio.gather(*(generate(100 + seed, tokens) for seed in range(slots))))
            wall = time.perf_counter() - begun
        after = engine.stats()
    busy, steps = after.busy_seconds - before.busy_seconds, after.steps - before.steps
    return {
        "share": sum(timer.spent.values()) / busy,
        "milliseconds_per_step": 1e3 * busy / steps,
        "tokens_per_second": emitted / wall,
        "steps": steps,
        "tokens": emitted,
        "microseconds_per_step": {name: 1e6 * spent / steps for name, spent in timer.spent.items()},
    }


# ── gaps of other streams ──


def large_schema(size: int, number: int) -> bytes:
    """Returns a schema of about `size` bytes that is distinct for each number; its sections have fields of all
    kinds."""
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
    """Returns milliseconds: the gaps of running streams alone and during compilations, and the compile times."""
    config = EngineConfig.of(path=model, slots=streams, context=4096, speculation={"types": ["none"]})
    gaps: dict[str, list[float]] = {"alone": [], "compiling": []}
    compiling: list[float] = []
    async with Engine.open(config) as engine:
        prompt = tuple(engine.vocab.tokenize(_PROMPT, special=True))
        busy = ended = 0.0

        async def run_stream(seed: int) -> None:
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
        running = [asyncio.create_task(run_stream(seed)) for seed in range(streams)]
        await asyncio.sleep(3.0)
        for number in range(times):
            busy = time.perf_counter()
            try:
                await engine.compile(JsonSchema(large_schema(size, number)))
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
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("--slots", type=int, default=8, help="concurrent streams with a schema")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--size", type=int, default=60_000, help="bytes of the large schema")
    options = parser.parse_args()
    sampling_settings = {
        "greedy": (0.0, False),
        "sampled": (0.8, False),
        "greedy, forced tokens drafted": (0.0, True),
        "sampled, forced tokens drafted": (0.8, True),
    }
    shares = {
        name: asyncio.run(measure_masks(options.model, options.slots, options.tokens, *setting))
        for name, setting in sampling_settings.items()
    }
    rows = [
        [
            name,
            100 * figures["share"],
            figures["milliseconds_per_step"],
            figures["tokens_per_second"],
            figures["tokens"],
        ]
        for name, figures in shares.items()
    ]
    show(f"{options.slots} streams with a schema", ["", "% of a step", "ms per step", "tokens/s", "tokens"], rows)
    gaps = asyncio.run(gaps_during_compilation(options.model, 4, options.size, 8))
    show(
        f"a schema of {options.size} bytes beside 4 streams, milliseconds",
        ["", "p50", "p99", "max"],
        [[name, found["p50"], found["p99"], found["max"]] for name, found in gaps.items()],
    )
    compiled = {
        "tools of the leaderboard": asyncio.run(compile_schemas(options.model, bfcl.schemas())),
        "schemas of clients": asyncio.run(compile_schemas(options.model, client_schemas())),
    }
    show(
        "schemas without strict",
        ["", "schemas", "distinct", "refused", "enforced in part", "ms p50", "p99", "max", "first, s"],
        [
            [
                *(title, found["schemas"], found["different"], len(found["failed"]), len(found["unenforced"])),
                *(found["milliseconds"][key] for key in ("p50", "p99", "max")),
                found["first_seconds"],
            ]
            for title, found in compiled.items()
        ],
    )
    for found in compiled.values():
        for name, reason in [*found["failed"].items(), *found["unenforced"].items()]:
            print(f"{name}: {reason if isinstance(reason, str) else ', '.join(reason)}")
    save("grammars", {"masks": shares, "gaps": gaps, "schemas": compiled})


if __name__ == "__main__":
    main()
