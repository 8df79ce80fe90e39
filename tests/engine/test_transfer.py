"""What a slot ran last is saved, restored and erased, and nothing else changes."""

from __future__ import annotations

import asyncio
import time
from array import array
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineConfig, EngineFault, Finished, Request, RequestRefused, SamplingParams
from engine.memory import Store
from engine.memory.disk import Disk
from engine.memory.pieces import PIECE
from engine.memory.textfile import Damaged, Part, Reader, Writer
from engine.memory.transfer import Gathered, erase, gather, known, put
from tests.engine.test_same_as_alone import Bench
from tests.toy import VOCABULARY, ToyBackend, ToyContext, opener

EVER = 1e9
"""Seconds."""


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    random = Random(seed)
    return tuple(random.randrange(1, VOCABULARY) for _ in range(length))


def bench_of(*, partial: bool = True, store: int = 10**6, kept: Store | None = None) -> Bench:
    return Bench(ToyContext(cells=1000, rows=512, partial=partial), store=store, kept=kept)


def ask(bench: Bench, prompt: tuple[int, ...], salt: str = "") -> int:
    """Runs a request that only reads its prompt, and says how much of that was known."""
    key = len(bench.streams)
    bench.submit(key, Request(prompt=prompt, max_tokens=1, ignore_eos=True, salt=salt))
    bench.run()
    end = bench.ends[key]
    assert isinstance(end, Finished)
    return end.usage.cached


def gathered(bench: Bench, tokens: tuple[int, ...], salt: str = "") -> list[Part]:
    found = gather(bench.runner.cells, array("i", tokens), salt, 0, EVER)
    assert not found.more
    return found.parts


def spelled(parts: list[Part]) -> tuple[int, ...]:
    assert all(part.start == before.end for before, part in pairwise(parts))
    return tuple(token for part in parts for token in part.tokens)


# ── gathering and putting back ──


@pytest.mark.parametrize("length", [1, 31, 32, 33, 300])
@pytest.mark.parametrize("where", ["cells", "store", "both"])
def test_what_is_gathered_can_be_put_elsewhere(length: int, where: str) -> None:
    bench, tokens = bench_of(), text(length)
    ask(bench, tokens)
    if where != "cells":
        bench.runner.cells.reclaim(1000 if where == "store" else 1000 - length // 2)
    parts = gathered(bench, tokens)
    assert spelled(parts) == tokens
    other = bench_of()
    put(other.runner.cells, array("i", tokens), "", parts)
    other.runner.rest()
    assert ask(other, (*tokens, 7)) == length
    assert other.backend.context.computed == 1


def test_a_whole_state_is_one_part() -> None:
    bench, tokens = bench_of(partial=False), text(100)
    ask(bench, tokens)
    bench.runner.cells.reclaim(1000)
    (part,) = gathered(bench, tokens)
    assert (part.start, tuple(part.tokens)) == (0, tokens)
    other = bench_of(partial=False)
    put(other.runner.cells, array("i", tokens), "", [part])
    other.runner.rest()
    assert ask(other, (*tokens, 7)) == 100
    assert gathered(other, tokens[:50]) == []


def test_gathering_takes_no_longer_than_told_and_goes_on() -> None:
    bench, tokens = bench_of(), text(300)
    ask(bench, tokens)
    assert gather(bench.runner.cells, array("i", tokens), "", 0, 0.0) == Gathered([], True)
    rest = gather(bench.runner.cells, array("i", tokens), "", 5 * PIECE, EVER)
    assert (rest.parts[0].start, rest.parts[-1].end, rest.more) == (5 * PIECE, 300, False)


def test_what_is_missing_ends_what_is_gathered() -> None:
    bench, tokens = bench_of(store=0), text(300)
    ask(bench, tokens)
    bench.runner.cells.reclaim(1000 - 150)
    assert spelled(gathered(bench, tokens)) == tokens[:128]
    assert gathered(bench, tokens, "another salt") == []
    assert gathered(bench_of(store=0), tokens) == []


def test_what_was_cut_inside_a_piece_is_gathered_to_the_cut() -> None:
    bench, tokens = bench_of(), text(300)
    ask(bench, tokens)
    assert spelled(gathered(bench, (*tokens[:70], 9, 9, 9))) == tokens[:70]


def test_what_is_on_disk_alone_is_waited_for(tmp_path: Path) -> None:
    tokens = text(100)
    bench = bench_of(kept=Store(10**6, disk=Disk(tmp_path, "toy"), disk_most=10**6))
    ask(bench, tokens)
    bench.rest()
    bench.runner.close()
    again = bench_of(kept=Store(10**6, disk=Disk(tmp_path, "toy"), disk_most=10**6))
    parts: list[Part] = []
    more = True
    while more:
        start = parts[-1].end if parts else 0
        found, more = gather(again.runner.cells, array("i", tokens), "", start, EVER)
        parts += found
    assert spelled(parts) == tokens
    again.runner.close()


def test_pieces_that_there_are_already_stay() -> None:
    bench, tokens = bench_of(), text(100)
    ask(bench, tokens)
    parts = gathered(bench, tokens)
    bench.runner.cells.reclaim(1000)
    put(bench.runner.cells, array("i", tokens), "", parts)
    bench.runner.rest()
    assert known(bench.runner.cells, array("i", tokens), "") == 100


def test_what_finds_no_room_leaves_no_trace() -> None:
    bench, tokens = bench_of(), text(100)
    ask(bench, tokens)
    other = bench_of(store=1)
    put(other.runner.cells, array("i", tokens), "", gathered(bench, tokens))
    other.runner.rest()
    assert known(other.runner.cells, array("i", tokens), "") == 0


# ── erasing ──


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("where", ["cells", "store", "both", "part"])
def test_what_is_erased_is_known_no_more(where: str, partial: bool) -> None:
    bench, tokens = bench_of(partial=partial), text(100)
    cells = bench.runner.cells
    ask(bench, tokens)
    if where != "cells":
        cells.reclaim(1000 if where != "part" else 950)
    if where == "both":
        ask(bench, (*tokens, 7))
    assert erase(cells, array("i", (*tokens, 7) if where == "both" else tokens), "", ()) >= 100
    bench.runner.rest()
    assert known(cells, array("i", tokens), "") == 0
    assert cells.store is not None
    assert (cells.store.ram.bytes, len(cells.store.ram), cells.tree.cells) == (0, 0, 0)
    assert ask(bench, (*tokens, 8)) == 0


def test_what_others_begin_with_stays() -> None:
    bench, system = bench_of(), text(3 * PIECE)
    one, two = (*system, *text(40, 1)), (*system, *text(40, 2))
    for stored in (False, True):
        ask(bench, one)
        ask(bench, two)
        ask(bench, one, "another salt")
        if stored:
            bench.runner.cells.reclaim(1000)
        erased = erase(bench.runner.cells, array("i", one), "", ())
        assert erased == 40
        assert known(bench.runner.cells, array("i", two), "") == len(two)
        assert known(bench.runner.cells, array("i", one), "another salt") == len(one)
        bench.runner.rest()


def test_what_runs_stays() -> None:
    bench, tokens = bench_of(), text(100)
    bench.submit(0, Request(prompt=tokens, ignore_eos=True))
    bench.runner.step()
    (stream,) = bench.runner.running.values()
    assert erase(bench.runner.cells, array("i", tokens), "", {stream.held.seq}) == 0
    bench.runner.step()


# ── files ──


def part(start: int, *tokens: int) -> Part:
    return Part(start, array("i", tokens), np.frombuffer(bytes(tokens) * 3, np.uint8))


def written(path: Path, *parts: Part, salt: str = "sält") -> bytes:
    file = Writer(path, "toy", salt)
    file.write(parts)
    assert file.commit() == path.stat().st_size
    file.discard()
    return path.read_bytes()


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.bin"
    parts = [part(0, 1, 2, 3), part(3, 4), part(4, 5, 6)]
    content = written(path, *parts)
    reader = Reader(path, "toy")
    assert (reader.salt, reader.bytes) == ("sält", len(content))
    read = [*reader.read(10), *reader.read(10**6)]
    assert [(one.start, one.tokens, one.state.tolist()) for one in read] == [
        (one.start, one.tokens, one.state.tolist()) for one in parts
    ]
    assert reader.read(10) == reader.read(10) == []
    reader.close()
    assert [file.name for file in path.parent.iterdir()] == ["x.bin"]
    assert path.stat().st_mode & 0o77 == 0


def test_a_file_that_is_given_up_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = written(path, part(0, 1))
    file = Writer(path, "toy", "")
    file.write([part(0, 2)])
    file.discard()
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = written(path, part(0, 1, 2), part(2, 3))
    for wrong in (b"", b"x", content[:-1], content[:40], content + b"x", b"x" * 10_000):
        path.write_bytes(wrong)
        with pytest.raises(Damaged, match="torn"):
            Reader(path, "toy")
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(Damaged, match="torn"):
            Reader(path, "toy")
    path.write_bytes(content)
    with pytest.raises(Damaged, match="another model"):
        Reader(path, "other")


# ── the engine ──


def config(**memory: Any) -> EngineConfig:
    nobody: dict[str, object] = {"types": ["none"]}
    return EngineConfig.of(path="toy.gguf", slots=3, warmup=False, memory={"ram": 1, **memory}, speculation=nobody)


def backend(**options: Any) -> ToyBackend:
    return ToyBackend(ToyContext(cells=1000, **options))


async def read(engine: Engine, prompt: tuple[int, ...], tokens: int = 5, salt: str = "") -> Finished:
    sampling = SamplingParams(seed=1)
    request = Request(prompt=prompt, max_tokens=tokens, ignore_eos=True, salt=salt, sampling=sampling)
    async with engine.generate(request) as generation:
        updates = [update async for update in generation]
    assert isinstance(updates[-1], Finished)
    return updates[-1]


@pytest.mark.parametrize("partial", [True, False])
async def test_a_slot_outlives_the_engine(tmp_path: Path, partial: bool) -> None:
    prompt, path = text(100), tmp_path / "x"
    async with Engine.open(config(), opener=opener(backend(partial=partial))) as engine:
        assert (await read(engine, prompt, salt="me")).usage.cached == 0
        saved = await engine.save_slot(0, path)
        assert (saved.tokens, saved.bytes) == (104, path.stat().st_size)
    again = backend(partial=partial)
    async with Engine.open(config(), opener=opener(again)) as engine:
        restored = await engine.restore_slot(2, path)
        assert (restored.tokens, restored.bytes) == (104, saved.bytes)
        assert [state.tokens for state in await engine.slot_states()] == [0, 0, 104]
        if partial:
            assert (await read(engine, prompt, salt="me")).usage.cached == 99
            assert again.context.computed == 1 + 4
        assert (await read(engine, prompt)).usage.cached == 0, "it is of its salt alone"
        assert await engine.save_slot(2, tmp_path / "y") is not None
        assert (tmp_path / "y").read_bytes() == path.read_bytes()
        assert await engine.erase_slot(2) == 104
        with pytest.raises(RequestRefused, match="nothing yet"):
            await engine.save_slot(2, path)
        assert await engine.erase_slot(2) == 0


async def test_slots_are_taken_from_the_lowest_on() -> None:
    toy = backend()
    async with Engine.open(config(), opener=opener(toy)) as engine:
        assert [(state.busy, state.ran) for state in await engine.slot_states()] == [(False, None)] * 3
        async with engine.generate(Request(prompt=text(10), ignore_eos=True)) as first:
            await anext(first)
            async with engine.generate(Request(prompt=text(20, 1), max_tokens=900, ignore_eos=True)) as second:
                await anext(second)
                one, two, three = await engine.slot_states()
                assert (one.busy, two.busy, three.busy) == (True, True, False)
                assert one.ran is not None
                assert two.ran is not None
                assert (one.ran.prompt, one.ran.most) == (10, None)
                assert (two.ran.prompt, two.ran.most, two.ran.processed) == (20, 900, 20)
                with pytest.raises(RequestRefused, match="busy"):
                    await engine.erase_slot(0)
                with pytest.raises(RequestRefused, match="busy"):
                    await engine.restore_slot(1, Path("x"))
        await read(engine, text(5, 2))
        one, two, _ = await engine.slot_states()
        assert (one.busy, two.busy) == (False, False)
        assert one.ran is not None
        assert (one.ran.prompt, one.ran.emitted, one.tokens) == (5, 5, 9)
        assert two.ran is not None
        assert two.ran.prompt == 20


async def test_a_slot_that_runs_is_saved_as_far_as_it_is(tmp_path: Path) -> None:
    async with (
        Engine.open(config(), opener=opener(backend())) as engine,
        engine.generate(Request(prompt=text(70), ignore_eos=True)) as generation,
    ):
        await anext(generation)
        assert (await engine.save_slot(0, tmp_path / "x")).tokens >= 70


async def test_what_cannot_be_restored(tmp_path: Path) -> None:
    path = tmp_path / "x"
    async with Engine.open(config(), opener=opener(backend())) as engine:
        await read(engine, text(100))
        await engine.save_slot(0, path)
        with pytest.raises(RequestRefused, match="no slot 3"):
            await engine.restore_slot(3, path)
        with pytest.raises(RequestRefused, match="no file 'y'"):
            await engine.restore_slot(0, tmp_path / "y")
        with pytest.raises(RequestRefused, match="no file"):
            await engine.restore_slot(0, tmp_path)
        (tmp_path / "torn").write_bytes(path.read_bytes()[:-1])
        with pytest.raises(RequestRefused, match="torn"):
            await engine.restore_slot(0, tmp_path / "torn")
        written(tmp_path / "gap", part(0, 1), part(2, 3))
        with pytest.raises(RequestRefused, match="another model"):
            await engine.restore_slot(0, tmp_path / "gap")
        assert (await engine.slot_states())[0].tokens == 104
        with pytest.raises(EngineFault, match="cannot be written"):
            await engine.save_slot(0, path / "below a file")
    async with Engine.open(config(), opener=opener(backend(partial=False))) as engine:
        with pytest.raises(RequestRefused, match="another model"):
            await engine.restore_slot(0, path)
    async with Engine.open(config(ram=0), opener=opener(backend())) as engine:
        with pytest.raises(RequestRefused, match="--cache-ram"):
            await engine.restore_slot(0, path)
        await read(engine, text(100))
        await engine.save_slot(0, tmp_path / "without a store")


async def test_streams_go_on_while_a_slot_is_saved_and_restored(tmp_path: Path) -> None:
    async with Engine.open(config(), opener=opener(backend())) as engine:
        alone = Request(prompt=text(50), max_tokens=200, ignore_eos=True, sampling=SamplingParams(seed=1))

        async def ids() -> list[int]:
            async with engine.generate(alone) as generation:
                return [token async for update in generation for token in getattr(update, "ids", ())]

        wanted = await ids()
        await read(engine, text(400, 1))
        asking = [asyncio.ensure_future(ids()) for _ in range(2)]
        await asyncio.sleep(0)
        await engine.save_slot(0, tmp_path / "x")
        await engine.restore_slot(2, tmp_path / "x")
        assert await asyncio.gather(*asking) == [wanted] * 2


# ── asking the engine's thread ──


async def test_being_asked_keeps_nobody_from_tidying_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = backend()
    save = toy.context.save

    def slow(seq: int, start: int, end: int) -> Any:
        time.sleep(0.01)
        return save(seq, start, end)

    def wait() -> None:
        until = time.monotonic() + 10
        while len(list(tmp_path.glob("*/*.piece"))) < 10:
            assert time.monotonic() < until, "nothing more is saved"
            time.sleep(0.01)

    monkeypatch.setattr(toy.context, "save", slow)
    async with Engine.open(config(disk=str(tmp_path)), opener=opener(toy)) as engine:
        await read(engine, text(10 * PIECE), tokens=1)
        for _ in range(5):
            await engine.slot_states()
        await asyncio.to_thread(wait)


async def test_a_bug_in_what_is_asked_ends_the_engine_and_all_who_wait() -> None:
    async with Engine.open(config(), opener=opener(backend())) as engine:
        asking = [asyncio.ensure_future(engine.ask(lambda runner: 1 // 0)) for _ in range(3)]
        for result in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(result, EngineFault)
            assert "division" in str(result)
        with pytest.raises(EngineFault, match="division"):
            await engine.slot_states()


async def test_who_still_waits_at_the_end_is_told() -> None:
    toy = backend()
    async with Engine.open(config(), opener=opener(toy)) as engine:
        engine._inbox.put(None)
        late = asyncio.ensure_future(engine.slot_states())
        gone = asyncio.ensure_future(engine.slot_states())
        await asyncio.sleep(0)
        gone.cancel()
    with pytest.raises(EngineFault, match="shutting down"):
        await late
    with pytest.raises(EngineFault, match="shutting down"):
        await engine.slot_states()
    assert toy.closed
