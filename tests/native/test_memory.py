"""Prefixes that move between cells, RAM and disk, on real models: equal tokens, and no token computed twice."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine import Engine, EngineConfig, FinishReason, Request, SamplingParams
from engine.contract import Failed, Finished, Logprob
from engine.kv import Offload
from engine.llama import open_gguf
from engine.speculate import num_matching
from tests.conftest import MODEL
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, Oracle
from tests.native import tiny
from tests.native.test_engine import collect
from tests.sizes import sized

GREEDY = SamplingParams(temperature=0.0)
MIB = 2**20
# Rounding alone, as of F16 instead of BF16 values, moves log probabilities of these tiny models by up to 0.3.
NEAR_TIE_NATS = 0.4


def words(seed: int, count: int, start: int = 300, stop: int = 480) -> tuple[int, ...]:
    """Returns `count` random tokens from `start` to `stop` - 1, drawn with `seed`."""
    random = Random(seed)
    return tuple(random.randrange(start, stop) for _ in range(count))


def bench_of(path: Path, *, ram: int = 64 * MIB, reuse: int = 0, **fields: Any) -> CoreBench:
    """Returns a bench over a real model."""
    options: dict[str, Any] = {
        "path": path,
        "slots": 4,
        "rows": 128,
        "ubatch": 128,
        "memory": {"reuse": reuse},
    } | fields
    backend = open_gguf(EngineConfig.of(**options), lambda share: None, lambda: True)
    offload = Offload(ram, whole=not backend.context.divisible) if ram else None
    return CoreBench(backend.context, slots=4, prompt_rows=64, backend=backend, offload=offload, reuse=reuse)


def alone(path: Path, requests: list[Request], **fields: Any) -> CoreBench:
    """Returns a bench with the outputs of each request alone: without tiers and other requests' prefixes."""
    bench = bench_of(path, ram=0, **fields)
    for key, request in enumerate(requests):
        bench.submit(key, request)
        bench.run()
        bench.core.kv.drop_idle()
    bench.backend.close()
    return bench


def near_tie(logprob: Logprob) -> bool:
    """True if rounding can swap the two most likely tokens of a greedy row."""
    (_, first), (_, second) = logprob.top
    return first - second < NEAR_TIE_NATS


@pytest.fixture(scope="session", params=["recurrent", "hybrid", "windowed"])
def small(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the path of a tiny model whose sequences cannot be cut or shared at any position."""
    make: Callable[..., Path] = getattr(tiny, request.param)
    path = tmp_path_factory.mktemp("tiny") / f"{request.param}.gguf"
    return make(path, 64) if request.param == "windowed" else make(path)


both = pytest.mark.parametrize("unified", LAYOUTS)


def cells(unified: bool, each: int) -> dict[str, Any]:
    """Returns settings for four slots in which a request can have `each` cells in either layout."""
    return {"kv_unified": unified, "context": each if unified else 4 * each}


@both
def test_the_next_turn_computes_new_tokens_only(small: Path, unified: bool) -> None:
    bench = bench_of(small, **cells(unified, 1024))
    first = words(1, 300)
    bench.submit(0, Request(prompt=first, max_tokens=40, ignore_eos=True, sampling=GREEDY))
    bench.run()
    second = (*first, *bench.outputs[0], *words(2, 20))
    for key in (1, 2):
        bench.submit(key, Request(prompt=second, max_tokens=5, ignore_eos=True, sampling=GREEDY))
        bench.run()
        end = bench.ends[key]
        assert isinstance(end, Finished)
        assert end.usage.cached >= (339 if key == 1 else 355)
        bench.core.kv.drop_idle()
        assert bench.core.kv.used_cells == 0
    assert bench.outputs[1] == bench.outputs[2]
    bench.backend.close()


@both
def test_a_shared_prompt_is_computed_once(small: Path, unified: bool) -> None:
    bench = bench_of(small, **cells(unified, 2048))
    shared = words(1, 320)
    for key in range(4):
        prompt = (*shared, *words(key + 2, 10))
        bench.submit(key, Request(prompt=prompt, max_tokens=10, ignore_eos=True, sampling=GREEDY))
    bench.run()
    cached = sorted(end.usage.cached for end in bench.ends.values() if isinstance(end, Finished))
    assert cached[0] == 0
    assert min(cached[1:]) >= 320
    bench.backend.close()


def run_at_random(
    path: Path, seed: int, operations: int, longest: int, *, exact: bool = True, **fields: Any
) -> CoreBench:
    """Runs arrivals, cancellations, preemptions, steps and evictions in random order; asserts that all tokens are those
    alone. Without `exact` all requests are greedy, and an output may leave that of the request alone at a near-tie."""
    random = Random(seed)
    prefixes = [words(n, longest) for n in range(3)]
    requests = [
        Request(
            prompt=(*random.choice(prefixes)[: random.randint(1, longest)], *words(100 + n, random.randint(1, 20))),
            max_tokens=random.choice([1, 8, longest // 5]),
            ignore_eos=True,
            sampling=random.choice([GREEDY, SamplingParams(temperature=0.8, seed=n) if exact else GREEDY]),
            logprobs=None if exact else 2,
        )
        for n in range(operations // 20)
    ]
    reference = alone(path, requests, **fields)
    expected = reference.outputs
    bench = bench_of(path, ram=random.choice([MIB, 8 * MIB]), **fields)
    cancelled: set[int] = set()
    for _ in range(operations):
        draw = random.randrange(10)
        key = len(bench.sequences)
        if draw < 2 and key < len(requests):
            drafts = bench.core.context.max_rollback != 0 and random.random() < 0.5
            oracle = Oracle(requests[key], expected[key], 0.3, random) if drafts else None
            bench.submit(key, requests[key], oracle)
        elif draw == 2 and key and random.random() < 0.2:
            victim = random.randrange(key)
            bench.core.lifecycle.end(victim, FinishReason.CANCELLED)
            cancelled.add(victim)
        elif draw == 3 and bench.core.running:
            bench.core.lifecycle.preempt(random.choice([*bench.core.running.values()]))
        elif draw == 4:
            kv = bench.core.kv
            kv.evict(random.randint(0, bench.core.context.cells)) if kv.evictable_cells else kv.drop_idle()
        else:
            bench.core.step()
        bench.check()
    bench.run(max_steps=20_000)
    for key, tokens in bench.outputs.items():
        end = bench.ends[key]
        assert not isinstance(end, Failed), end
        equal = num_matching(tokens, expected[key])
        assert equal == len(tokens) or (not exact and near_tie(reference.logprobs[key][equal]))
        assert len(tokens) == len(expected[key]) or key in cancelled
    bench.backend.close()
    return bench


@both
def test_random_operations_on_models_that_cannot_cut_or_share(small: Path, unified: bool) -> None:
    """With Q8_0 weights, flash attention and BF16 values a row has the same bits in every batch if its cells are in
    order; a row of a recurrent model always has. The cells of a sliding window are used in a ring, whose order depends
    on how the prompt was cut into chunks."""
    exact = "windowed" not in small.name
    fields = {"flash_attention": "on", "cache_type_v": "bf16", **cells(unified, 512)}
    bench = run_at_random(small, 1, 400, 200, exact=exact, **fields)
    assert bench.core.kv.stats().saved_tokens
    assert bench.core.kv.stats().restored_tokens


def test_random_operations_on_layers_of_the_real_model(short_model: Path) -> None:
    bench = run_at_random(short_model, 1, sized(200, 2000), 80, context=512, deterministic=True)
    assert bench.core.kv.stats().saved_tokens
    assert bench.core.kv.stats().restored_tokens


@both
def test_the_part_after_a_changed_line_is_moved_on_the_real_model(unified: bool) -> None:
    bench = bench_of(MODEL, reuse=32, **cells(unified, 1024))
    tokens = bench.backend.vocab.tokenize
    story = "Anna has a red boat. Ben has a blue kite. The dog of Carla is called Dot. " * 4
    ask = "Question: What does Ben have? Answer: Ben has a blue"
    for key, day in enumerate(("Monday", "Wednesday the 21st")):
        prompt = tuple(tokens(f"Today is {day}.\n{story}{ask}", special=True))
        bench.submit(key, Request(prompt=prompt, max_tokens=1, logprobs=5, sampling=GREEDY))
        bench.run()
        bench.core.kv.drop_idle()
    end = bench.ends[1]
    assert isinstance(end, Finished)
    assert end.usage.moved > 60
    assert end.usage.prompt - end.usage.cached < 20
    assert bench.backend.vocab.piece(bench.outputs[1][0]) == b" kite"
    bench.backend.close()


async def test_a_conversation_in_too_few_cells_continues_from_ram_and_after_a_restart_from_disk(
    short_model: Path, tmp_path: Path
) -> None:
    config = EngineConfig.of(
        path=short_model,
        slots=4,
        context=512,
        kv_unified=True,
        memory={"ram": 64, "disk": str(tmp_path), "disk_max": 64},
    )
    turns = [words(n, 30, 1000, 40_000) for n in range(8)]
    texts: list[tuple[int, ...]] = [words(100 + n, 100, 1000, 40_000) for n in range(4)]
    async with Engine.open(config) as engine:

        async def talk(number: int) -> None:
            for turn in range(2):
                prompt = (*texts[number], *turns[2 * number + turn])
                request = Request(prompt=prompt, max_tokens=16, ignore_eos=True, sampling=GREEDY)
                ids, _, _, end = await collect(engine, request)
                if turn:
                    assert end.usage.cached >= len(texts[number]) - 1
                texts[number] = (*prompt, *ids)

        await asyncio.gather(*map(talk, range(4)))
        assert engine.stats().requests_finished["error"] == 0
        assert engine.stats().saved_tokens > 0
        await asyncio.sleep(0.5)
    gc.collect()
    async with Engine.open(config) as engine:
        request = Request(prompt=(*texts[0], *turns[0]), max_tokens=1)
        _, _, _, end = await collect(engine, request)
        assert end.usage.cached == len(texts[0]) - 1
