"""The engine thread over the toy context: submission, cancelling, faults, and always one terminal update."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from engine import (
    Draining,
    Engine,
    EngineConfig,
    EngineFault,
    Finished,
    FinishReason,
    GrammarSpec,
    JsonObject,
    ModelError,
    Regex,
    Request,
    RequestRefused,
    SamplingParams,
    Tokens,
    Update,
)
from engine.contract import ENGINE_FAILED
from engine.grammar import compiler
from tests.toy import VOCABULARY, ToyBackend, ToyContext, failing, opener

CONFIG = EngineConfig.of(path="toy.gguf", slots=2, queue=4)
ENDLESS = Request(prompt=(1, 2, 3), ignore_eos=True)


FEW = Request(prompt=(1, 2, 3), max_tokens=3, ignore_eos=True)


async def collect(engine: Engine, request: Request) -> list[Update]:
    """Returns all updates of a request."""
    async with engine.generate(request) as generation:
        return [update async for update in generation]


def text_of(updates: list[Update]) -> str:
    """Returns the text of all updates."""
    return "".join(update.text for update in updates if isinstance(update, Tokens))


def toy_backend(*, decode_seconds: float = 0.0) -> ToyBackend:
    """Returns a toy backend whose decodes take `decode_seconds` each."""
    context = ToyContext(cells=2000)
    context.before_decode = lambda: time.sleep(decode_seconds)
    return ToyBackend(context)


async def test_updates_are_tokens_and_then_one_end() -> None:
    backend = toy_backend()
    shares: list[float] = []
    async with Engine.open(CONFIG, opener=opener(backend), progress=shares.append) as engine:
        request = Request(prompt=(1, 2, 3), max_tokens=7, ignore_eos=True)
        *tokens, end = await collect(engine, request)
        assert isinstance(end, Finished)
        assert sum(len(update.ids) for update in tokens if isinstance(update, Tokens)) == end.usage.completion == 7
        stats = engine.stats()
        assert (stats.completion_tokens, stats.prompt_tokens) == (7, 3)
        assert stats.requests_finished["length"] == 1
        assert sum(stats.ttft.counts) == 1
        assert sum(stats.gap.counts) == 6
    assert shares == [0.5, 1.0]
    assert backend.closed


async def test_unread_tokens_are_merged() -> None:
    async with (
        Engine.open(CONFIG, opener=opener(toy_backend())) as engine,
        engine.generate(Request(prompt=(1,), max_tokens=50, ignore_eos=True)) as generation,
    ):
        await asyncio.sleep(0.3)
        updates = [update async for update in generation]
    assert len(updates) == 2
    assert isinstance(updates[0], Tokens)
    assert len(updates[0].ids) == 50


async def test_leaving_cancels_within_two_steps() -> None:
    async with Engine.open(CONFIG, opener=opener(toy_backend(decode_seconds=0.01))) as engine:
        async with engine.generate(ENDLESS) as generation:
            await anext(generation)
        before = engine.stats().steps
        await asyncio.sleep(0.1)
        assert engine.stats().running == 0
        assert engine.stats().steps <= before + 2


async def test_cancelling_a_task_cancels_its_request() -> None:
    async with Engine.open(CONFIG, opener=opener(toy_backend(decode_seconds=0.01))) as engine:
        task = asyncio.ensure_future(collect(engine, ENDLESS))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
        assert engine.stats().requests_finished["cancelled"] == 1


async def test_a_stop_string_over_several_tokens() -> None:
    greedy = SamplingParams(temperature=0)
    async with Engine.open(CONFIG, opener=opener(toy_backend())) as engine:
        request = Request(prompt=(1, 2), max_tokens=30, ignore_eos=True, sampling=greedy)
        text = text_of(await collect(engine, request))
        stop = text[10:13]
        stopped = Request(prompt=(1, 2), max_tokens=30, ignore_eos=True, sampling=greedy, stop=(stop,))
        updates = await collect(engine, stopped)
    end = updates[-1]
    assert isinstance(end, Finished)
    assert (end.reason, end.stop) == (FinishReason.STOP, stop)
    at = text.index(stop)
    assert text_of(updates) == text[:at]
    assert end.usage.completion == at + 3, "a token is a character here"


@pytest.mark.parametrize("fields", [{"logprobs": 1.5}, {"logprobs": -1}, {"max_tokens": "5"}, {"min_tokens": True}])
async def test_a_count_of_a_wrong_type_is_refused_before_a_step(fields: dict[str, Any]) -> None:
    async with Engine.open(CONFIG, opener=opener(toy_backend())) as engine:
        with pytest.raises(RequestRefused, match="whole number") as caught:
            engine.generate(Request(prompt=(1,), **fields))
        assert caught.value.field == next(iter(fields))


async def test_a_failed_step_is_reported_and_the_engine_continues() -> None:
    backend = toy_backend()
    async with Engine.open(CONFIG, opener=opener(backend)) as engine:
        with failing(backend.context, [3]), pytest.raises(EngineFault, match="injected"):
            await collect(engine, ENDLESS)
        updates = await collect(engine, Request(prompt=(1,), max_tokens=2, ignore_eos=True))
        assert isinstance(updates[-1], Finished)


class Panic(BaseException):
    """A BaseException that is no Exception, as panics of Rust libraries are."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
async def test_when_the_thread_dies_running_and_later_requests_fail(
    kind: Callable[[str], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    backend = toy_backend(decode_seconds=0.01)
    async with Engine.open(CONFIG, opener=opener(backend)) as engine:
        tasks = [asyncio.ensure_future(collect(engine, ENDLESS)) for _ in range(4)]
        await asyncio.sleep(0.1)
        backend.context.faults = lambda n: kind("a bug of ours")
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineFault) and result.fatal for result in results)
        assert {str(result) for result in results} == {ENGINE_FAILED}
        with pytest.raises(EngineFault, match=ENGINE_FAILED):
            await engine.generate(ENDLESS).__aenter__()
        stats = engine.stats()
        assert (stats.requests_finished["error"], stats.running, stats.waiting) == (4, 0, 0)
    assert backend.closed
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "paceline.engine"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "a bug of ours"
    assert "Traceback" in caplog.text


class BrokenGrammar:
    """A grammar whose `begin` raises."""

    vocabulary = VOCABULARY

    def begin(self) -> Any:
        raise RuntimeError("no memory")


async def test_a_request_that_cannot_start_fails_alone_and_frees_its_slot() -> None:
    async with Engine.open(CONFIG, opener=opener(toy_backend())) as engine:
        for _ in range(engine.max_requests + 1):
            with pytest.raises(EngineFault, match="cannot start"):
                await collect(engine, Request(prompt=(1,), grammar=cast("Any", BrokenGrammar())))
        updates = await collect(engine, Request(prompt=(1,), max_tokens=2, ignore_eos=True))
        assert isinstance(updates[-1], Finished)
        await asyncio.wait_for(engine.drain(20), 20)


async def test_the_progress_of_a_prefill() -> None:
    async with Engine.open(CONFIG, opener=opener(toy_backend(decode_seconds=0.005))) as engine:
        request = Request(prompt=(*range(1, 40),) * 5, max_tokens=3, ignore_eos=True, progress=True)
        for known in (0, 194):
            *updates, end = await collect(engine, request)
            found = [update.prefill_progress for update in updates if isinstance(update, Tokens)]
            reports = [progress for progress in found if progress is not None]
            processed = [progress.processed for progress in reports]
            assert processed == sorted({*processed, 195})
            assert {(progress.prompt, progress.cached) for progress in reports} == {(195, known)}
            assert isinstance(end, Finished)
            assert len(reports) > 2 or known
        assert not any(update.prefill_progress for update in await collect(engine, FEW) if isinstance(update, Tokens))


@pytest.mark.parametrize("warmup", [True, False])
async def test_the_first_grammar_is_compiled_before_the_first_request(
    monkeypatch: pytest.MonkeyPatch, warmup: bool
) -> None:
    specs: list[GrammarSpec] = []
    monkeypatch.setattr(compiler.GrammarCompiler, "_compile", lambda self, key, spec: specs.append(spec))
    config = EngineConfig.of(path="toy.gguf", slots=2, warmup=warmup)
    async with Engine.open(config, opener=opener(toy_backend())):
        assert specs == [JsonObject()] * warmup


async def test_a_first_grammar_that_takes_long_does_not_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 0.0)
    async with Engine.open(CONFIG, opener=opener(toy_backend())) as engine:
        with pytest.raises(RequestRefused, match="was not compiled"):
            await engine.compile(Regex("a"))


@pytest.mark.parametrize("drained", [False, True])
async def test_the_end_fails_requests_whose_grammar_is_being_compiled(
    monkeypatch: pytest.MonkeyPatch, drained: bool
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(compiler.GrammarCompiler, "_compile", lambda self, key, spec: go_on.wait(1))
    async with Engine.open(CONFIG, opener=opener(toy_backend())) as engine:
        waiting = [asyncio.create_task(engine.compile(Regex(pattern))) for pattern in "aabcd"]
        await asyncio.sleep(0.01)
        if drained:
            await engine.drain(0)
            with pytest.raises(Draining):
                await engine.compile(Regex("e"))
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [Draining] * 5
    go_on.set()


async def test_drain_lets_requests_end_in_time() -> None:
    async with Engine.open(CONFIG, opener=opener(toy_backend(decode_seconds=0.005))) as engine:
        request = Request(prompt=(1,), max_tokens=20, ignore_eos=True)
        async with engine.generate(request) as generation:
            await anext(generation)
            await engine.drain(20)
            with pytest.raises(Draining):
                await engine.generate(request).__aenter__()
            updates = [update async for update in generation]
        assert isinstance(updates[-1], Finished)


async def test_a_cancelled_drain_reports_no_error() -> None:
    """A second signal cancels the first drain."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    request = Request(prompt=(1,), max_tokens=1000, ignore_eos=True)
    async with (
        Engine.open(CONFIG, opener=opener(toy_backend(decode_seconds=0.005))) as engine,
        engine.generate(request) as generation,
    ):
        await anext(generation)
        draining = asyncio.create_task(engine.drain(20))
        await asyncio.sleep(0.01)
        draining.cancel()
        await engine.drain(0)
        await asyncio.sleep(0)
        del draining
        gc.collect()
    assert not errors


async def test_closing_with_running_requests_ends_them() -> None:
    backend = toy_backend(decode_seconds=0.01)
    async with Engine.open(CONFIG, opener=opener(backend)) as engine:
        generation = engine.generate(ENDLESS)
        await generation.__aenter__()
        await anext(generation)
    assert backend.closed
    await asyncio.sleep(0)
    with pytest.raises(EngineFault):
        async for _ in generation:
            pass


async def test_a_model_that_does_not_open_leaves_no_thread() -> None:
    def broken(*_: object) -> ToyBackend:
        raise ModelError("no such thing")

    before = threading.active_count()
    with pytest.raises(ModelError, match="no such thing"):
        async with Engine.open(CONFIG, opener=broken):
            raise AssertionError("never opened")
    assert threading.active_count() <= before + 1, "asyncio's own worker may remain"
