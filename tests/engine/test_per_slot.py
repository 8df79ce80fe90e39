"""Per-slot KV: the choice of slots, copies, saves, and the closing of gaps among the slots."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from engine.contract import Finished, FinishReason, Request, SamplingParams
from engine.kv import Costs
from tests.engine.test_memory import prompt_of
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, alone, context_of

both = pytest.mark.parametrize("unified", LAYOUTS)


def request(prompt: tuple[int, ...], tokens: int = 1) -> Request:
    return Request(prompt=prompt, max_tokens=tokens, ignore_eos=True, sampling=SamplingParams(seed=1))


def bench_of(slots: int = 4, *, ram: int = 0, extra_pass: float = 0.0, **settings: Any) -> CoreBench:
    """Returns a bench with per-slot KV in which an additional pass of a step costs `extra_pass` seconds."""
    bench = CoreBench(context_of(False, 1000, slots=slots, rows=512, **settings), slots=slots, ram=ram)
    cost = bench.core.cost
    cost.curve.put(2, max(0.0, 2 * cost.curve.seconds(1) - extra_pass))
    return bench


def cached(bench: CoreBench, key: int) -> int:
    end = bench.ends[key]
    assert isinstance(end, Finished)
    return end.usage.cached


def run(bench: CoreBench, key: int, prompt: tuple[int, ...], tokens: int = 1) -> int:
    """Runs a request to its end. Returns the number of cached tokens."""
    bench.submit(key, request(prompt, tokens))
    bench.run()
    return cached(bench, key)


def start(bench: CoreBench, key: int, prompt: tuple[int, ...], tokens: int = 500) -> int:
    """Runs a request's first step, which computes its prompt. Returns the slot's id."""
    bench.submit(key, request(prompt, tokens))
    bench.core.step()
    return bench.sequences[key].seq


# ── the slot of a request ──


def test_a_request_goes_to_the_slot_that_holds_its_longest_prefix() -> None:
    bench = bench_of(ram=10**6)
    long = prompt_of(300)
    other = prompt_of(300, 1)
    for key, prompt in enumerate((other, long, (*long[:100], 7, 8))):
        start(bench, key, prompt)
    seqs = [bench.sequences[key].seq for key in range(3)]
    assert sorted(seqs) == [0, 1, 2]
    for key in range(3):
        bench.core.lifecycle.end(key, FinishReason.STOP)
    bench.core.step()
    copied = bench.backend.context.copied
    assert start(bench, 3, (*long, 5)) == seqs[1]
    assert bench.sequences[3].cached_so_far == 300
    assert start(bench, 4, (*other, 5)) == seqs[0]
    assert bench.backend.context.copied == copied, "nothing is copied"
    bench.run(1000)


def test_the_prefix_of_a_running_sequence_is_copied() -> None:
    bench = bench_of()
    context, long = bench.backend.context, prompt_of(300)
    first = start(bench, 0, (*long, 1))
    before = context.computed
    assert start(bench, 1, (*long, 2)) != first
    assert context.copied == 300
    assert context.computed - before == 1 + 1, "one row for each"
    assert bench.sequences[1].cached_so_far == 300
    bench.run(1000)
    assert bench.outputs[1] == alone(request((*long, 2), 500), 1000)[0]


def test_a_prefix_is_computed_where_that_is_cheaper_than_copying() -> None:
    bench = bench_of(slots=2)
    context, long = bench.backend.context, prompt_of(300)
    start(bench, 0, (*long, 1))
    kv = bench.core.kv
    for compute, expected in ((kv._allocator.costs.move / 2, 0), (kv._allocator.costs.move * 2, 300)):
        kv.set_costs(Costs(compute=compute))
        seq, length = kv.allocate(kv.match(array("i", (*long, 2)), "")).seq, expected
        assert kv.length(seq) == length
        assert context.copied == expected
        kv.release(seq, keep=False)
    bench.run(1000)


def test_two_requests_with_one_new_prefix_compute_it_once() -> None:
    bench = bench_of()
    context, long = bench.backend.context, prompt_of(300)
    bench.submit(0, request((*long, 1), 3))
    bench.submit(1, request((*long, 2), 3))
    bench.run()
    assert context.computed == 300 + 2 * (1 + 2)
    assert (cached(bench, 0), cached(bench, 1)) == (0, 300)


def test_a_stored_whole_state_replaces_the_shorter_prefix_of_a_slot() -> None:
    """The longest prefix is in a running sequence and cannot be copied; the free slot keeps less than was saved."""
    bench = bench_of(slots=2, ram=10**6, divisible=False)
    long = prompt_of(200)
    bench.submit(0, request((*long, 1), 400))
    for _ in range(4):
        bench.core.step()
    bench.submit(1, request((*long[:40], 50), 3))
    while 1 not in bench.ends:
        bench.core.step()
    bench.submit(2, request((*long, 2), 3))
    while 2 not in bench.ends:
        bench.core.step()
        bench.check()
    assert cached(bench, 2) > 40, "the saved state was loaded"
    bench.run()
    for key, prompt in ((0, (*long, 1)), (2, (*long, 2))):
        assert bench.outputs[key] == alone(bench.sequences[key].request, 1000)[0], prompt


@pytest.mark.parametrize("ram", [0, 10**6])
def test_whole_states_are_copied_or_saved_for_requests_with_one_prefix(ram: int) -> None:
    """With a sliding window and per-slot KV a prefix of a longer sequence can be shared only if it was saved."""
    bench = bench_of(ram=ram, divisible=False)
    context, long = bench.backend.context, prompt_of(300)
    for key in range(3):
        bench.submit(key, request((*long, 1 + key), 3))
    bench.run()
    for key in range(3):
        assert bench.outputs[key] == alone(request((*long, 1 + key), 3), 1000)[0]
    assert context.computed == (300 + 3 * 3 if ram else 3 * 303)


def test_a_request_without_a_cached_prefix_goes_to_the_slot_unused_longest() -> None:
    bench = bench_of(slots=3)
    prompts = [prompt_of(200, n) for n in range(3)]
    for key, prompt in enumerate(prompts):
        run(bench, key, prompt)
    for key in range(3, 6):
        run(bench, key, (40 + key - 3,), 300)
    assert run(bench, 9, (*prompts[0], 3)) <= 1, "its slot was overwritten first"


# ── displaced content ──


def test_the_content_of_a_slot_is_saved_before_it_is_overwritten() -> None:
    bench = bench_of(slots=1, ram=10**6)
    context, first = bench.backend.context, prompt_of(300)
    run(bench, 0, first)
    run(bench, 1, prompt_of(200, 1))
    assert context.used() == 200, "one slot, one sequence"
    assert bench.core.kv.stats().saved_tokens >= 300
    before = context.computed
    assert run(bench, 2, (*first, 7)) == 300
    assert context.computed - before == 1
    assert bench.core.kv.stats().restored_tokens == 300


def test_the_end_of_a_slot_is_saved_before_it_is_cut() -> None:
    bench = bench_of(slots=1, ram=10**6)
    first = prompt_of(300)
    run(bench, 0, first)
    assert run(bench, 1, (*first[:100], 7, 8, 9)) == 100
    assert run(bench, 2, (*first, 7)) == 300, "100 tokens are in the slot, the others in RAM"


def test_without_an_offload_tier_the_content_of_a_slot_is_lost() -> None:
    bench = bench_of(slots=1)
    first = prompt_of(300)
    run(bench, 0, first)
    run(bench, 1, prompt_of(200, 1))
    assert run(bench, 2, (*first, 7)) <= 1


def test_a_slot_is_not_saved_twice() -> None:
    bench = bench_of(slots=1, ram=10**6)
    run(bench, 0, prompt_of(320))
    bench.offload_idle()
    assert bench.core.kv.stats().saved_tokens == 320
    run(bench, 1, prompt_of(200, 1))
    assert bench.core.kv.stats().saved_tokens <= 320 + 200


def test_evict_frees_nothing_that_a_slot_holds() -> None:
    """Cells that a slot frees are of no use to another slot."""
    bench = bench_of(ram=10**6)
    run(bench, 0, prompt_of(300))
    bench.core.kv.evict(10**6)
    assert bench.backend.context.used() == 300
    assert bench.core.kv.evictable_cells == 0
    bench.core.kv.drop_idle()
    assert bench.backend.context.used() == 0


# ── gaps ──


def ids_of(bench: CoreBench) -> list[int]:
    return sorted(sequence.seq for sequence in bench.core.running.values())


def test_the_next_admission_fills_a_gap() -> None:
    bench = bench_of(extra_pass=1e-3)
    for key in range(3):
        start(bench, key, prompt_of(20, key))
    bench.core.lifecycle.end(1, FinishReason.STOP)
    assert ids_of(bench) == [0, 2]
    assert start(bench, 3, prompt_of(20, 3)) == 1
    bench.run()


def test_a_gap_is_closed_once_it_has_cost_more_than_the_move() -> None:
    bench = bench_of(ram=10**6, extra_pass=1e-3)
    context = bench.backend.context
    for key in range(4):
        start(bench, key, prompt_of(300, key), 40)
    bench.core.lifecycle.end(1, FinishReason.STOP)
    move = bench.core.kv._allocator.costs.move
    steps = 0
    assert ids_of(bench) == [0, 2, 3]
    while ids_of(bench) == [0, 2, 3]:
        bench.core.step()
        bench.check()
        steps += 1
        assert steps < 30
    assert ids_of(bench) in ([0, 1, 2], [1, 2, 3])
    assert steps >= 2 * 300 * move / 1e-3 - 1, "ski-rental rule: the gap first costs as much as the move"
    assert context.copied >= 300
    bench.run()
    for key in (0, 2, 3):
        assert bench.outputs[key] == alone(request(prompt_of(300, key), 40), 1000)[0]
    assert run(bench, 9, (*prompt_of(300, 1), 3)) == 300, "the content of the gap is restored from RAM"


def test_a_gap_that_costs_nothing_stays() -> None:
    bench = bench_of()
    for key in range(3):
        start(bench, key, prompt_of(300, key), 40)
    bench.core.lifecycle.end(0, FinishReason.STOP)
    for _ in range(20):
        bench.core.step()
        assert ids_of(bench) == [1, 2]
    bench.run()
    assert bench.backend.context.copied == 0


def test_the_cost_of_a_gap_starts_anew_when_it_is_filled() -> None:
    bench = bench_of()
    kv = bench.core.kv
    for key in range(3):
        start(bench, key, prompt_of(300, key))
    move = kv._allocator.costs.move
    kv.set_costs(Costs(compute=1.0, extra_pass=move * 250))
    bench.core.lifecycle.end(1, FinishReason.STOP)
    kv._eviction.drop_all()
    assert [kv.close_gap() for _ in range(2)] == [None, None]
    seq = kv.allocate(kv.match(array("i", prompt_of(20, 3)), "")).seq
    assert (seq, kv.close_gap()) == (1, None)
    kv.release(seq, keep=False)
    assert [kv.close_gap() for _ in range(3)] == [None, None, (2, 1)]
    bench.sequences[2].allocation = None
    bench.core.running.clear()


# ── matching ──


@both
def test_a_match_is_searched_once_while_nothing_changes(unified: bool) -> None:
    bench = CoreBench(context_of(unified, 1000, rows=512), ram=10**6)
    kv, prompt = bench.core.kv, array("i", prompt_of(100))
    match = kv.match(prompt, "")
    assert kv.match(prompt, "", match) is match
    bench.submit(0, request(prompt_of(99), 5))
    bench.core.step()
    for _ in range(2):
        before, match = match, kv.match(prompt, "", match)
        assert match is not before, "a sequence was begun, or released"
        assert (match.length, match.idle_cells) == (99, 99 if 0 in bench.ends and unified else 0)
        assert kv.match(prompt, "", match) is match
        bench.run()
    kv.drop_idle()
    before, match = match, kv.match(prompt, "", match)
    assert match is not before, "a sequence was dropped"
    assert (match.length, match.known_length) == (0, 99)
    assert kv.match(prompt, "", match) is match


@both
def test_a_queue_that_cannot_start_is_not_searched_again(unified: bool) -> None:
    bench = CoreBench(context_of(unified, 1000, slots=1, rows=512), slots=1, ram=10**6)
    for key in range(6):
        bench.submit(key, request(prompt_of(50, key), 100))
    bench.core.step()
    searches: list[str] = []
    found = bench.core.kv._residents.match
    bench.core.kv._residents.match = lambda tokens, salt: searches.append(salt) or found(tokens, salt)  # type: ignore[method-assign, func-returns-value]
    for _ in range(50):
        bench.core.step()
    assert not searches
    bench.run()
