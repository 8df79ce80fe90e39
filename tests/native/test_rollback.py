"""Rejected drafts on models with recurrent states: the states are rolled back to snapshots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from engine import Request
from engine.contract import Finished, Speculation
from engine.llama.context import LlamaContext
from engine.llama.rollback import MAX_SNAPSHOTS, choose_snapshots, state_bytes
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, Oracle
from tests.native import tiny
from tests.native.test_kinds import TOKENS, next_four_logits
from tests.native.test_llama import feed
from tests.native.test_memory import GREEDY, bench_of, cells, words

FIXED = Speculation(order="fixed")
KINDS = ["hybrid", "delta_net", "mamba2"]
OpenBench = Callable[..., CoreBench]


@pytest.fixture(scope="module")
def open_bench(tmp_path_factory: pytest.TempPathFactory) -> OpenBench:
    """Returns a function that opens a tiny model by its kind. A row has the same bits in every batch."""
    folder = tmp_path_factory.mktemp("models")
    paths = {kind: getattr(tiny, kind)(folder / f"{kind}.gguf") for kind in (*KINDS, "recurrent")}

    def open_kind(kind: str, unified: bool, **fields: Any) -> CoreBench:
        settings = {"flash_attention": "on", "cache_type_v": "bf16", "threads": 1, **cells(unified, 512)}
        return bench_of(Path(paths[kind]), **settings | fields)

    return open_kind


def context_of(bench: CoreBench) -> LlamaContext:
    assert isinstance(bench.core.context, LlamaContext)
    return bench.core.context


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_rejected_drafts_of_several_lengths_change_nothing(open_bench: OpenBench, kind: str, unified: bool) -> None:
    bench, random = open_bench(kind, unified), Random(1)
    requests = [
        Request(prompt=words(n, 12 + n), max_tokens=32, ignore_eos=True, sampling=GREEDY, speculation=FIXED)
        for n in range(4)
    ]
    for key, request in enumerate(requests):
        bench.submit(key, request)
        bench.run()
        bench.core.kv.drop_idle()
    for key, request in enumerate(requests, 10):
        bench.submit(key, request, Oracle(request, bench.outputs[key - 10], 0.3, random))
        bench.core.step()
    bench.run()
    usage = [end.usage for key in range(10, 14) if isinstance(end := bench.ends[key], Finished)]
    assert [bench.outputs[key] for key in range(10, 14)] == [bench.outputs[key] for key in range(4)]
    assert sum(each.drafted for each in usage) > sum(each.accepted for each in usage) > 0
    bench.backend.close()


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rollback_drops_rows_of_the_last_decode_once(open_bench: OpenBench, kind: str, unified: bool) -> None:
    bench = open_bench(kind, unified)
    context = context_of(bench)
    assert (context.partial, context.max_rollback) == (False, MAX_SNAPSHOTS)
    feed(context, 0, 0, TOKENS[:60])
    expected = next_four_logits(context, 0)
    context.clear()
    feed(context, 0, 0, TOKENS[:60])
    assert not context.cut(0, 60 - MAX_SNAPSHOTS - 1), "more than the snapshots"
    context.clear()
    feed(context, 0, 0, TOKENS[:59])
    feed(context, 0, 59, [TOKENS[59], *TOKENS[:5]])
    assert not context.cut(0, 59), "all rows of the last decode"
    assert context.length(0) == 65
    assert context.cut(0, 60)
    assert not context.cut(0, 59), "a second rollback before the next decode"
    snapshot = context.save(0)
    assert snapshot is not None
    state = snapshot.cut(0, 60)
    assert state is not None
    assert context.copy(0, 1, 60)
    assert context.set_state(2, state)
    for seq in (2, 1, 0):
        assert np.array_equal(next_four_logits(context, seq), expected), f"sequence {seq}"
    feed(context, 0, 64, TOKENS[:2])
    feed(context, 1, 64, TOKENS[:1])
    assert not context.cut(0, 65), "a decode of another sequence has moved the state"
    bench.backend.close()


def test_drafts_stay_off_with_the_reason(open_bench: OpenBench) -> None:
    for kind, fields, reason in (
        ("recurrent", {}, ""),
        ("hybrid", {"speculation": {"types": ("none",)}}, "--spec-type none"),
    ):
        bench = open_bench(kind, True, **fields)
        assert context_of(bench).max_rollback == 0
        assert reason in bench.backend.info.no_drafts
        bench.backend.close()


def test_snapshots_fit_the_memory(open_bench: OpenBench) -> None:
    bench = open_bench("mamba2", True)
    assert state_bytes(bench.backend.model) == 4 * tiny.LAYERS * (16 * 128 + 3 * (128 + 2 * 16))
    bench.backend.close()
    assert choose_snapshots(1000, 10, 512, 10**9, drafts=True).kept == MAX_SNAPSHOTS
    assert choose_snapshots(1000, 10, 512, 8 * 40_000, drafts=True).kept == 3
    assert choose_snapshots(1000, 10, 6, 10**9, drafts=True).kept == 4
    few = choose_snapshots(10**9, 10, 512, 10**9, drafts=True)
    assert few.kept == 0
    assert "need 20.0 GB, more than 12.5% of the free memory" in few.reason
