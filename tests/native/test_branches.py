"""Alternatives on a real context: a second token at a position attends to the tokens before it only."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from engine import Request
from engine.branching import max_alternatives
from tests.engine.test_same_as_alone import CoreBench, Oracle
from tests.native import tiny
from tests.native.test_kinds import TOKENS
from tests.native.test_memory import GREEDY, bench_of, cells, words


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.experts(tmp_path_factory.mktemp("models") / "experts.gguf")


def open_bench(path: Path, *, unified: bool = True) -> CoreBench:
    return bench_of(path, flash_attention="on", cache_type_v="bf16", threads=1, **cells(unified, 512))


def rows_of(context: Any, seq: int, start: int, tokens: list[int], alternative: tuple[int, int] | None = None) -> Any:
    """Returns the logits of all `tokens`, and after these of the alternative, a token and its position."""
    context.batch.clear()
    rows = tokens if alternative is None else [*tokens, alternative[0]]
    context.batch.add(seq, start, rows, len(rows))
    if alternative is not None:
        context.batch.make_alternative(len(tokens), alternative[1], 0)
    return context.decode().copy()


@pytest.mark.parametrize("place", [0, 2])
def test_an_alternative_has_the_logits_of_its_own_path(path: Path, place: int) -> None:
    bench = open_bench(path)
    context: Any = bench.core.context
    assert max_alternatives(context) == 8
    prompt, draft, other, end = TOKENS[:50], TOKENS[60:64], TOKENS[70], 51 + place
    rows_of(context, 1, 0, [*prompt, *draft[: 1 + place]])
    wanted = [rows_of(context, 1, end, [other])[0], rows_of(context, 1, end + 1, [TOKENS[80]])[0]]
    rows_of(context, 0, 0, prompt)
    for _ in range(3):  # a branch is used again
        rows = rows_of(context, 0, 50, draft, (other, end))
        plain = rows_of(context, 2, 0, [*prompt, *draft])
        context.adopt(0, end)
        assert context.length(0) == end + 1
        after = rows_of(context, 0, end + 1, [TOKENS[80]])[0]
        for got, expected in ((rows[-1], wanted[0]), (after, wanted[1]), (rows[:4], plain[-4:])):
            np.testing.assert_allclose(got, expected, atol=0.02)
        context.cut(0, 50)
        context.cut(2, 0)
    rows_of(context, 0, 50, draft, (other, end))
    context.cut(0, end)
    np.testing.assert_allclose(rows_of(context, 0, end, [other])[0], wanted[0], atol=0.02)
    for seq in (0, 1):
        context.cut(seq, 0)
    assert all(context.last_position(seq) == -1 for seq in range(context.sequences + context.alternatives))
    bench.backend.close()


def test_alternatives_change_no_text_and_free_all_cells(path: Path) -> None:
    bench, random = open_bench(path), Random(1)
    requests = [Request(prompt=words(n, 12 + n), max_tokens=32, ignore_eos=True, sampling=GREEDY) for n in range(4)]
    for key, request in enumerate(requests):
        bench.submit(key, request)
        bench.run()
        bench.core.kv.drop_idle()
    context: Any = bench.core.context
    adopt, adopted = context.adopt, list[int]()

    def counted(seq: int, length: int) -> None:
        adopted.append(length)
        adopt(seq, length)

    context.adopt = counted
    for key, request in enumerate(requests, 10):
        bench.submit(key, request, Oracle(request, bench.outputs[key - 10], 0.4, random, lambda _: True))
        bench.core.step()
    bench.run()
    assert [bench.outputs[key] for key in range(10, 14)] == [bench.outputs[key] for key in range(4)]
    assert adopted
    bench.core.kv.drop_idle()
    assert all(context.last_position(seq) == -1 for seq in range(context.sequences + context.alternatives))
    bench.backend.close()


def test_with_per_slot_kv_there_are_none(path: Path) -> None:
    bench = open_bench(path, unified=False)
    assert max_alternatives(bench.core.context) == 0
    bench.backend.close()
