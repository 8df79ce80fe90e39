"""Parts of a prompt that were computed at other positions are found, as by an exhaustive search, and moved."""

from __future__ import annotations

from array import array
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.contract import Finished, Request, SamplingParams
from engine.kv.reuse import TokenRun, runs
from tests.engine.test_memory import prompt_of
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, alone, context_of


def first_run(new: array[int], old: array[int], start: int, min_size: int) -> int | None:
    """Returns the first position from `start` on at which `min_size` tokens of `new` occur in `old`; `None` if there is
    none."""
    windows = {tuple(old[at : at + min_size]) for at in range(len(old) - min_size + 1)}
    return next((at for at in range(start, len(new) - min_size + 1) if tuple(new[at : at + min_size]) in windows), None)


tokens = st.lists(st.integers(0, 2), max_size=40).map(lambda values: array("i", values))


@given(tokens, tokens, st.integers(0, 10), st.integers(1, 6))
def test_runs_begin_where_an_exhaustive_search_finds_them(
    new: array[int], old: array[int], start: int, min_size: int
) -> None:
    found = runs(new, old, start, min_size)
    end = start
    for run in found:
        assert run.start >= end
        assert run.size >= min_size
        assert new[run.start : run.start + run.size] == old[run.donor_start : run.donor_start + run.size]
        end = run.start + run.size
    assert (found[0].start if found else None) == first_run(new, old, start, min_size)


def test_the_text_after_a_changed_header_is_one_run() -> None:
    header, rest = array("i", prompt_of(10)), array("i", prompt_of(200, 1))
    old, new = header + array("i", (7, 8, 9)) + rest, header + array("i", (1, 2, 3, 4, 5)) + rest
    assert runs(new, old, 10, 64) == [TokenRun(15, 13, 200)]


def bench_with(reuse: int, cells: int = 2000, *, unified: bool = True) -> CoreBench:
    """Returns a bench whose engine moves cells."""
    return CoreBench(context_of(unified, cells, rows=512), ram=10**6, reuse=reuse)


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("width", [3, 5])
def test_the_part_after_a_changed_line_is_moved(resident: bool, width: int, unified: bool) -> None:
    head, rest = prompt_of(20), prompt_of(300, 1)
    bench = bench_with(64, unified=unified)
    context = bench.backend.context
    bench.submit(0, Request(prompt=(*head, 41, 42, 43, *rest, 5), max_tokens=1))
    bench.run()
    if not resident:
        bench.core.kv.drop_idle()
    before = context.computed
    request = Request(prompt=(*head, *range(30, 30 + width), *rest, 6), max_tokens=9, sampling=SamplingParams(seed=1))
    bench.submit(1, request)
    bench.run()
    end = bench.ends[1]
    assert isinstance(end, Finished)
    assert end.usage.cached == 20 + 300
    assert end.usage.moved == 300
    assert context.computed - before == width + 1 + len(bench.outputs[1]) - 1
    assert bench.outputs[1] == alone(request, 2000)[0], "the toy's logits depend only on tokens and positions"
    bench.submit(2, Request(prompt=(*request.prompt, *bench.outputs[1], 3), max_tokens=1))
    bench.run()
    again = bench.ends[2]
    assert isinstance(again, Finished)
    assert again.usage.cached >= len(request.prompt)


@pytest.mark.parametrize("unified", LAYOUTS)
def test_nothing_is_moved_by_default_or_across_salts(unified: bool) -> None:
    head, rest = prompt_of(20), prompt_of(300, 1)
    for reuse, salt in ((0, ""), (64, "other")):
        bench = bench_with(reuse, unified=unified)
        bench.submit(0, Request(prompt=(*head, 41, *rest, 5), max_tokens=1))
        bench.run()
        bench.submit(1, Request(prompt=(*head, 42, 43, *rest, 5), max_tokens=1, salt=salt))
        bench.run()
        end = bench.ends[1]
        assert isinstance(end, Finished)
        assert end.usage.moved == 0


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("seed", range(10))
def test_prompts_of_shuffled_parts_in_few_cells(seed: int, unified: bool) -> None:
    random = Random(seed)
    bench = bench_with(16, cells=random.choice([300, 600]), unified=unified)
    parts = [prompt_of(random.randint(10, 60), n) for n in range(6)]
    wanted: dict[int, list[int]] = {}
    for key in range(20):
        prompt = tuple(token for part in random.sample(parts, random.randint(1, 4)) for token in part)
        request = Request(prompt=prompt, max_tokens=random.choice([1, 20]), sampling=SamplingParams(seed=key))
        wanted[key] = alone(request, 1000)[0]
        bench.submit(key, request)
        for _ in range(random.randint(0, 8)):
            bench.core.step()
            bench.check()
        if bench.core.running and random.random() < 0.3:
            bench.core.lifecycle.preempt(random.choice([*bench.core.running.values()]))
        if random.random() < 0.3:
            bench.core.kv.evict(200) if unified else bench.core.kv.drop_idle()
    bench.run()
    assert bench.outputs == wanted
    assert any(isinstance(end, Finished) and end.usage.moved for end in bench.ends.values())
