"""Fair queueing: the order of owners, displacement, priorities and time limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from engine.contract import Failed, Finished, FinishReason, Request
from engine.fairness import Claim, QueueEntry, TokenCounters, displaced, prefill_share, rank
from engine.time_limits import DeadlineExceeded, QueueTimeout
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, context_of
from tests.toy import ToyContext

FLOOD = 200


def claims(*sequences: Any) -> list[Claim]:
    """Returns claims with ascending keys, each of an owner, a weight, a priority and maybe a deadline."""
    return [Claim(key, *sequence) for key, sequence in enumerate(sequences)]


@pytest.mark.parametrize(
    ("case", "candidate", "running", "wanted"),
    [
        ("the one without a deadline", ("b", 1, 0), [("a", 1, 0, 5.0), ("a", 1, 0), ("a", 1, 0, 9.0)], 1),
        ("the last deadline", ("b", 1, 0), [("a", 1, 1, 5.0), ("a", 1, 1, 9.0), ("a", 1, 1, 7.0)], 1),
        ("no deadline protects a share", ("b", 1, 0), [("a", 1, 0, 5.0)] * 2, 1),
        ("one owner alone", ("a", 1, 0), [("a", 1, 0)] * 4, None),
        ("the last of an owner with more", ("b", 1, 0), [("a", 1, 0)] * 4, 3),
        ("equal parts", ("b", 1, 0), [("a", 1, 0), ("a", 1, 0), ("b", 1, 0)], None),
        ("one each", ("c", 1, 0), [("a", 1, 0), ("b", 1, 0)], None),
        ("the owner with the most", ("c", 1, 0), [("a", 1, 0), ("a", 1, 0), ("a", 1, 0), ("b", 1, 0), ("b", 1, 0)], 2),
        ("three quarters", ("b", 3, 0), [("a", 1, 0), ("a", 1, 0), ("b", 3, 0), ("b", 3, 0)], 1),
        ("no more than three quarters", ("b", 3, 0), [("a", 1, 0), *[("b", 3, 0)] * 3], None),
        ("a lower priority of the same owner", ("a", 1, 0), [("a", 1, 1), ("a", 1, 2), ("a", 1, 2)], 2),
        ("a priority of 0", ("a", 1, -1), [("a", 1, 0)], 0),
        ("no higher priority", ("b", 1, 0), [("a", 1, -1)] * 3, None),
    ],
)
def test_who_yields(case: str, candidate: tuple[str, float, int], running: list[Any], wanted: int | None) -> None:
    assert displaced(Claim(99, *candidate), claims(*running)) == wanted, case


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=8), st.sampled_from([0.5, 1.0, 3.0]))
def test_no_owners_displace_each_other_in_turn(owners: list[str], weight: float) -> None:
    weights = {"a": weight, "b": 1.0, "c": 2.0}
    running = claims(*((owner, weights[owner], 0) for owner in owners))
    for candidate in "abc":
        key = displaced(Claim(99, candidate, weights[candidate], 0), running)
        if key is None:
            continue
        after = [claim for claim in running if claim.key != key] + [Claim(99, candidate, weights[candidate], 0)]
        assert displaced(running[key], after) != 99


def test_the_order_of_the_queue() -> None:
    entries = [
        rank(QueueEntry(1, math.inf, True, 0), 0.0, 0.0),
        rank(QueueEntry(0, math.inf, True, 1), 1.0, 4.0),
        rank(QueueEntry(0, math.inf, True, 2), 0.0, 9.0),
        rank(QueueEntry(0, math.inf, True, 3), 0.0, 5.0),
        rank(QueueEntry(0, math.inf, False, 4), 0.0, 2.0),
    ]
    assert [entry[-1] for entry in sorted(entries)] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("prefilling", "decoding", "share"),
    [
        ({"a": 1.0}, {}, 0.0),
        ({"a": 1.0}, {"a": 1.0}, 0.0),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, 3.0),
        ({"b": 2.0}, {"a": 1.0}, 6.0),
        ({"b": 1.0}, {"a": 1.0, "c": 9.0}, 3.0),
    ],
)
def test_the_prefill_of_an_owner_without_output(
    prefilling: dict[str, float], decoding: dict[str, float], share: float
) -> None:
    assert prefill_share(prefilling, decoding) == share


def test_an_owner_gains_nothing_by_a_pause() -> None:
    counters = TokenCounters()
    counters.join("a")
    counters.charge("a", 100, 2.0)
    counters.join("b")
    assert counters["a"] == counters["b"] == 50
    counters.charge("b", 30, 1.0)
    counters.leave("b")
    counters.charge("a", 100, 2.0)
    counters.join("b")
    assert counters["b"] == 100
    for name in range(5000):
        counters.join(str(name))
        counters.charge(str(name), 1, 1.0)
        counters.leave(str(name))
    assert len(counters._served) < 1100
    counters.leave("a")
    counters.leave("b")
    counters.join("c")
    assert counters["c"] == 0


def steps_to_first_token(bench: CoreBench, key: int, request: Request) -> int:
    """Returns the number of steps from the submission of a request to its first token."""
    before = bench.core.counters.steps
    bench.submit(key, request)
    while not bench.outputs[key]:
        bench.core.step()
    return bench.core.counters.steps - before


def flood(bench: CoreBench, owner: str = "flood") -> None:
    for key in range(FLOOD):
        prompt = tuple(1 + (key * 7 + at) % 49 for at in range(20 + key % 30))
        bench.submit(key, Request(prompt=prompt, max_tokens=40, ignore_eos=True, owner=owner))


@pytest.mark.parametrize("unified", LAYOUTS)
def test_a_flood_delays_the_first_token_of_another_owner_by_little(unified: bool) -> None:
    request = Request(prompt=(3, 1, 4, 1, 5, 9) * 10, max_tokens=3, ignore_eos=True, owner="other", cache=False)
    alone = steps_to_first_token(CoreBench(context_of(unified, 200), prompt_rows=16), 1000, request)
    bench = CoreBench(context_of(unified, 200), prompt_rows=16)
    flood(bench)
    for repetition in range(8):
        assert steps_to_first_token(bench, 1000 + repetition, request) <= 2 * alone + 1
        for _ in range(5):
            bench.core.step()
    assert bench.core.counters.displacements
    assert len(bench.ends) < FLOOD, "the flood goes on"
    for key in range(FLOOD):
        bench.core.lifecycle.end(key, FinishReason.CANCELLED)
    bench.run()
    assert len(bench.ends) == FLOOD + 8


def test_tokens_are_divided_by_weight() -> None:
    bench = CoreBench(context_of(False, 100))
    for key in range(80):
        owner, weight = ("heavy", 3.0) if key % 2 else ("light", 1.0)
        bench.submit(
            key, Request(prompt=(1 + key % 40,) * 5, max_tokens=15, ignore_eos=True, owner=owner, weight=weight)
        )
    while bench.core.counters.completion_tokens < 600:
        bench.core.step()
    tokens = [sum(len(bench.outputs[key]) for key in range(start, 80, 2)) for start in (0, 1)]
    assert 2.5 < tokens[1] / tokens[0] < 3.5


def test_priorities_and_deadlines_order_the_requests_of_an_owner() -> None:
    bench = CoreBench(ToyContext(), slots=1)
    base = Request(prompt=(1, 2), max_tokens=2, ignore_eos=True)
    fields: list[dict[str, Any]] = [{}, {"priority": 5}, {}, {"timeout": 1e6}, {"priority": -1}]
    for key, changes in enumerate(fields):
        bench.submit(key, structs.replace(base, **changes))
    bench.run()
    assert list(bench.ends) == [4, 3, 0, 2, 1]


def test_a_higher_priority_displaces_and_the_displaced_output_is_whole() -> None:
    bench = CoreBench(ToyContext(), slots=1)
    low = Request(prompt=(1, 2), max_tokens=10, ignore_eos=True, priority=1)
    bench.submit(0, low)
    for _ in range(3):
        bench.core.step()
    bench.submit(1, structs.replace(low, prompt=(3,), priority=0))
    bench.run()
    assert list(bench.ends) == [1, 0]
    assert len(bench.outputs[0]) == 10
    alone = CoreBench(ToyContext(), slots=1)
    alone.submit(0, low)
    alone.run()
    assert bench.outputs[0] == alone.outputs[0]


def test_when_cells_run_out_the_lowest_priority_is_preempted() -> None:
    bench = CoreBench(ToyContext(cells=40), slots=3)
    for key, priority in enumerate((1, 0, 0)):
        bench.submit(key, Request(prompt=(key + 1,) * 3, max_tokens=20, ignore_eos=True, priority=priority))
    bench.run()
    assert bench.core.counters.preemptions
    assert list(bench.ends)[-1] == 0


def test_when_cells_run_out_a_deadline_protects() -> None:
    bench = CoreBench(ToyContext(cells=40), slots=3)
    for key, timeout in enumerate((None, 1e6, 1e5)):
        bench.submit(key, Request(prompt=(key + 1,) * 3, max_tokens=20, ignore_eos=True, timeout=timeout))
    bench.run()
    assert bench.core.counters.preemptions
    assert list(bench.ends) == [2, 1, 0]
    assert all(len(output) == 20 for output in bench.outputs.values())


def test_a_time_limit_ends_a_request_once() -> None:
    bench = CoreBench(ToyContext(), slots=1, queue_timeout=3.0)
    base = Request(prompt=(1, 2), max_tokens=50, ignore_eos=True)
    for key, timeout in enumerate((10.0, None, 2.0, 7.0)):
        bench.submit(key, structs.replace(base, timeout=timeout))
        bench.sequences[key].submitted = 0.0
        bench.sequences[key].due = math.inf if timeout is None else timeout
    lifecycle = bench.core.lifecycle
    lifecycle._time_limits._times.clear()
    for sequence in bench.sequences.values():
        lifecycle._time_limits.add(sequence, lambda key: True)
    lifecycle.start(bench.sequences[0])
    ended: list[list[int]] = []
    for now in (1.0, 2.5, 5.0, 8.0):
        lifecycle.expire(now)
        bench.core._outbox.flush()
        ended.append(sorted(bench.ends))
    assert ended == [[], [2], [1, 2, 3], [1, 2, 3]]
    errors = [end.error for key, end in sorted(bench.ends.items()) if isinstance(end, Failed)]
    assert [type(error) for error in errors] == [QueueTimeout, DeadlineExceeded, QueueTimeout]
    bench.core._execution.execute(bench.core._plan().rows)
    lifecycle.expire(11.0)
    bench.core._outbox.flush()
    end = bench.ends[0]
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.completion) == (FinishReason.LENGTH, 1)


def test_owners_share_the_prefill_token_by_token() -> None:
    bench = CoreBench(context_of(False, 100), prompt_rows=10)
    for key in range(3):
        bench.submit(key, Request(prompt=(1 + key,) * 60, max_tokens=1, owner="a"))
    bench.core.step()
    bench.submit(3, Request(prompt=(7,) * 30, max_tokens=1, owner="b"))
    steps = 0
    while 3 not in bench.ends:
        bench.core.step()
        steps += 1
    assert steps <= 2 * 3
    bench.run()
    assert len(bench.ends) == 4
