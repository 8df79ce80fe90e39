"""The last sequence of a slot is saved, restored and erased, and nothing else changes."""

from __future__ import annotations

import asyncio
import time
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineConfig, EngineFault, Finished, Request, RequestRefused, SamplingParams
from engine.checksummed import DamagedFile
from engine.contract import ENGINE_FAILED
from engine.kv import Offload
from engine.kv.block import BLOCK_TOKENS
from engine.kv.disk import Disk
from engine.kv.sequence_file import SequencePart, SequenceReader, SequenceWriter
from engine.kv.transfer import Exported, Transfer
from tests.engine.test_memory import prompt_of
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, context_of
from tests.toy import ToyBackend, opener

# A time limit that no test reaches.
LONG_SECONDS = 1e9

both = pytest.mark.parametrize("unified", LAYOUTS)


def bench_of(
    *, unified: bool = True, partial: bool = True, ram: int = 10**6, offload: Offload | None = None
) -> CoreBench:
    return CoreBench(context_of(unified, 1000, rows=512, partial=partial), ram=ram, offload=offload)


def run_request(bench: CoreBench, prompt: tuple[int, ...], salt: str = "") -> int:
    """Runs a request that emits one token. Returns the number of cached prompt tokens."""
    key = len(bench.sequences)
    bench.submit(key, Request(prompt=prompt, max_tokens=1, ignore_eos=True, salt=salt))
    bench.run()
    end = bench.ends[key]
    assert isinstance(end, Finished)
    return end.usage.cached


def transfer_of(bench: CoreBench) -> Transfer:
    return bench.core.kv.transfer


def export_parts(bench: CoreBench, tokens: tuple[int, ...], salt: str = "") -> list[SequencePart]:
    found = transfer_of(bench).export(array("i", tokens), salt, 0, LONG_SECONDS)
    assert not found.more
    return found.parts


def import_parts(bench: CoreBench, tokens: tuple[int, ...], parts: list[SequencePart]) -> None:
    transfer_of(bench).put(array("i", tokens), "", parts)
    bench.core.check_idle()


def known(bench: CoreBench, tokens: tuple[int, ...], salt: str = "") -> int:
    return transfer_of(bench).known_length(array("i", tokens), salt)


def tokens_of(parts: list[SequencePart]) -> tuple[int, ...]:
    assert all(part.start == before.end for before, part in pairwise(parts))
    return tuple(token for part in parts for token in part.tokens)


# ── export and import ──


@both
@pytest.mark.parametrize("length", [1, 31, 32, 33, 300])
@pytest.mark.parametrize("where", ["cells", "RAM", "both"])
def test_exported_parts_can_be_imported_elsewhere(length: int, where: str, unified: bool) -> None:
    bench, tokens = bench_of(unified=unified), prompt_of(length)
    run_request(bench, tokens)
    if where == "RAM" or (where == "both" and not unified):
        bench.core.kv.drop_idle()
    if where == "both" and unified:
        bench.core.kv.evict(1000 - length // 2)
    elif where == "both":
        run_request(bench, tokens[: max(1, length // 2)])
    parts = export_parts(bench, tokens)
    assert tokens_of(parts) == tokens
    other = bench_of(unified=unified)
    import_parts(other, tokens, parts)
    assert run_request(other, (*tokens, 7)) == length
    assert other.backend.context.computed == 1


@both
def test_a_whole_state_is_one_part(unified: bool) -> None:
    bench, tokens = bench_of(unified=unified, partial=False), prompt_of(100)
    run_request(bench, tokens)
    bench.core.kv.drop_idle()
    (part,) = export_parts(bench, tokens)
    assert (part.start, tuple(part.tokens)) == (0, tokens)
    other = bench_of(unified=unified, partial=False)
    import_parts(other, tokens, [part])
    assert run_request(other, (*tokens, 7)) == 100
    assert export_parts(other, tokens[:50]) == []


@both
def test_an_export_stops_in_time_and_continues(unified: bool) -> None:
    bench, tokens = bench_of(unified=unified), prompt_of(300)
    run_request(bench, tokens)
    assert transfer_of(bench).export(array("i", tokens), "", 0, 0.0) == Exported([], True)
    rest = transfer_of(bench).export(array("i", tokens), "", 5 * BLOCK_TOKENS, LONG_SECONDS)
    assert (rest.parts[0].start, rest.parts[-1].end, rest.more) == (5 * BLOCK_TOKENS, 300, False)


def test_an_export_ends_at_missing_cells() -> None:
    bench, tokens = bench_of(ram=0), prompt_of(300)
    run_request(bench, tokens)
    bench.core.kv.evict(1000 - 150)
    assert tokens_of(export_parts(bench, tokens)) == tokens[:128]
    assert export_parts(bench, tokens, "another salt") == []
    assert export_parts(bench_of(ram=0), tokens) == []


@both
def test_a_prefix_that_ends_inside_a_block_is_exported_to_its_end(unified: bool) -> None:
    bench, tokens = bench_of(unified=unified), prompt_of(300)
    run_request(bench, tokens)
    assert tokens_of(export_parts(bench, (*tokens[:70], 9, 9, 9))) == tokens[:70]


def test_blocks_on_disk_alone_are_read_first(tmp_path: Path) -> None:
    tokens = prompt_of(100)
    bench = bench_of(offload=Offload(10**6, disk=Disk(tmp_path, "toy"), disk_bytes=10**6))
    run_request(bench, tokens)
    bench.offload_idle()
    bench.core.close()
    again = bench_of(offload=Offload(10**6, disk=Disk(tmp_path, "toy"), disk_bytes=10**6))
    parts: list[SequencePart] = []
    more = True
    while more:
        start = parts[-1].end if parts else 0
        found, more = transfer_of(again).export(array("i", tokens), "", start, LONG_SECONDS)
        parts += found
    assert tokens_of(parts) == tokens
    again.core.close()


@both
def test_blocks_that_are_stored_already_stay(unified: bool) -> None:
    bench, tokens = bench_of(unified=unified), prompt_of(100)
    run_request(bench, tokens)
    parts = export_parts(bench, tokens)
    bench.core.kv.drop_idle()
    import_parts(bench, tokens, parts)
    assert known(bench, tokens) == 100


@both
def test_importing_parts_without_room_changes_nothing(unified: bool) -> None:
    bench, tokens = bench_of(unified=unified), prompt_of(100)
    run_request(bench, tokens)
    other = bench_of(unified=unified, ram=1)
    import_parts(other, tokens, export_parts(bench, tokens))
    assert known(other, tokens) == 0


# ── erasing ──


@both
@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("where", ["cells", "RAM", "both", "part"])
def test_erased_tokens_are_no_longer_known(where: str, partial: bool, unified: bool) -> None:
    bench, tokens = bench_of(unified=unified, partial=partial), prompt_of(100)
    kv = bench.core.kv
    run_request(bench, tokens)
    if where in ("RAM", "both"):
        kv.drop_idle()
    elif where == "part":
        kv.evict(950)
    if where == "both":
        run_request(bench, (*tokens, 7))
    assert transfer_of(bench).erase(array("i", (*tokens, 7) if where == "both" else tokens), "") >= 100
    bench.core.check_idle()
    assert known(bench, tokens) == 0
    assert (kv.stats().ram_bytes, kv.stats().used) == (0, 0)
    assert run_request(bench, (*tokens, 8)) == 0


@both
def test_shared_beginnings_stay(unified: bool) -> None:
    bench, system = bench_of(unified=unified), prompt_of(3 * BLOCK_TOKENS)
    one, two = (*system, *prompt_of(40, 1)), (*system, *prompt_of(40, 2))
    for stored in (False, True):
        run_request(bench, one)
        run_request(bench, two)
        run_request(bench, one, "another salt")
        if stored:
            bench.core.kv.drop_idle()
        assert transfer_of(bench).erase(array("i", one), "") == 40
        assert known(bench, two) == len(two)
        assert known(bench, one, "another salt") == len(one)
        bench.core.check_idle()


@both
def test_running_sequences_stay(unified: bool) -> None:
    bench, tokens = bench_of(unified=unified), prompt_of(100)
    bench.submit(0, Request(prompt=tokens, ignore_eos=True))
    bench.core.step()
    assert transfer_of(bench).erase(array("i", tokens), "") == 0
    bench.core.step()
    bench.check()


# ── files ──


def part(start: int, *tokens: int) -> SequencePart:
    return SequencePart(start, array("i", tokens), np.frombuffer(bytes(tokens) * 3, np.uint8))


def written(path: Path, *parts: SequencePart, salt: str = "sält") -> bytes:
    file = SequenceWriter(path, "toy", salt)
    file.write(parts)
    assert file.commit() == path.stat().st_size
    file.discard()
    return path.read_bytes()


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.bin"
    parts = [part(0, 1, 2, 3), part(3, 4), part(4, 5, 6)]
    content = written(path, *parts)
    reader = SequenceReader(path, "toy")
    assert (reader.salt, reader.bytes) == ("sält", len(content))
    generate = [*reader.read(10), *reader.read(10**6)]
    assert [(one.start, one.tokens, one.state.tolist()) for one in generate] == [
        (one.start, one.tokens, one.state.tolist()) for one in parts
    ]
    assert reader.read(10) == reader.read(10) == []
    reader.close()
    assert [file.name for file in path.parent.iterdir()] == ["x.bin"]
    assert path.stat().st_mode & 0o77 == 0


def test_a_discarded_file_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = written(path, part(0, 1))
    file = SequenceWriter(path, "toy", "")
    file.write([part(0, 2)])
    file.discard()
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = written(path, part(0, 1, 2), part(2, 3))
    for wrong in (b"", b"x", content[:-1], content[:40], content + b"x", b"x" * 10_000):
        path.write_bytes(wrong)
        with pytest.raises(DamagedFile, match="torn"):
            SequenceReader(path, "toy")
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(DamagedFile, match="torn"):
            SequenceReader(path, "toy")
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="another model"):
        SequenceReader(path, "other")


# ── the engine ──


def config(**memory: Any) -> EngineConfig:
    off: dict[str, object] = {"types": ["none"]}
    return EngineConfig.of(path="toy.gguf", slots=3, warmup=False, memory={"ram": 1, **memory}, speculation=off)


def backend(*, unified: bool = True, **options: Any) -> ToyBackend:
    return ToyBackend(context_of(unified, 1000, slots=3, **options))


async def generate(
    engine: Engine, prompt: tuple[int, ...], tokens: int = 5, salt: str = "", slot: int | None = None
) -> Finished:
    sampling = SamplingParams(seed=1)
    request = Request(prompt=prompt, max_tokens=tokens, ignore_eos=True, salt=salt, sampling=sampling, slot=slot)
    async with engine.generate(request) as generation:
        updates = [update async for update in generation]
    assert isinstance(updates[-1], Finished)
    return updates[-1]


@both
@pytest.mark.parametrize("partial", [True, False])
async def test_a_slot_outlives_the_engine(tmp_path: Path, partial: bool, unified: bool) -> None:
    prompt, path = prompt_of(100), tmp_path / "x"
    async with Engine.open(config(), opener=opener(backend(unified=unified, partial=partial))) as engine:
        assert (await generate(engine, prompt, salt="me")).usage.cached == 0
        saved = await engine.save_slot(0, path)
        assert (saved.tokens, saved.bytes) == (104, path.stat().st_size)
    again = backend(unified=unified, partial=partial)
    async with Engine.open(config(), opener=opener(again)) as engine:
        restored = await engine.restore_slot(2, path)
        assert (restored.tokens, restored.bytes) == (104, saved.bytes)
        assert [state.tokens for state in await engine.slot_states()] == [0, 0, 104]
        if partial:
            assert (await generate(engine, prompt, salt="me")).usage.cached == 99
            assert again.context.computed == 1 + 4
        assert (await generate(engine, prompt)).usage.cached == 0, "the slot belongs to the salt `me`"
        assert await engine.save_slot(2, tmp_path / "y") is not None
        assert (tmp_path / "y").read_bytes() == path.read_bytes()
        assert await engine.erase_slot(2) == 104
        with pytest.raises(RequestRefused, match="Slot 2 is empty"):
            await engine.save_slot(2, path)
        assert await engine.erase_slot(2) == 0


@both
async def test_a_request_runs_in_the_slot_that_it_prefers(tmp_path: Path, unified: bool) -> None:
    first, second = prompt_of(100), prompt_of(80, 1)
    toy = backend(unified=unified)
    async with Engine.open(config(ram=0), opener=opener(toy)) as engine:
        assert (await generate(engine, first, slot=2)).slot == 2
        assert (await generate(engine, second, slot=1)).slot == 1
        assert (await engine.save_slot(2, tmp_path / "x")).tokens == 104
        assert (await generate(engine, prompt_of(50, 2), slot=1)).slot == 1
        assert [state.tokens for state in await engine.slot_states()] == [0, 54, 104]
        assert (await generate(engine, first, slot=0)).usage.cached == 99, "another slot's prefix is shared"
        assert await engine.erase_slot(2) + await engine.erase_slot(0) == 104
        assert (await generate(engine, first, slot=2)).usage.cached <= 1
        async with engine.generate(Request(prompt=prompt_of(10, 3), ignore_eos=True, slot=1)) as running:
            await anext(running)
            assert (await generate(engine, second, slot=1)).slot == 0, "the lowest free slot instead of a busy one"
        with pytest.raises(RequestRefused, match="no slot 3") as caught:
            engine.generate(Request(prompt=(1,), slot=3))
        assert caught.value.field == "id_slot"


async def test_the_lowest_free_slot_is_taken() -> None:
    toy = backend()
    async with Engine.open(config(), opener=opener(toy)) as engine:
        assert [(state.busy, state.request) for state in await engine.slot_states()] == [(False, None)] * 3
        async with engine.generate(Request(prompt=prompt_of(10), ignore_eos=True)) as first:
            await anext(first)
            async with engine.generate(Request(prompt=prompt_of(20, 1), max_tokens=900, ignore_eos=True)) as second:
                await anext(second)
                one, two, three = await engine.slot_states()
                assert (one.busy, two.busy, three.busy) == (True, True, False)
                assert one.request is not None
                assert two.request is not None
                assert (one.request.prompt, one.request.max_tokens) == (10, None)
                assert (two.request.prompt, two.request.max_tokens, two.request.processed) == (20, 900, 20)
                with pytest.raises(RequestRefused, match="busy"):
                    await engine.erase_slot(0)
                with pytest.raises(RequestRefused, match="busy"):
                    await engine.restore_slot(1, Path("x"))
        await generate(engine, prompt_of(5, 2))
        one, two, _ = await engine.slot_states()
        assert (one.busy, two.busy) == (False, False)
        assert one.request is not None
        assert (one.request.prompt, one.request.emitted, one.tokens) == (5, 5, 9)
        assert two.request is not None
        assert two.request.prompt == 20


async def test_a_running_slot_is_saved_as_far_as_it_is_computed(tmp_path: Path) -> None:
    async with (
        Engine.open(config(), opener=opener(backend())) as engine,
        engine.generate(Request(prompt=prompt_of(70), ignore_eos=True)) as generation,
    ):
        await anext(generation)
        assert (await engine.save_slot(0, tmp_path / "x")).tokens >= 70


async def test_files_that_cannot_be_restored(tmp_path: Path) -> None:
    path = tmp_path / "x"
    async with Engine.open(config(), opener=opener(backend())) as engine:
        await generate(engine, prompt_of(100))
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
        (tmp_path / "theirs").write_bytes(b"GGUF of a model")
        with pytest.raises(RequestRefused, match="is not a slot file"):
            await engine.save_slot(0, tmp_path / "theirs")
        assert (tmp_path / "theirs").read_bytes() == b"GGUF of a model"
    async with Engine.open(config(), opener=opener(backend(partial=False))) as engine:
        with pytest.raises(RequestRefused, match="another model"):
            await engine.restore_slot(0, path)
    async with Engine.open(config(ram=0), opener=opener(backend())) as engine:
        with pytest.raises(RequestRefused, match="--cache-ram"):
            await engine.restore_slot(0, path)
        await generate(engine, prompt_of(100))
        await engine.save_slot(0, tmp_path / "without a tier")


@both
async def test_requests_continue_while_a_slot_is_saved_and_restored(tmp_path: Path, unified: bool) -> None:
    async with Engine.open(config(), opener=opener(backend(unified=unified))) as engine:
        alone = Request(prompt=prompt_of(50), max_tokens=200, ignore_eos=True, sampling=SamplingParams(seed=1))

        async def ids() -> list[int]:
            async with engine.generate(alone) as generation:
                return [token async for update in generation for token in getattr(update, "ids", ())]

        wanted = await ids()
        await generate(engine, prompt_of(400, 1))
        asking = [asyncio.ensure_future(ids()) for _ in range(2)]
        await asyncio.sleep(0)
        await engine.save_slot(0, tmp_path / "x")
        await engine.restore_slot(2, tmp_path / "x")
        assert await asyncio.gather(*asking) == [wanted] * 2


# ── queries to the engine thread ──


async def test_queries_do_not_stop_idle_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = backend()
    save = toy.context.save

    def slow(seq: int) -> Any:
        time.sleep(0.01)
        return save(seq)

    def wait() -> None:
        until = time.monotonic() + 10
        while len(list(tmp_path.glob("*/*.block"))) < 10:
            assert time.monotonic() < until, "nothing more is saved"
            time.sleep(0.01)

    monkeypatch.setattr(toy.context, "save", slow)
    async with Engine.open(config(disk=str(tmp_path)), opener=opener(toy)) as engine:
        await generate(engine, prompt_of(10 * BLOCK_TOKENS), tokens=1)
        for _ in range(5):
            await engine.slot_states()
        await asyncio.to_thread(wait)


async def test_a_bug_in_a_query_ends_the_engine_and_all_queries() -> None:
    async with Engine.open(config(), opener=opener(backend())) as engine:
        asking = [asyncio.ensure_future(engine.query(lambda core: 1 // 0)) for _ in range(3)]
        for result in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(result, EngineFault)
            assert str(result) == ENGINE_FAILED
        with pytest.raises(EngineFault, match=ENGINE_FAILED):
            await engine.slot_states()


async def test_queries_that_are_open_at_the_end_fail() -> None:
    toy = backend()
    engine: Any
    async with Engine.open(config(), opener=opener(toy)) as engine:
        engine._core._thread.inbox.put(None)
        late = asyncio.ensure_future(engine.slot_states())
        gone = asyncio.ensure_future(engine.slot_states())
        await asyncio.sleep(0)
        gone.cancel()
    with pytest.raises(EngineFault, match="shutting down"):
        await late
    with pytest.raises(EngineFault, match="shutting down"):
        await engine.slot_states()
    assert toy.closed
