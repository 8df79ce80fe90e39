"""The whole engine on the real model: threads, sharing, cancellation, and independent outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engine import (
    ContextExceeded,
    Draining,
    Engine,
    EngineConfig,
    EngineFault,
    Finished,
    FinishReason,
    Logprob,
    ModelError,
    Overloaded,
    Request,
    RequestRefused,
    SamplingParams,
    Tokens,
)
from tests.conftest import MODEL

CONFIG = EngineConfig.of(path=MODEL, slots=4, queue=2, context=2048)


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    """Yields an engine on the real model with four slots."""
    async with Engine.open(CONFIG) as opened:
        yield opened


def chat(engine: Engine, text: str) -> tuple[int, ...]:
    """Returns the prompt of one user message."""
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return tuple(engine.vocab.tokenize(prompt, special=True))


async def collect(engine: Engine, request: Request) -> tuple[list[int], str, list[Logprob], Finished]:
    """Returns all tokens, the text, the log probabilities and the end of a generation."""
    ids: list[int] = []
    logprobs: list[Logprob] = []
    text = ""
    async with engine.generate(request) as generation:
        async for update in generation:
            if isinstance(update, Finished):
                return ids, text, logprobs, update
            assert isinstance(update, Tokens)
            ids += update.ids
            logprobs += update.logprobs
            text += update.text
    raise AssertionError("no terminal update")


async def answer(engine: Engine, request: Request) -> tuple[list[int], Finished]:
    """Returns all tokens and the end of a generation."""
    ids, _, _, end = await collect(engine, request)
    return ids, end


async def test_greedy_output_and_usage(engine: Engine) -> None:
    prompt = tuple(engine.vocab.tokenize("The capital of France is", special=True))
    request = Request(prompt=prompt, max_tokens=8, sampling=SamplingParams(temperature=0))
    ids, text, _, end = await collect(engine, request)
    assert "Paris" in text
    assert len(ids) == 8
    assert end.reason is FinishReason.LENGTH
    assert (end.usage.prompt, end.usage.cached, end.usage.completion) == (len(prompt), 0, 8)
    assert b"".join(map(engine.vocab.piece, ids)).decode() == text


async def test_concurrent_requests_get_their_own_outputs(engine: Engine) -> None:
    capitals = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo"}

    async def complete(country: str) -> str:
        prompt = tuple(engine.vocab.tokenize(f"The capital of {country} is", special=True))
        return (await collect(engine, Request(prompt=prompt, max_tokens=12, sampling=SamplingParams(temperature=0))))[1]

    texts = await asyncio.gather(*map(complete, capitals))
    for text, capital in zip(texts, capitals.values(), strict=True):
        assert capital in text


async def test_seed_gives_the_same_tokens_again(engine: Engine) -> None:
    request = Request(prompt=chat(engine, "Tell me a joke."), max_tokens=20, sampling=SamplingParams(seed=11))
    first, again = await collect(engine, request), await collect(engine, request)
    assert first[3].seed == 11
    assert again[3].usage.cached == len(request.prompt) - 2, "two rows are computed again"
    assert first[0][:3] == again[0][:3], "equal up to rounding, which does not change early tokens"


async def test_a_stop_string_ends_the_output_and_is_not_part_of_it(engine: Engine) -> None:
    prompt = tuple(engine.vocab.tokenize("1, 2, 3, 4,", special=True))
    request = Request(prompt=prompt, max_tokens=200, stop=(" 8",), sampling=SamplingParams(temperature=0))
    ids, text, _, end = await collect(engine, request)
    assert text == " 5, 6, 7,"
    assert (end.reason, end.stop) == (FinishReason.STOP, " 8")
    assert b"".join(map(engine.vocab.piece, ids)).decode() == text
    await asyncio.sleep(0.2)
    assert engine.stats().running == 0, "the slot is free"


async def test_logprobs(engine: Engine) -> None:
    prompt = tuple(engine.vocab.tokenize("The capital of France is", special=True))
    request = Request(prompt=prompt, max_tokens=4, logprobs=5, sampling=SamplingParams(temperature=0))
    ids, _, logprobs, _ = await collect(engine, request)
    assert [entry.token for entry in logprobs] == ids
    for entry in logprobs:
        assert len(entry.top) == 5
        assert entry.top[0] == (entry.token, entry.logprob), "greedy picks the likeliest"
        assert -5 < entry.logprob < 0


async def test_refused_before_it_is_submitted(engine: Engine) -> None:
    for prompt in [(), (49152,), (-1,)]:
        with pytest.raises(RequestRefused):
            engine.generate(Request(prompt=prompt))
    with pytest.raises(ContextExceeded) as caught:
        engine.generate(Request(prompt=(5,) * 2048))
    assert (caught.value.prompt_tokens, caught.value.limit) == (2048, 2048)


async def test_cancelling_frees_the_slot_and_the_queue_is_bounded(engine: Engine) -> None:
    request = Request(prompt=chat(engine, "Count."), ignore_eos=True)
    generations = [engine.generate(request) for _ in range(6)]
    for generation in generations:
        await generation.__aenter__()
    with pytest.raises(Overloaded) as caught:
        await engine.generate(request).__aenter__()
    assert caught.value.retry_after >= 1
    for generation in generations:
        await generation.__aexit__(None, None, None)
    _, _, _, end = await collect(engine, Request(prompt=request.prompt, max_tokens=2, ignore_eos=True))
    assert end.usage.completion == 2
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.requests_finished["cancelled"] == 6


async def test_the_context_length_ends_an_output() -> None:
    request = Request(prompt=(5,) * 248, ignore_eos=True, sampling=SamplingParams(temperature=0))
    async with Engine.open(EngineConfig.of(path=MODEL, slots=2, context=100)) as engine:
        assert engine.request_limit == 256, "cells are padded to multiples of 256"
        ids, _, _, end = await collect(engine, request)
    assert (len(ids), end.reason) == (8, FinishReason.LENGTH)


async def test_drain_ends_running_requests(engine: Engine) -> None:
    async with engine.generate(Request(prompt=(5, 6), ignore_eos=True)) as generation:
        await anext(generation)
        await engine.drain(0.05)
        with pytest.raises(Draining):
            await engine.generate(Request(prompt=(5,))).__aenter__()
        with pytest.raises(EngineFault, match="shutting down"):
            async for _ in generation:
                pass


async def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        async with Engine.open(EngineConfig.of(path=tmp_path / "none.gguf")):
            raise AssertionError("never opened")


async def test_cancelling_a_load_does_not_hang() -> None:
    opened = Engine.open(CONFIG)
    task = asyncio.ensure_future(opened.__aenter__())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
