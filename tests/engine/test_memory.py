"""Prefixes in cells and in the store: whatever moves, the tokens are those a request gets alone."""

from __future__ import annotations

import time
from array import array
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import pytest
from msgspec import structs

from engine.backend import NoFreeCells
from engine.contract import Finished, FinishReason, Request, SamplingParams
from engine.memory import Store
from engine.memory import lease as lease_module
from engine.memory.disk import Disk
from engine.memory.pieces import PIECE
from tests.engine.test_same_as_alone import Bench, Oracle, alone, draw_request, in_order
from tests.toy import VOCABULARY, ToyContext

TOKEN = 4
"""Bytes of a token in the toy's states."""


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    """Tokens that no other seed begins with."""
    random = Random(seed)
    return tuple(random.randrange(1, VOCABULARY) for _ in range(length))


def finished(bench: Bench, key: int) -> Finished:
    """How a request ended that did."""
    end = bench.ends[key]
    assert isinstance(end, Finished), end
    return end


def ask(bench: Bench, key: int, prompt: tuple[int, ...], tokens: int = 1) -> Finished:
    """Runs a request to its end."""
    bench.submit(key, Request(prompt=prompt, max_tokens=tokens, ignore_eos=True, sampling=SamplingParams(seed=1)))
    bench.run()
    return finished(bench, key)


def test_a_prefix_that_left_the_cells_comes_back() -> None:
    context = ToyContext(cells=1000, rows=512)
    bench = Bench(context, store=10**6)
    long = text(300)
    ask(bench, 0, long)
    bench.runner.cells.reclaim(1000)
    assert context.used() == 0
    before = context.computed
    assert ask(bench, 1, (*long, 7)).usage.cached == 300
    assert context.computed - before == 1
    assert bench.runner.cells.restored == 300


def test_any_token_of_a_stored_prefix_may_be_the_last_that_is_shared() -> None:
    context = ToyContext(cells=1000, rows=512)
    bench = Bench(context, store=10**6)
    long = text(300)
    ask(bench, 0, long)
    for key, length in enumerate((1, 31, 32, 33, 130, 299), 1):
        bench.runner.cells.reclaim(1000)
        assert ask(bench, key, (*long[:length], 1 + long[length] % 40, 3)).usage.cached == length


def test_what_is_resident_is_continued_by_what_is_stored() -> None:
    context = ToyContext(cells=2000, rows=512)
    bench = Bench(context, store=10**6)
    long = text(300)
    ask(bench, 0, long)
    bench.runner.cells.reclaim(1000 * 1000)
    bench.submit(1, Request(prompt=(*long[:100], 9), max_tokens=50, ignore_eos=True))
    bench.runner.step()
    bench.submit(2, Request(prompt=(*long, 9), max_tokens=3, ignore_eos=True))
    bench.runner._seconds = 100.0
    bench.runner.step()
    assert bench.streams[2].held.reused == 300
    assert len(cells_of(bench, 1) & cells_of(bench, 2)) == 100
    bench.run()


def cells_of(bench: Bench, key: int) -> set[int]:
    """The cells of a running request."""
    return {id(cell) for cell in bench.backend.context._held[bench.runner.running[key].held.seq].values()}


def test_equal_pieces_are_stored_once() -> None:
    context = ToyContext(cells=4000, rows=512, sequences=40)
    bench = Bench(context, store=10**6)
    system = text(5 * PIECE)
    for key in range(10):
        ask(bench, key, (*system, *text(PIECE, seed=key + 1)))
    bench.runner.cells.reclaim(10**6)
    assert bench.runner.cells.store is not None
    assert len(bench.runner.cells.store.ram) == 5 + 10
    assert bench.runner.cells.store.ram.bytes == (5 + 10) * (PIECE + 1) * TOKEN


def test_a_longer_piece_replaces_the_shorter() -> None:
    context = ToyContext(cells=1000, rows=512)
    bench = Bench(context, store=10**6)
    long = text(31)
    for key, length in enumerate((10, 20, 31, 15)):
        ask(bench, key, long[:length])
        bench.runner.cells.reclaim(10**6)
    assert bench.runner.cells.store is not None
    assert len(bench.runner.cells.store.ram) == 1


def fill(store: Store, tokens: tuple[int, ...]) -> None:
    """Keeps all of a text, a byte for each token."""
    for piece in store.places(array("i", tokens), "", 0):
        store.keep(piece, np.zeros(len(piece.tokens), np.uint8))


def test_budgets_are_kept_to_the_byte_and_the_longest_unused_leaves_first() -> None:
    store = Store(3 * PIECE)
    texts = [text(PIECE, seed) for seed in range(4)]
    for prompt in texts[:3]:
        fill(store, prompt)
    assert store.ram.bytes == 3 * PIECE
    store.take(store.find(array("i", texts[0]), "", 0).pieces[0])
    fill(store, texts[3])
    store.check()
    assert [len(store.find(array("i", prompt), "", 0).pieces) for prompt in texts] == [1, 0, 1, 1]


def test_beginnings_outlive_what_follows_them() -> None:
    store = Store(3 * PIECE)
    fill(store, text(4 * PIECE))
    store.check()
    assert store.find(array("i", text(4 * PIECE)), "", 0).length == 3 * PIECE


def test_what_costs_more_to_compute_stays_longer() -> None:
    store = Store(400 * PIECE)
    deep = array("i", text(350 * PIECE))
    fill(store, tuple(deep))
    last = store.find(deep, "", 0).pieces[-1]
    new = [array("i", (seed, *text(PIECE - 1, seed))) for seed in range(1, 80)]
    for tokens in new:
        fill(store, tuple(tokens))
    store.check()
    assert store.has(last), "it is older than all of the new ones"
    assert store.find(new[0], "", 0).length < PIECE


def test_a_request_that_is_retracted_goes_on_from_the_store() -> None:
    context = ToyContext(cells=200, rows=64)
    bench = Bench(context, store=10**6)
    requests = [Request(prompt=text(70, n), max_tokens=60, ignore_eos=True) for n in range(2)]
    for key, request in enumerate(requests):
        bench.submit(key, request)
    bench.run()
    assert bench.got == {key: alone(request, 200)[0] for key, request in enumerate(requests)}
    assert bench.runner.counters.retractions > 0
    assert bench.runner.counters.restores > 0
    assert context.computed <= 2 * (70 + 60) + bench.runner.counters.retractions


def test_idle_prefixes_leave_at_once_for_those_whose_steps_they_would_make_dearer() -> None:
    """And what runs is moved to the lowest cells, as a step visits all up to the highest that is used."""
    context = ToyContext(cells=4000, rows=512, sequences=30)
    bench = Bench(context, store=10**7)
    for key in range(8):
        ask(bench, key, text(400, key))
    bench.rest()
    assert context.used() > 3000
    bench.runner.cost.row_cell = 1e-3
    request = Request(prompt=(*text(400, 7), 3), max_tokens=40, ignore_eos=True)
    bench.submit(100, request)
    for _ in range(6):
        bench.runner.step()
    assert context.used() < 450
    assert max(cell.place for held in context._held for cell in held.values()) < 450
    bench.run()
    assert finished(bench, 100).usage.cached == 400
    assert bench.got[100] == alone(request, 4000)[0]
    assert ask(bench, 101, (*text(400, 2), 3)).usage.cached == 400, "they are in RAM"


def test_idle_prefixes_stay_where_they_cost_nothing() -> None:
    context = ToyContext(cells=4000, rows=512, sequences=30)
    bench = Bench(context, store=10**7)
    for key in range(8):
        ask(bench, key, text(400, key))
    bench.runner.cost.row_cell = 1e-12
    ask(bench, 100, (3,), 40)
    assert context.used() > 3000


def test_loading_is_shared_out_over_steps_beside_others() -> None:
    context = ToyContext(cells=4000, rows=512)
    bench = Bench(context, store=10**6)
    long = text(20 * PIECE)
    ask(bench, 0, long)
    bench.runner.cells.reclaim(10**6)
    bench.submit(1, Request(prompt=(5,), max_tokens=100, ignore_eos=True))
    bench.runner.step()
    bench.submit(2, Request(prompt=(*long, 5), max_tokens=1))
    bench.runner._seconds = 0.0
    bench.runner.step()
    assert 0 < bench.streams[2].held.length < len(long)
    bench.run()
    assert finished(bench, 2).usage.cached == len(long)


def test_a_state_that_is_gone_is_computed() -> None:
    context = ToyContext(cells=1000, rows=512)
    bench = Bench(context, store=10**6)
    long = text(300)
    ask(bench, 0, long)
    bench.runner.cells.reclaim(10**6)
    loads = iter([False, False, True])
    context.lost = lambda: next(loads, False)
    assert ask(bench, 1, (*long, 7)).usage.cached == 2 * PIECE


def test_a_model_that_keeps_one_state_continues_and_restores_whole_texts() -> None:
    context = ToyContext(cells=1000, rows=512, partial=False)
    bench = Bench(context, store=10**6)
    turn = text(100)
    first = ask(bench, 0, turn, 10)
    assert first.usage.cached == 0
    second = (*turn, *bench.got[0][:-1], 3, 4)
    assert ask(bench, 1, second).usage.cached == 109, "resident"
    bench.runner.cells.reclaim(10**6)
    assert context.used() == 0
    before = context.computed
    assert ask(bench, 2, (*second, 5)).usage.cached == len(second), "restored"
    assert context.computed - before == 1


def test_a_whole_text_that_is_restored_may_pass_several_stops() -> None:
    bench = Bench(ToyContext(cells=2000, rows=512, partial=False), store=10**6)
    long = text(103)
    ask(bench, 0, long[:100])
    bench.runner.cells.reclaim(10**6)
    for key, prompt in enumerate([long, (*long[:50], 1 + long[50] % 40, 3, 4)], 1):
        bench.submit(key, Request(prompt=prompt, max_tokens=1))
    bench.run()
    assert finished(bench, 1).usage.cached == 100


def test_a_parent_that_is_worth_little_does_not_turn_back_the_clock() -> None:
    store = Store(40 * PIECE)
    fill(store, text(38 * PIECE))
    for seed in range(1, 60):
        newest = (seed % 40 + 1, *text(PIECE - 1, seed))
        fill(store, newest)
        assert store.find(array("i", newest), "", 0).length == PIECE, "the newest stays"


def with_a_text_on_disk(folder: Path) -> tuple[Bench, Store, Disk]:
    """A bench that has 300 tokens on disk and nowhere else."""
    disk = Disk(folder, "toy")
    store = Store(0, disk=disk, disk_most=10**6)
    bench = bench_with(store)
    ask(bench, 0, text(300))
    bench.rest()
    bench.runner.cells.reclaim(10**6)
    return bench, store, disk


def test_what_was_read_ahead_for_nobody_is_not_kept(tmp_path: Path) -> None:
    bench, store, _ = with_a_text_on_disk(tmp_path)
    lease = bench.runner.cells.claim(array("i", text(300)), "")
    assert lease.coming
    while not lease.fetch(wait=True):
        pass
    lease.leave()
    assert all(piece.state is None and piece.reading is None for piece in store._all())
    bench.runner.close()


def test_what_is_still_being_read_for_nobody_is_dropped(tmp_path: Path) -> None:
    bench, store, disk = with_a_text_on_disk(tmp_path)
    begun: Future[Any] = Future()
    begun.set_running_or_notify_cancel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "read", lambda key: begun)
        lease = bench.runner.cells.claim(array("i", text(300)), "")
        assert not lease.fetch(wait=False)
        lease.leave()
    assert all(piece.reading is None for piece in store._all())
    assert ask(bench, 1, text(300)).usage.cached > 0, "it is read once more"
    bench.runner.close()


def test_a_long_idle_text_is_saved_in_time_that_grows_with_its_length() -> None:
    context = ToyContext(cells=20_000, rows=4096)
    bench = Bench(context, store=10**8, prompt_rows=4096)
    ask(bench, 0, text(16_000))
    assert bench.runner.cells.store is not None
    calls = 0
    while bench.runner.tidy():
        calls += 1
        assert calls < 2000
    assert len(bench.runner.cells.store.ram) == 16_000 // PIECE


def test_a_disk_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "GIVE_UP", 0.1)
    disk = Disk(tmp_path, "toy")
    bench = bench_with(Store(0, disk=disk, disk_most=10**6))
    ask(bench, 0, text(100))
    bench.rest()
    bench.runner.cells.reclaim(10**6)
    disk.read = lambda key: Future()  # type: ignore[method-assign]
    assert ask(bench, 1, text(100)).usage.cached == 0
    bench.runner.close()


def test_namespaces_share_nothing() -> None:
    context = ToyContext(cells=1000, rows=512)
    bench = Bench(context, store=10**6)
    long = text(200)
    for key, salt in enumerate(["a", "b", "", "a"]):
        bench.submit(key, Request(prompt=long, max_tokens=1, salt=salt))
        bench.run()
        bench.runner.cells.reclaim(10**6 if key % 2 else 0)
    assert [finished(bench, key).usage.cached for key in range(4)] == [0, 0, 0, 199]


def bench_with(store: Store, cells: int = 1000) -> Bench:
    """A runner whose idle prefixes go to `store`."""
    bench = Bench(ToyContext(cells=cells, rows=512))
    bench.runner.cells.store = store
    return bench


def test_prefixes_outlive_the_engine_on_disk(tmp_path: Path) -> None:
    long = text(300)
    bench = bench_with(Store(10**6, disk=Disk(tmp_path, "toy"), disk_most=10**6))
    ask(bench, 0, long)
    bench.rest()
    bench.runner.close()
    again = bench_with(Store(10**6, disk=Disk(tmp_path, "toy"), disk_most=10**6))
    context = again.backend.context
    assert ask(again, 0, (*long, 7)).usage.cached == 300
    assert context.computed == 1
    other = bench_with(Store(10**6, disk=Disk(tmp_path, "another model"), disk_most=10**6))
    assert ask(other, 0, (*long, 7)).usage.cached == 0


def test_whole_texts_outlive_the_engine_on_disk(tmp_path: Path) -> None:
    for restart in range(2):
        store = Store(10**6, whole=True, disk=Disk(tmp_path, "toy"), disk_most=10**6)
        bench = Bench(ToyContext(cells=1000, rows=512, partial=False))
        bench.runner.cells.store = store
        assert ask(bench, 0, text(300), 5).usage.cached == (296 if restart else 0)
        bench.rest()
        store.check()
        bench.runner.close()


def test_the_disk_keeps_to_its_budget_and_survives_what_others_do_to_it(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "toy")
    store = Store(0, disk=disk, disk_most=5 * 1000)
    bench = bench_with(store)
    for key in range(6):
        ask(bench, key, text(100, key))
        bench.rest()
    bench.runner.cells.reclaim(10**6)
    for _ in range(200):
        time.sleep(0.01)
        bench.runner.tidy()
        with suppress(FileNotFoundError):  # one that is being removed
            if store.disk.bytes == sum(file.stat().st_size for file in disk.folder.glob("*.piece")):
                break
    files = [*disk.folder.glob("*.piece")]
    assert 0 < store.disk.bytes == sum(file.stat().st_size for file in files) <= 5 * 1000
    for number, file in enumerate(files):
        file.unlink() if number % 2 else file.write_bytes(file.read_bytes()[:-1] + b"x")
    for key in range(6):
        assert ask(bench, 10 + key, text(100, key)).usage.cached < 5, "all are damaged or gone"
    bench.runner.close()


def test_a_request_is_not_held_up_by_another_that_waits_for_the_disk(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "toy")
    bench = bench_with(Store(0, disk=disk, disk_most=10**6))
    ask(bench, 0, text(100))
    bench.rest()
    bench.runner.cells.reclaim(10**6)
    slow: Future[Any] = Future()
    read, disk.read = disk.read, lambda key: slow  # type: ignore[method-assign]
    bench.submit(1, Request(prompt=(5,), max_tokens=10, ignore_eos=True))
    bench.runner.step()
    bench.submit(2, Request(prompt=text(100), max_tokens=1))
    for _ in range(12):
        bench.runner.step()
    assert 1 in bench.ends
    disk.read = read  # type: ignore[method-assign]
    slow.set_result(None)
    bench.run()
    assert finished(bench, 2).usage.cached == 0
    bench.runner.close()


def run_at_random(
    seed: int, operations: int, folder: Path | None = None, *, partial: bool = True, ordered: bool = False
) -> Bench:
    """Random arrivals, cancellations, retractions, reclaims, states that are lost and steps without cells; everything
    is checked after each, and every text in the end."""
    random = Random(seed)
    cells = random.choice([300, 500, 1200])
    rows = random.choice([64, 256])
    plain = ToyContext(cells=cells, sequences=random.choice([7, 14]), rows=rows, outputs=16, partial=partial)
    context: Any = in_order(cells) if ordered else plain
    inner = context._context if ordered else context
    disk = Disk(folder, "toy") if folder is not None else None
    room = random.choice([3000, 10**6])
    kept = Store(random.choice([1, 1500, 20_000]), whole=not partial, disk=disk, disk_most=room)
    reuse = random.choice([0, 16]) if partial and not ordered else 0
    bench = Bench(context, prompt_rows=random.choice([5, 100]), kept=kept, reuse=reuse)
    chance = random.choice([0.0, 0.1])
    inner.lost = lambda: random.random() < chance
    inner.faults = lambda _: NoFreeCells() if not ordered and random.random() < chance else None
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(250)] for _ in range(3)]
    wanted: dict[int, tuple[list[int], FinishReason]] = {}
    cancelled: set[int] = set()
    for number in range(operations):
        match random.randrange(8):
            case 0 | 1 if len(bench.runner.running) + len(bench.runner.waiting) < 8:
                request = draw_request(random, [prefix[: random.randint(1, 250)] for prefix in prefixes], 280)
                prompt = (*random.choice(prefixes)[: random.randint(0, 250)], *request.prompt)[:280]
                most = request.max_tokens if request.max_tokens is not None or cells < 400 else 60
                request = structs.replace(request, prompt=prompt, max_tokens=most)
                wanted[number] = alone_in(request, cells, partial=partial, ordered=ordered)
                oracle = Oracle(request, wanted[number][0], random.choice([0.0, 0.3, 1.0]), random)
                bench.submit(number, request, oracle if random.random() < 0.5 and partial else None)
            case 2 if wanted and random.random() < 0.3:
                victim = random.choice(list(wanted))
                bench.runner.end(victim, FinishReason.CANCELLED)
                cancelled.add(victim)
            case 3 if bench.runner.running:
                bench.runner._retract(random.choice(list(bench.runner.running.values())))
            case 4:
                bench.runner.cells.reclaim(random.randint(0, cells))
            case 5:
                bench.runner.cost.row_cell = random.choice([0.0, 1e-6, 1.0])
                bench.runner.cells.age()
                bench.runner.cells.tend(random.choice([0.0, 1e-4]))
            case _:
                bench.runner.step()
        bench.check()
    bench.run(most=50_000)
    bench.runner.close()
    bench.compare(wanted, cancelled, faults=chance > 0)
    return bench


def alone_in(request: Request, cells: int, *, partial: bool, ordered: bool) -> tuple[list[int], FinishReason]:
    """What `alone` says, in the same kind of context."""
    if not ordered:
        return alone(request, cells)
    bench = Bench(cast("Any", in_order(cells)), slots=1)
    bench.submit(0, request)
    bench.run()
    return bench.got[0], finished(bench, 0).reason


@pytest.mark.parametrize("seed", range(20))
def test_random_operations(seed: int, tmp_path: Path) -> None:
    bench = run_at_random(seed, 400, tmp_path if seed % 2 else None)
    assert bench.runner.cells.saved or seed


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_on_a_model_that_keeps_one_state(seed: int, tmp_path: Path) -> None:
    run_at_random(seed, 300, tmp_path if seed % 2 else None, partial=False)


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_with_cells_in_order(seed: int) -> None:
    run_at_random(seed, 250, ordered=True)
