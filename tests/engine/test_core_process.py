"""An engine in a process of its own: the same outputs as in this process, and one terminal update if it dies."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine import (
    ContextExceeded,
    Draining,
    Engine,
    EngineConfig,
    EngineFault,
    Finished,
    JsonObject,
    JsonSchema,
    ModelError,
    Overloaded,
    Request,
    RequestRefused,
    SamplingParams,
    Tokens,
)
from engine.backend import Backend, LoadProgress
from engine.contract import EngineError, ShutDown
from engine.core_process import ProcessCore
from engine.kv.changes import BlockChange
from engine.message_link import MessageLink, MessageSender
from engine.step import EngineCore
from engine.text import _WholeText
from engine.watchdog import EngineStalled

PROMPT = tuple(range(300, 340))


def config(**options: Any) -> EngineConfig:
    return EngineConfig.of(
        path="sim.gguf", slots=4, context=4 * 512, sim={"on": True, "cost": "free"}, memory={"ram": 64}, **options
    )


def in_process(**options: Any) -> EngineConfig:
    return config(cpu={"engine_process": True}, **options)


async def outcome(engine: Engine, request: Request) -> tuple[list[Tokens], Finished]:
    async with engine.generate(request) as generation:
        *updates, end = [update async for update in generation]
    assert isinstance(end, Finished)
    return [update for update in updates if isinstance(update, Tokens)], end


async def outputs(engine: Engine) -> list[Any]:
    """Returns what clients get from requests of several kinds, at the same time."""
    grammar = await engine.compile(JsonObject())
    sampled = SamplingParams(temperature=0.8, seed=7)
    stop = engine.vocab.piece((await outcome(engine, Request(prompt=PROMPT, max_tokens=9)))[0][0].ids[0]).decode()
    requests = [
        Request(prompt=PROMPT, max_tokens=40, sampling=sampled, logprobs=2),
        Request(prompt=PROMPT[5:], max_tokens=40, sampling=sampled, grammar=grammar),
        Request(prompt=PROMPT, max_tokens=400, sampling=SamplingParams(temperature=0), stop=(stop,)),
        Request(prompt=PROMPT, max_tokens=9, sampling=sampled, stop=("zzz",), stop_scope=lambda: _WholeText()),
    ]
    found = await asyncio.gather(*(outcome(engine, each) for each in requests))
    return [
        (
            [token for update in updates for token in update.ids],
            "".join(update.text for update in updates),
            [logprob for update in updates for logprob in update.logprobs],
            (end.reason, end.stop, end.usage.completion),
        )
        for updates, end in found
    ]


async def test_outputs_are_those_of_an_engine_in_this_process(tmp_path: Path) -> None:
    async with Engine.open(config()) as engine:
        expected = await outputs(engine)
    changes: list[BlockChange] = []
    shares: list[float] = []
    async with Engine.open(in_process(), progress=shares.append) as engine:
        assert engine.process_id != os.getpid()
        await engine.report_kv_changes(changes.extend)
        assert await outputs(engine) == expected
        assert shares == [1.0]
        assert await engine.query(num_uncollected) > 10_000
        with pytest.raises(RequestRefused) as refused:
            await engine.compile(JsonSchema(b'{"type": "object", "properties": {"a": {"$ref": "#/b"}}}'))
        assert refused.value.field
        async with engine.generate(Request(prompt=PROMPT, max_tokens=400)) as cancelled:
            await anext(cancelled)
        async with asyncio.timeout(20):
            while any(slot.busy for slot in await engine.slot_states()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        saved = await engine.save_slot(0, tmp_path / "slot")
        assert (await engine.restore_slot(1, tmp_path / "slot")).tokens == saved.tokens
        assert (await engine.slot_states())[1].tokens == saved.tokens
        await engine.erase_slot(1)
        with pytest.raises(RequestRefused, match="empty"):
            await engine.save_slot(1, tmp_path / "slot")
        await until(lambda: engine.stats().requests_finished["cancelled"] == 1 and bool(changes))
        assert engine.stats().grammar.counts
    with pytest.raises(EngineFault, match="shutting down"):
        await engine.slot_states()


def num_uncollected(core: EngineCore) -> int:
    return gc.get_freeze_count()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_requests_of_a_process_that_stalls_and_dies_get_one_terminal_update_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.core_process._MISSED_HEARTBEATS", 0.1)
    async with Engine.open(in_process(stall_timeout=0.1)) as engine:
        grammar = await engine.compile(JsonObject())
        requests = [Request(prompt=PROMPT, max_tokens=450, ignore_eos=True, grammar=each) for each in (None, grammar)]
        generations = [engine.generate(request) for request in requests * 3]
        for generation in generations:
            await generation.__aenter__()
        await anext(generations[0])
        assert engine.process_id is not None
        os.kill(engine.process_id, signal.SIGSTOP)
        await until(lambda: isinstance(engine.stall, EngineStalled))
        os.kill(engine.process_id, signal.SIGKILL)
        for generation in generations:
            with pytest.raises(EngineFault, match="failed") as fault:
                _ = [update async for update in generation]
            assert fault.value.fatal
            assert [update async for update in generation] == []
            await generation.__aexit__(None, None, None)
        assert engine.failed.is_set()
        with pytest.raises(EngineFault):
            await engine.compile(JsonObject())
        with pytest.raises(EngineFault):
            await engine.slot_states()
        with pytest.raises(EngineFault):
            await engine.generate(requests[0]).__aenter__()
        await engine.drain(10.0)
    assert "SIGKILL" in caplog.text


async def test_requests_and_drains_of_a_process_that_hangs_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CLOSE_SECONDS", "HANG_SECONDS", "_STOP_SECONDS"):
        monkeypatch.setattr(f"engine.core_process.{name}", 0.2)
    monkeypatch.setattr("engine.engine.FAIL_SECONDS", 0.1)
    engine: Any
    async with Engine.open(in_process()) as engine:
        engine._core.embeddings = cast("Any", "a model")
        drained, open_at_end = (engine.generate(Request(prompt=PROMPT, max_tokens=450)) for _ in range(2))
        await drained.__aenter__()
        os.kill(engine.process_id, signal.SIGSTOP)
        async with asyncio.timeout(5):
            await engine.drain(0.0)
        with pytest.raises(ShutDown):
            _ = [update async for update in drained]
        engine._refusal = None
        await open_at_end.__aenter__()
    with pytest.raises(EngineFault, match="failed"):
        _ = [update async for update in open_at_end]
    assert engine.fault.fatal
    assert "is killed" in caplog.text


def load_slowly(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> Backend:
    """Loads until the load is cancelled."""
    progress(0.5)
    while keep_loading():
        time.sleep(0.01)
    raise ModelError("cancelled")


async def test_a_load_ends_when_it_is_cancelled_and_a_signal_to_all_processes_ends_none() -> None:
    loads = asyncio.Event()

    async def load() -> None:
        async with Engine.open(in_process(), opener=load_slowly, progress=lambda _: loads.set()):
            pass

    loading = asyncio.create_task(load())
    await until(lambda: bool(multiprocessing.active_children()))
    (process,) = multiprocessing.active_children()
    assert process.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    await asyncio.wait_for(loads.wait(), 20)
    os.kill(process.pid, signal.SIGTERM)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(loading, 10)
    assert process.exitcode == 0


class Unimportable:
    """A function that can be pickled, but not unpickled."""

    def __call__(self, core: EngineCore) -> None:
        pass

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


async def test_a_function_that_cannot_be_pickled_or_imported_fails_one_query() -> None:
    async with Engine.open(in_process()) as engine:
        with pytest.raises((pickle.PicklingError, AttributeError)):
            await engine.query(lambda core: None)
        with pytest.raises(EngineFault, match="has failed") as fault:
            await engine.query(Unimportable())
        assert not fault.value.fatal
        assert len(await engine.slot_states()) == 4


def end_process(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> Backend:
    os._exit(7)


def break_process(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> Backend:
    raise OSError("broken")


async def test_errors_of_the_start_name_the_reason() -> None:
    with pytest.raises(ModelError, match=r"none\.gguf"):
        async with Engine.open(EngineConfig.of(path="none.gguf", cpu={"engine_process": True})):
            pass
    with pytest.raises(ModelError, match="exit code 7"):
        async with Engine.open(in_process(), opener=end_process):
            pass
    with pytest.raises(EngineFault, match="its log has the reason"):
        async with Engine.open(in_process(), opener=break_process):
            pass
    with pytest.raises(ModelError, match="--mmproj"):
        async with Engine.open(in_process(media={"path": "x.gguf"})):
            pass


async def test_the_vocabularies_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.core_process.open_vocabulary", lambda *arguments: nullcontext(arguments))
    core: Any = ProcessCore(cast("Any", None), 0.0)
    core.facts = SimpleNamespace(info=SimpleNamespace(path="a.gguf"))
    load: dict[str, object] = {"override_kv": ("tokenizer.ggml.add_bos_token=bool:true",)}
    for own in ("", "b.gguf"):
        core._open_vocabularies(EngineConfig.of(path="a.gguf", load=load, embedding={"path": own}), own, ExitStack())
        assert core.vocab == (Path("a.gguf"), load["override_kv"])
        assert core.embeddings.vocab == ((Path(own),) if own else core.vocab)


async def test_drained_requests_end_also_while_their_grammar_is_compiled() -> None:
    async with Engine.open(in_process()) as engine:
        grammar = await engine.compile(JsonObject())
        requests = [Request(prompt=PROMPT, max_tokens=450, ignore_eos=True, grammar=each) for each in (None, grammar)]
        generations = [engine.generate(request) for request in requests * 2]
        for generation in generations:
            await generation.__aenter__()
        await engine.drain(0.0)
        for generation in generations:
            with pytest.raises(EngineFault, match="shutting down"):
                _ = [update async for update in generation]
        with pytest.raises(Draining):
            await engine.compile(JsonObject())


@pytest.mark.parametrize("from_thread", [False, True])
async def test_messages_arrive_whole_and_in_order(from_thread: bool) -> None:
    messages = ["a" * size for size in (0, 1, 5, 70_000, 3_000_000)]
    ends, received, ended = socket.socketpair(), list[Any](), asyncio.Event()
    other = await MessageLink.connect(ends[1], received.append, ended.set)
    link = await MessageLink.connect(ends[0], received.append, lambda: None)
    sender = MessageSender(ends[0]) if from_thread else link
    with pytest.raises((pickle.PicklingError, AttributeError)):
        sender.send(lambda: None)
    for message in messages:
        await asyncio.to_thread(sender.send, message) if from_thread else sender.send(message)
    link.close()
    if isinstance(sender, MessageSender):
        sender._end.close()
    else:
        sender.send("too late")
    await asyncio.wait_for(ended.wait(), 20)
    assert received == messages
    pieces = b"".join(len(data).to_bytes(8, "little") + data for data in map(pickle.dumps, messages[:3]))
    received.clear()
    for index in range(len(pieces)):
        other.data_received(pieces[index : index + 1])
    assert received == messages[:3]


@pytest.mark.parametrize(
    "error",
    [
        *(ContextExceeded(5, 3, 2), Overloaded(3.5), Draining(), EngineFault("x", fatal=True)),
        *(RequestRefused("m", field="f"), EngineStalled(3.0)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled(error: EngineError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
