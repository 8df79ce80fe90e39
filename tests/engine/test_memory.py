"""Prefixes in cells, in RAM and on disk: moving them between the tiers never changes a request's tokens."""

from __future__ import annotations

import time
from array import array
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from engine.backend import NoFreeCells
from engine.contract import Finished, FinishReason, Request, SamplingParams
from engine.kv import Costs, Offload, idle, offloader
from engine.kv.block import BLOCK_TOKENS
from engine.kv.disk import Disk
from engine.speculate import LastStep
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, Oracle, alone, context_of, draw_request
from tests.sizes import sized
from tests.toy import VOCABULARY, ToyContext

# Bytes of a token in the toy's states.
TOKEN_BYTES = 4

both = pytest.mark.parametrize("unified", LAYOUTS)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Returns `length` random tokens, drawn with `seed`."""
    random = Random(seed)
    return tuple(random.randrange(1, VOCABULARY) for _ in range(length))


def finished(bench: CoreBench, key: int) -> Finished:
    """Returns the terminal update of a request, which must not have failed."""
    end = bench.ends[key]
    assert isinstance(end, Finished), end
    return end


def run_request(bench: CoreBench, key: int, prompt: tuple[int, ...], tokens: int = 1) -> Finished:
    """Runs a request to its end and returns its terminal update."""
    bench.submit(key, Request(prompt=prompt, max_tokens=tokens, ignore_eos=True, sampling=SamplingParams(seed=1)))
    bench.run()
    return finished(bench, key)


def bench_with(offload: Offload, cells: int = 1000, *, unified: bool = True, **settings: Any) -> CoreBench:
    """Returns a bench whose idle prefixes are moved to `offload`."""
    return CoreBench(context_of(unified, cells, rows=512, **settings), offload=offload)


@both
def test_an_evicted_prefix_comes_back_from_ram(unified: bool) -> None:
    context = context_of(unified, 1000, rows=512)
    bench = CoreBench(context, ram=10**6)
    long = prompt_of(300)
    run_request(bench, 0, long)
    bench.core.kv.drop_idle()
    assert context.used() == 0
    before = context.computed
    assert run_request(bench, 1, (*long, 7)).usage.cached == 300
    assert context.computed - before == 1
    assert bench.core.kv.stats().restored_tokens == 300


@both
def test_a_stored_prefix_is_shared_up_to_any_token(unified: bool) -> None:
    bench = CoreBench(context_of(unified, 1000, rows=512), ram=10**6)
    long = prompt_of(300)
    run_request(bench, 0, long)
    for key, length in enumerate((1, 31, 32, 33, 130, 299), 1):
        bench.core.kv.drop_idle()
        assert run_request(bench, key, (*long[:length], 1 + long[length] % 40, 3)).usage.cached == length


@both
def test_a_resident_prefix_is_continued_by_blocks(unified: bool) -> None:
    context = context_of(unified, 2000, rows=512)
    bench = CoreBench(context, ram=10**6)
    long = prompt_of(300)
    run_request(bench, 0, long)
    bench.core.kv.drop_idle()
    bench.submit(1, Request(prompt=(*long[:100], 9), max_tokens=50, ignore_eos=True))
    bench.core.step()
    bench.submit(2, Request(prompt=(*long, 9), max_tokens=3, ignore_eos=True))
    bench.core._execution.last_step = LastStep(100.0)
    bench.core.step()
    assert bench.sequences[2].cached_so_far == 300
    shared = {id(cell) for cell in cells_of(bench, 1)} & {id(cell) for cell in cells_of(bench, 2)}
    assert len(shared) == (100 if unified else 0)
    assert context.copied == (0 if unified else 100)
    bench.run()


def cells_of(bench: CoreBench, key: int) -> list[object]:
    """Returns the cells of a running request."""
    return list(bench.backend.context.held[bench.sequences[key].seq].values())


@both
def test_equal_blocks_are_stored_once(unified: bool) -> None:
    offload = Offload(10**6)
    bench = bench_with(offload, 4000, unified=unified, sequences=40)
    system = prompt_of(5 * BLOCK_TOKENS)
    for key in range(10):
        run_request(bench, key, (*system, *prompt_of(BLOCK_TOKENS, seed=key + 1)))
    bench.core.kv.drop_idle()
    assert len(offload.ram) == 5 + 10
    assert bench.core.kv.stats().ram_bytes == (5 + 10) * (BLOCK_TOKENS + 1) * TOKEN_BYTES


@both
def test_a_longer_block_replaces_the_shorter(unified: bool) -> None:
    offload = Offload(10**6)
    bench = bench_with(offload, unified=unified)
    long = prompt_of(31)
    for key, length in enumerate((10, 20, 31, 15)):
        run_request(bench, key, long[:length])
        bench.core.kv.drop_idle()
    assert len(offload.ram) == 1


def fill(offload: Offload, tokens: tuple[int, ...]) -> None:
    """Stores all blocks of a prompt, with states of one byte for each token."""
    for block in offload.tree.missing(array("i", tokens), "", 0):
        offload.put(block, np.zeros(len(block.tokens), np.uint8))


def stored_length(offload: Offload, tokens: tuple[int, ...]) -> int:
    return offload.tree.match(array("i", tokens), "", 0).length


def test_budgets_are_kept_to_the_byte_and_the_least_recently_used_block_is_dropped() -> None:
    offload = Offload(3 * BLOCK_TOKENS)
    prompts = [prompt_of(BLOCK_TOKENS, seed) for seed in range(4)]
    for prompt in prompts[:3]:
        fill(offload, prompt)
    assert offload.ram.bytes == 3 * BLOCK_TOKENS
    offload.get(offload.tree.match(array("i", prompts[0]), "", 0).blocks[0])
    fill(offload, prompts[3])
    offload.check()
    assert [stored_length(offload, prompt) // BLOCK_TOKENS for prompt in prompts] == [1, 0, 1, 1]


def test_blocks_outlive_their_children() -> None:
    offload = Offload(3 * BLOCK_TOKENS)
    fill(offload, prompt_of(4 * BLOCK_TOKENS))
    offload.check()
    assert stored_length(offload, prompt_of(4 * BLOCK_TOKENS)) == 3 * BLOCK_TOKENS


def test_blocks_that_cost_more_to_compute_stay_longer() -> None:
    offload = Offload(400 * BLOCK_TOKENS)
    deep = array("i", prompt_of(350 * BLOCK_TOKENS))
    fill(offload, tuple(deep))
    last = offload.tree.match(deep, "", 0).blocks[-1]
    new = [(seed, *prompt_of(BLOCK_TOKENS - 1, seed)) for seed in range(1, 80)]
    for tokens in new:
        fill(offload, tokens)
    offload.check()
    assert offload.has(last), "the deep block is older than all new blocks"
    assert stored_length(offload, new[0]) < BLOCK_TOKENS


def test_evicting_a_parent_of_low_priority_does_not_lower_the_clock() -> None:
    offload = Offload(40 * BLOCK_TOKENS)
    fill(offload, prompt_of(38 * BLOCK_TOKENS))
    for seed in range(1, 60):
        newest = (seed % 40 + 1, *prompt_of(BLOCK_TOKENS - 1, seed))
        fill(offload, newest)
        assert stored_length(offload, newest) == BLOCK_TOKENS, "the newest stays"


def test_a_preempted_request_is_swapped_in() -> None:
    context = ToyContext(cells=200, rows=64)
    bench = CoreBench(context, ram=10**6)
    requests = [Request(prompt=prompt_of(70, n), max_tokens=60, ignore_eos=True) for n in range(2)]
    for key, request in enumerate(requests):
        bench.submit(key, request)
    bench.run()
    assert bench.outputs == {key: alone(request, 200)[0] for key, request in enumerate(requests)}
    assert bench.core.counters.preemptions > 0
    assert bench.core.counters.restores > 0
    assert context.computed <= 2 * (70 + 60) + bench.core.counters.preemptions


@both
def test_a_preempted_request_continues_from_its_slot_or_from_ram(unified: bool) -> None:
    context = context_of(unified, 400, slots=1, rows=64)
    bench = CoreBench(context, slots=1, ram=10**6)
    requests = [Request(prompt=prompt_of(70, n), max_tokens=60, ignore_eos=True) for n in range(2)]
    bench.submit(0, requests[0])
    for _ in range(5):
        bench.core.step()
    bench.core.lifecycle.preempt(bench.sequences[0])
    bench.core.waiting.discard(bench.sequences[0])
    bench.submit(1, requests[1])
    bench.core.step()
    bench.core.waiting.put(bench.sequences[0])
    bench.run()
    assert bench.outputs == {key: alone(request, 400)[0] for key, request in enumerate(requests)}
    assert context.computed <= 2 * (70 + 60)


def test_idle_prefixes_are_evicted_soon_if_they_slow_running_sequences() -> None:
    context = ToyContext(cells=4000, rows=512, sequences=30)
    bench = CoreBench(context, ram=10**7)
    for key in range(8):
        run_request(bench, key, prompt_of(400, key))
    bench.offload_idle()
    assert context.used() > 3000
    bench.core.cost.row_cell = 1e-3
    request = Request(prompt=(*prompt_of(400, 7), 3), max_tokens=900, ignore_eos=True)
    bench.submit(100, request)
    while context.used() > len(bench.sequences[100].tokens):
        bench.core.step()
        assert bench.core.lifecycle.busy, "other prefixes are still resident"
    bench.run()
    assert finished(bench, 100).usage.cached == 400
    assert bench.outputs[100] == alone(request, 4000)[0]
    assert run_request(bench, 101, (*prompt_of(400, 2), 3)).usage.cached == 400, "evicted prefixes are in RAM"


def test_idle_prefixes_stay_where_they_cost_nothing() -> None:
    context = ToyContext(cells=4000, rows=512, sequences=30)
    bench = CoreBench(context, ram=10**7)
    for key in range(8):
        run_request(bench, key, prompt_of(400, key))
    bench.core.cost.row_cell = 1e-12
    run_request(bench, 100, (3,), 40)
    assert context.used() > 3000


def test_an_idle_engine_keeps_prefixes_by_their_measured_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "UNPRICED_STEPS", 4)
    context = ToyContext(cells=4000, rows=512)
    bench = CoreBench(context)
    run_request(bench, 0, prompt_of(400))
    bench.core.cost.row_cell, bench.core.cost._prompt_row = 1e-12, 1e-3
    run_request(bench, 1, (3,), 12)
    bench.core.maintain_idle()
    assert context.used() >= 400


def test_the_rows_of_a_prompt_evict_no_idle_prefix() -> None:
    context = ToyContext(cells=4000, rows=512, sequences=30)
    bench = CoreBench(context, ram=10**7)
    run_request(bench, 0, prompt_of(400))
    bench.core.cost.row_cell = 1e-9
    run_request(bench, 1, prompt_of(2000, 1))
    assert context.used() >= 2400


def test_loading_is_spread_over_steps_while_others_run() -> None:
    bench = CoreBench(ToyContext(cells=4000, rows=512), ram=10**6)
    long = prompt_of(20 * BLOCK_TOKENS)
    run_request(bench, 0, long)
    bench.core.kv.drop_idle()
    bench.submit(1, Request(prompt=(5,), max_tokens=100, ignore_eos=True))
    bench.core.step()
    bench.submit(2, Request(prompt=(*long, 5), max_tokens=1))
    bench.core._execution.last_step = LastStep(0.0)
    bench.core.step()
    assert 0 < bench.sequences[2].computed < len(long)
    bench.run()
    assert finished(bench, 2).usage.cached == len(long)


def test_with_per_slot_kv_a_prefix_is_loaded_in_few_calls() -> None:
    """Each load copies the tokens that the slot already holds, so that many loads would be slow."""
    context = context_of(False, 4000, rows=512)
    bench = CoreBench(context, ram=10**6)
    long = prompt_of(20 * BLOCK_TOKENS)
    run_request(bench, 0, long)
    bench.core.kv.drop_idle()
    bench.submit(1, Request(prompt=(5,), max_tokens=100, ignore_eos=True))
    bench.core.step()
    bench.submit(2, Request(prompt=(*long, 5), max_tokens=1))
    bench.core._execution.last_step = LastStep(0.0)
    bench.core.step()
    assert 2 in bench.ends
    assert finished(bench, 2).usage.cached == len(long)
    bench.run()


@both
def test_blocks_that_cannot_be_loaded_are_computed(unified: bool) -> None:
    context = context_of(unified, 1000, rows=512)
    bench = CoreBench(context, ram=10**6)
    kv, long = bench.core.kv, prompt_of(300)
    run_request(bench, 0, long)
    kv.drop_idle()
    loaded, calls = context.load, iter([True, True, False])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "load", lambda seq, parts: next(calls) and loaded(seq, parts))
        if not unified:
            patch.setattr(offloader, "PER_SLOT_LOAD_TOKENS", BLOCK_TOKENS)
        seq = kv.allocate(kv.match(array("i", long), "")).seq
        assert [kv.load(seq, 0.0, wait=True).tokens for _ in range(3)] == [BLOCK_TOKENS, BLOCK_TOKENS, 0]
        assert not kv.loading(seq)
        assert kv.ready(seq, 300) == 300 - 2 * BLOCK_TOKENS
        kv.check()
        kv.release(seq, keep=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "load", lambda seq, parts: False)
        assert run_request(bench, 1, (*long, 7)).usage.cached == 0
    request = Request(prompt=(*long, 7), max_tokens=1, ignore_eos=True, sampling=SamplingParams(seed=1))
    assert bench.outputs[1] == alone(request, 1000)[0]


@both
def test_whole_states_are_continued_and_restored(unified: bool) -> None:
    context = context_of(unified, 1000, rows=512, partial=False)
    bench = CoreBench(context, ram=10**6)
    turn = prompt_of(100)
    first = run_request(bench, 0, turn, 10)
    assert first.usage.cached == 0
    second = (*turn, *bench.outputs[0][:-1], 3, 4)
    assert run_request(bench, 1, second).usage.cached == 109, "resident"
    bench.core.kv.drop_idle()
    assert context.used() == 0
    before = context.computed
    assert run_request(bench, 2, (*second, 5)).usage.cached == len(second), "restored"
    assert context.computed - before == 1


@both
def test_a_whole_state_that_is_restored_may_pass_several_save_points(unified: bool) -> None:
    bench = CoreBench(context_of(unified, 2000, rows=512, partial=False), ram=10**6)
    long = prompt_of(103)
    run_request(bench, 0, long[:100])
    bench.core.kv.drop_idle()
    for key, prompt in enumerate([long, (*long[:50], 1 + long[50] % 40, 3, 4)], 1):
        bench.submit(key, Request(prompt=prompt, max_tokens=1))
    bench.run()
    assert finished(bench, 1).usage.cached == 100


def test_states_that_can_be_cut_but_not_divided() -> None:
    """With a sliding window and per-slot KV a sequence can be cut, but only whole states are copied and saved."""
    context = context_of(False, 1000, rows=512, divisible=False)
    bench = CoreBench(context, ram=10**6)
    long = prompt_of(300)
    run_request(bench, 0, long)
    before = context.computed
    assert run_request(bench, 1, (*long[:200], 1 + long[200] % 40, 3)).usage.cached == 200, "the slot is cut"
    assert context.computed - before == 2
    bench.core.kv.drop_idle()
    assert run_request(bench, 2, (*long[:200], 1 + long[200] % 40, 3, 5)).usage.cached == 202, "restored"


def on_disk_only(folder: Path) -> tuple[CoreBench, Offload, Disk]:
    """Returns a bench that has 300 tokens on disk and nowhere else, its offload tiers and its disk."""
    disk = Disk(folder, "toy")
    offload = Offload(0, disk=disk, disk_bytes=10**6)
    bench = bench_with(offload)
    run_request(bench, 0, prompt_of(300))
    bench.offload_idle()
    bench.core.kv.drop_idle()
    return bench, offload, disk


def test_blocks_read_ahead_for_a_request_that_ends_are_not_kept(tmp_path: Path) -> None:
    bench, _, _ = on_disk_only(tmp_path)
    kv = bench.core.kv
    match = kv.match(array("i", prompt_of(300)), "")
    assert match.stored.length == 299
    seq = kv.allocate(match).seq
    assert kv.loading(seq)
    while not kv.load(seq, 0.0, wait=True).tokens:
        pass
    kv.release(seq, keep=False)
    assert all(block.state is None and block.pending_read is None for block in match.stored.blocks)
    bench.core.close()


def test_a_read_in_progress_for_a_request_that_ends_is_dropped(tmp_path: Path) -> None:
    bench, _, disk = on_disk_only(tmp_path)
    kv = bench.core.kv
    begun: Future[Any] = Future()
    begun.set_running_or_notify_cancel()
    match = kv.match(array("i", prompt_of(300)), "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "read", lambda key: begun)
        seq = kv.allocate(match).seq
        assert not kv.load(seq, 0.0, wait=False).tokens
        kv.release(seq, keep=False)
    assert all(block.pending_read is None for block in match.stored.blocks)
    assert run_request(bench, 1, prompt_of(300)).usage.cached > 0, "the blocks are loaded again"
    bench.core.close()


@both
def test_a_long_idle_sequence_is_saved_in_time_that_grows_with_its_length(unified: bool) -> None:
    context = context_of(unified, 20_000, slots=1, rows=4096, sequences=2)
    offload = Offload(10**8)
    bench = CoreBench(context, slots=1, offload=offload, prompt_rows=4096)
    saved, snapshots = context.save, list[int]()
    context.save = lambda seq: snapshots.append(seq) or saved(seq)  # type: ignore[method-assign, func-returns-value]
    run_request(bench, 0, prompt_of(16_000))
    calls = 0
    while bench.core.maintain_idle():
        calls += 1
        assert calls < 2000
    assert len(offload.ram) == 16_000 // BLOCK_TOKENS
    assert len(snapshots) == 1


def test_a_disk_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloader, "GIVE_UP_SECONDS", 0.1)
    bench, _, disk = on_disk_only(tmp_path)
    disk.read = lambda key: Future()  # type: ignore[method-assign]
    assert run_request(bench, 1, prompt_of(300)).usage.cached == 0
    bench.core.close()


@both
def test_namespaces_share_nothing(unified: bool) -> None:
    bench = CoreBench(context_of(unified, 1000, rows=512), ram=10**6)
    long = prompt_of(200)
    for key, salt in enumerate(["a", "b", "", "a"]):
        bench.submit(key, Request(prompt=long, max_tokens=1, salt=salt))
        bench.run()
        if key % 2:
            bench.core.kv.drop_idle()
    assert [finished(bench, key).usage.cached for key in range(4)] == [0, 0, 0, 199]


def opened(folder: Path, identity: str = "toy", *, whole: bool = False) -> Offload:
    return Offload(10**6, whole=whole, disk=Disk(folder, identity), disk_bytes=10**6)


@both
def test_prefixes_outlive_the_engine_on_disk(tmp_path: Path, unified: bool) -> None:
    long = prompt_of(300)
    bench = bench_with(opened(tmp_path), unified=unified)
    run_request(bench, 0, long)
    bench.offload_idle()
    bench.core.close()
    again = bench_with(opened(tmp_path), unified=not unified)
    context = again.backend.context
    assert run_request(again, 0, (*long, 7)).usage.cached == 300
    assert context.computed == 1
    other = bench_with(opened(tmp_path, "another model"), unified=unified)
    assert run_request(other, 0, (*long, 7)).usage.cached == 0


@both
def test_whole_states_outlive_the_engine_on_disk(tmp_path: Path, unified: bool) -> None:
    for restart in range(2):
        offload = opened(tmp_path, whole=True)
        bench = bench_with(offload, unified=unified, partial=False)
        assert run_request(bench, 0, prompt_of(300), 5).usage.cached == (296 if restart else 0)
        bench.offload_idle()
        offload.check()
        bench.core.close()


def test_the_disk_keeps_to_its_budget_and_survives_changes_by_others(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "toy")
    offload = Offload(0, disk=disk, disk_bytes=5 * 1000)
    bench = bench_with(offload)
    for key in range(6):
        run_request(bench, key, prompt_of(100, key))
        bench.offload_idle()
    bench.core.kv.drop_idle()
    for _ in range(200):
        time.sleep(0.01)
        bench.core.maintain_idle()
        with suppress(FileNotFoundError):  # a file may be removed during the sum
            if offload.disk.bytes == sum(file.stat().st_size for file in disk.folder.glob("*.block")):
                break
    files = [*disk.folder.glob("*.block")]
    assert 0 < offload.disk.bytes == sum(file.stat().st_size for file in files) <= 5 * 1000
    for number, file in enumerate(files):
        file.unlink() if number % 2 else file.write_bytes(file.read_bytes()[:-1] + b"x")
    for key in range(6):
        assert run_request(bench, 10 + key, prompt_of(100, key)).usage.cached < 5, "all are damaged or gone"
    bench.core.close()


def test_a_request_is_not_blocked_by_another_whose_blocks_are_read_from_disk(tmp_path: Path) -> None:
    bench, _, disk = on_disk_only(tmp_path)
    slow: Future[Any] = Future()
    read, disk.read = disk.read, lambda key: slow  # type: ignore[method-assign]
    bench.submit(1, Request(prompt=(5,), max_tokens=10, ignore_eos=True))
    bench.core.step()
    bench.submit(2, Request(prompt=prompt_of(300), max_tokens=1))
    for _ in range(12):
        bench.core.step()
    assert 1 in bench.ends
    disk.read = read  # type: ignore[method-assign]
    slow.set_result(None)
    bench.run()
    assert finished(bench, 2).usage.cached == 0
    bench.core.close()


def run_at_random(
    seed: int,
    operations: int,
    folder: Path | None = None,
    *,
    unified: bool,
    partial: bool = True,
    divisible: bool | None = None,
) -> CoreBench:
    """Runs random arrivals, cancellations, preemptions, evictions, lost states and steps without free cells. The state
    is checked after each operation, and every request's tokens at the end."""
    random = Random(seed)
    cells = random.choice([300, 500, 1200])
    sequences, rows = random.choice([7, 14]), random.choice([64, 256])
    context = context_of(
        unified, cells, sequences=sequences, rows=rows, outputs=16, partial=partial, divisible=divisible
    )
    disk = Disk(folder, "toy") if folder is not None else None
    disk_bytes = random.choice([3000, 10**6])
    ram = random.choice([1, 1500, 20_000])
    offload = Offload(ram, whole=not context.divisible, disk=disk, disk_bytes=disk_bytes)
    reuse = random.choice([0, 16]) if context.divisible else 0
    bench = CoreBench(context, prompt_rows=random.choice([5, 100]), offload=offload, reuse=reuse)
    chance = random.choice([0.0, 0.1])
    context.lost = lambda: random.random() < chance
    context.faults = lambda _: NoFreeCells() if random.random() < chance else None
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(250)] for _ in range(3)]
    wanted: dict[int, tuple[list[int], FinishReason]] = {}
    cancelled: set[int] = set()
    kv = bench.core.kv
    for number in range(operations):
        match random.randrange(8):
            case 0 | 1 if len(bench.core.running) + len(bench.core.waiting) < 8:
                request = draw_request(random, [prefix[: random.randint(1, 250)] for prefix in prefixes], 280)
                prompt = (*random.choice(prefixes)[: random.randint(0, 250)], *request.prompt)[:280]
                max_tokens = request.max_tokens if request.max_tokens is not None or cells < 400 else 60
                request = structs.replace(request, prompt=prompt, max_tokens=max_tokens)
                wanted[number] = alone(request, cells)
                oracle = Oracle(request, wanted[number][0], random.choice([0.0, 0.3, 1.0]), random)
                bench.submit(number, request, oracle if random.random() < 0.5 and partial else None)
            case 2 if wanted and random.random() < 0.3:
                victim = random.choice(list(wanted))
                bench.core.lifecycle.end(victim, FinishReason.CANCELLED)
                cancelled.add(victim)
            case 3 if bench.core.running:
                bench.core.lifecycle.preempt(random.choice(list(bench.core.running.values())))
            case 4:
                kv.evict(random.randint(0, cells)) if unified or random.random() < 0.7 else kv.drop_idle()
            case 5:
                resident, extra_pass = random.choice([0.0, 1e-6, 1.0]), random.choice([0.0, 1e-4, 1.0])
                kv.set_costs(Costs(compute=random.choice([0.0, 1e-5, 1.0]), resident=resident, extra_pass=extra_pass))
                kv.count_step()
                kv.maintain(random.choice([0.0, 1e-4]))
            case _:
                bench.core.step()
        bench.check()
    bench.run(max_steps=50_000)
    bench.core.close()
    bench.compare(wanted, cancelled, faults=chance > 0)
    return bench


@both
@pytest.mark.parametrize("seed", range(sized(20, 400)))
def test_random_operations(seed: int, tmp_path: Path, unified: bool) -> None:
    run_at_random(seed, 250, tmp_path if seed % 2 else None, unified=unified)


@pytest.mark.parametrize(
    ("unified", "partial"),
    [
        pytest.param(True, False, id="unified"),
        pytest.param(False, False, id="per-slot"),
        pytest.param(False, True, id="cut"),
    ],
)
@pytest.mark.parametrize("seed", range(sized(8, 200)))
def test_random_operations_on_states_that_are_not_divisible(
    seed: int, tmp_path: Path, unified: bool, partial: bool
) -> None:
    """The parameters cover models that keep one state, and a sliding window with per-slot KV, which can be cut."""
    run_at_random(seed, 200, tmp_path if seed % 2 else None, unified=unified, partial=partial, divisible=False)
