"""LoRA adapters in the engine: sets take turns, never share a prefix, and do not change each other's tokens."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from msgspec import structs

from engine.adapters import TURN_SECONDS, TURN_STEPS, AdapterInfo, AdapterScale, AdapterSet, AdapterTurns, namespace
from engine.contract import Finished, FinishReason, Request, RequestRefused, SamplingParams
from engine.loaded_adapters import LoadedAdapters
from engine.scheduler import FreeCapacity, SequenceView, StepLimits, plan
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, Oracle, alone, context_of, draw_request
from tests.sizes import sized

A, B = (AdapterScale(0, 1.0),), (AdapterScale(0, 1.0), AdapterScale(1, 0.5))
SETS: list[AdapterSet] = [(), A, B]


# ── turns ──


def test_each_set_waits_for_at_most_one_turn_of_each_other_set() -> None:
    turns, served = AdapterTurns(), list[AdapterSet]()
    for step in range(12 * TURN_STEPS):
        sets = SETS if step > 5 else SETS[:2]
        assert turns.choose(sets) == turns.choose(sets), "the choice stays until the step is counted"
        served.append(turns.choose(sets))
        turns.count_step(0.0)
    switches = [step for step in range(1, len(served)) if served[step] != served[step - 1]]
    assert all(later - step == TURN_STEPS for step, later in pairwise(switches))
    for each in SETS:
        steps = [step for step, chosen in enumerate(served) if chosen == each]
        assert max(later - step for step, later in pairwise(steps)) <= 2 * TURN_STEPS + 1


def test_a_turn_ends_early_after_long_steps_or_without_rows() -> None:
    turns = AdapterTurns()
    assert turns.choose([A]) == A
    turns.count_step(2 * TURN_SECONDS)
    assert turns.choose([A]) == A, "no other set has rows"
    assert turns.choose([A, B]) == B
    assert turns.choose([A]) == A, "B has no rows any more"
    assert turns.choose([]) == A


@pytest.mark.parametrize("paused", [False, True])
def test_paused_sequences_have_no_rows_but_may_be_preempted(paused: bool) -> None:
    running = [SequenceView(1, 9, 8), SequenceView(2, 30, 10, exclusive=10, paused=paused)]
    limits = StepLimits(rows=64, outputs=64, prompt_rows=20)
    assert {part.key for part in plan(running, FreeCapacity(0, 50, 0), limits).rows} == ({1} if paused else {1, 2})
    full = plan(running, FreeCapacity(0, 0, 0), limits)
    assert (full.preempt, [part.key for part in full.rows]) == ((2,), [1])


# ── namespaces ──


def test_namespaces_differ_unless_salt_and_adapters_are_equal() -> None:
    sets = [*SETS, (AdapterScale(0, 0.5),), (AdapterScale(0, 1.0, "digest"),)]
    salts = ["", "x", "\0lora 0:1.0\0", "\0\0", "\0", "0:1.0"]
    names = [namespace(salt, adapters) for salt in salts for adapters in sets]
    assert len(set(names)) == len(names)
    assert namespace("tenant", ()) == "tenant"


# ── requests ──


def test_requests_get_the_current_default_or_their_own_scales() -> None:
    infos = [AdapterInfo(id=0, path="a", scale=1.0, digest="da"), AdapterInfo(id=1, path="b", scale=0.0, digest="db")]
    loaded, request = LoadedAdapters(infos), Request(prompt=(1,))
    assert loaded.resolve(request).adapters == (AdapterScale(0, 1.0, "da"),)
    own = structs.replace(request, adapters=(AdapterScale(1, 0.5), AdapterScale(0, 0.0)))
    assert loaded.resolve(own).adapters == (AdapterScale(1, 0.5, "db"),)
    loaded.set_scales({1: -2.0})
    assert loaded.resolve(request).adapters == (AdapterScale(1, -2.0, "db"),)
    assert [info.scale for info in loaded.infos] == [0.0, -2.0]
    for scales in ({2: 1.0}, {-1: 1.0}, {0: float("nan")}, {0: 1e9}):
        with pytest.raises(RequestRefused, match="lora: "):
            loaded.set_scales(scales)
    assert LoadedAdapters([]).resolve(request) is request


# ── the engine ──


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("seed", range(sized(15, 300)))
def test_requests_with_other_adapters_do_not_change_the_tokens(seed: int, unified: bool) -> None:
    random = Random(seed)
    cells = random.choice([64, 90, 300])
    context = context_of(unified, cells, sequences=random.choice([5, 12]), rows=64, outputs=16)
    bench = CoreBench(context, prompt_rows=random.choice([1, 5, 100]), ram=random.choice([0, 10**6]))
    prefixes = [[random.randrange(1, 50) for _ in range(40)] for _ in range(2)]
    wanted: dict[int, tuple[list[int], FinishReason]] = {}
    for key in range(10):
        request = structs.replace(draw_request(random, prefixes, cells), adapters=random.choice(SETS))
        wanted[key] = alone(request, cells)
        oracle = Oracle(request, wanted[key][0], random.choice([0.0, 0.5]), random)
        bench.submit(key, request, oracle if random.random() < 0.5 else None)
        for _ in range(random.randint(0, 4)):
            bench.core.step()
            bench.check()
        if bench.core.running and random.random() < 0.15:
            bench.core.lifecycle.preempt(random.choice(list(bench.core.running.values())))
    bench.run()
    bench.compare(wanted, (), faults=False)


@pytest.mark.parametrize("unified", LAYOUTS)
def test_a_prefix_is_shared_with_the_same_adapters_only(unified: bool) -> None:
    bench = CoreBench(context_of(unified, 300), ram=10**6)
    request = Request(prompt=tuple(range(1, 41)), max_tokens=4, sampling=SamplingParams(temperature=0.0))
    cached = []
    for key, adapters in enumerate([(), A, (), A, B]):
        bench.submit(key, structs.replace(request, adapters=adapters))
        bench.run()
        end = bench.ends[key]
        assert isinstance(end, Finished)
        cached.append(end.usage.cached)
    assert [count > 0 for count in cached] == [False, False, True, True, False]
    assert bench.outputs[0] == bench.outputs[2] != bench.outputs[1] == bench.outputs[3]
