"""Drafts of MTP layers: the tokens stay the same, and each sequence has the drafts that it has alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from engine import AdapterScale, Engine, EngineConfig, Request, SamplingParams, Speculation
from engine.backend import NativeFault, StatePart
from engine.config import SpeculationConfig
from engine.contract import DraftStats, ModelError
from engine.kv import Offload
from engine.llama import mtp_layer, open_gguf
from engine.llama.mtp import MtpContext
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench
from tests.native import tiny
from tests.native.test_damaged import damaged
from tests.native.test_engine import collect
from tests.native.test_llama import feed
from tests.native.test_memory import GREEDY, cells, words
from tests.native.tiny_adapter import adapter
from tests.native.tiny_gemma4 import gemma4, gemma4_head

MIB = 2**20
KINDS = ["cells", "hybrid", "layers", "reader"]
TYPES = SpeculationConfig(types=("draft-mtp",), order="fixed")
# A row has the same bits in every batch.
EXACT: dict[str, Any] = {"flash_attention": "on", "cache_type_v": "bf16", "threads": 1}
OpenBench = Callable[..., CoreBench]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the paths of the tiny models with MTP layers."""
    folder = tmp_path_factory.mktemp("mtp")
    return {
        "cells": tiny.with_mtp(folder / "cells.gguf"),
        "hybrid": tiny.delta_net(folder / "hybrid.gguf", mtp=True),
        "layers": tiny.with_mtp_layers(folder / "layers.gguf"),
        "trunk": tiny.with_mtp(folder / "trunk.gguf", part="trunk"),
        "head": tiny.with_mtp(folder / "mtp-head.gguf", part="head"),
        "reader": gemma4(folder / "gemma4.gguf"),
        "reader-head": gemma4_head(folder / "mtp-gemma4.gguf"),
        "eagle3": tiny.without_layers(folder / "eagle3.gguf", "eagle3"),
    }


@pytest.fixture(scope="module")
def open_bench(paths: dict[str, Path]) -> OpenBench:
    """Returns a function that opens a bench over a tiny model."""

    def open_kind(kind: str, unified: bool, *, ram: int = 64 * MIB, **fields: Any) -> CoreBench:
        settings = {"slots": 4, "rows": 128, "ubatch": 128, **EXACT, **cells(unified, 512)} | fields
        config = EngineConfig.of(path=paths[kind], draft={"path": str(paths.get(f"{kind}-head", ""))}, **settings)
        backend = open_gguf(config, lambda share: None, lambda: True)
        offload = Offload(ram, whole=not backend.context.divisible)
        return CoreBench(
            backend.context,
            prompt_rows=64,
            backend=backend,
            speculation=TYPES,
            offload=offload,
            noise="shared",
            mtp=True,
        )

    return open_kind


def requests_of(count: int, **fields: Any) -> list[Request]:
    """Returns greedy requests, and sampled ones."""
    sampled = SamplingParams(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, seed=7)
    return [
        Request(
            prompt=words(n, 20 + n), max_tokens=40, ignore_eos=True, sampling=sampled if n % 2 else GREEDY, **fields
        )
        for n in range(count)
    ]


def run(bench: CoreBench, requests: list[Request], *, together: bool) -> list[DraftStats]:
    """Returns the draft statistics of each request."""
    for key, request in enumerate(requests):
        bench.submit(key, request)
        if not together:
            bench.run()
    bench.run()
    return [stats for key in range(len(requests)) for stats in bench.sequences[key].proposers.draft_stats]


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_slot_has_the_drafts_that_it_has_alone(open_bench: OpenBench, kind: str, unified: bool) -> None:
    requests = requests_of(4, speculation=Speculation(type=("draft-mtp",), n_max=2, order="fixed"))
    together, single, without = (open_bench(kind, unified) for _ in range(3))
    found = run(together, requests, together=True)
    alone = run(single, requests, together=False)
    run(without, requests_of(4, speculation=Speculation()), together=True)
    assert together.outputs == single.outputs == without.outputs
    for one, other in zip(found, alone, strict=True):
        if kind == "cells":
            assert (one.drafted, one.accepted) == (other.drafted, other.accepted)
        assert abs(one.accepted - other.accepted) <= 3, "rollbacks of recurrent states bound the drafts of a step"
    assert all(each.accepted >= 10 for each in found), "about half of the tokens are drafted"
    for bench in (together, single, without):
        bench.backend.close()


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_have_the_cells_of_the_layer(open_bench: OpenBench, kind: str, unified: bool) -> None:
    bench = open_bench(kind, unified)
    first, second = words(1, 70), words(1, 60) + words(2, 10)
    requests = [
        Request(prompt=prompt, max_tokens=12, ignore_eos=True, sampling=GREEDY)
        for prompt in (first, second, first, words(3, 300), words(4, 300), second)
    ]
    for key, request in enumerate(requests):
        bench.submit(key, request)
        bench.run()
        if key == 4:  # all later prefixes come from RAM
            bench.offload_idle()
            bench.core.kv.drop_idle()
    assert bench.outputs[0] == bench.outputs[2]
    assert bench.outputs[1] == bench.outputs[5]
    assert all(bench.ends[key].usage.cached for key in (2, 5)), "prefixes are shared and loaded"  # type: ignore[union-attr]
    assert not bench.speculative_decoding.faults
    bench.backend.close()


@pytest.mark.parametrize(("kind", "unified"), [("cells", False), ("layers", True), ("reader", True)])
def test_sequences_that_are_copied_cut_and_loaded_draft_the_same(
    open_bench: OpenBench, kind: str, unified: bool
) -> None:
    context = open_bench(kind, unified).core.context
    assert isinstance(context, MtpContext)
    tokens = [*words(5, 60)]
    feed(context, 0, 0, tokens[:59])
    last = [(0, tokens[59])]
    expected = context.draft(last).copy()
    again = context.draft([(0, 5)]).copy()
    context.rewind()
    feed(context, 0, 59, [7, 8, 9])
    assert context.cut(0, 59), "the rows of rejected tokens"
    assert np.array_equal(context.draft(last), expected)
    assert np.array_equal(context.draft([(0, 5)]), again)
    context.rewind()
    assert context.copy(0, 1, 59)
    assert np.array_equal(context.draft([(1, tokens[59])]), expected)
    context.rewind()
    snapshot = context.save(0)
    assert snapshot is not None
    parts = [StatePart(state, *span) for span in ((0, 30), (30, 58)) if (state := snapshot.cut(*span)) is not None]
    assert context.load(2, parts)
    feed(context, 2, 58, tokens[58:59])
    assert context.length(2) == 59
    loaded = context.draft([(2, tokens[59])])
    assert np.corrcoef(loaded[0], expected[0])[0, 1] > 0.99, "one hidden state of 59 is not known"
    context.rewind()
    context.close()


@pytest.mark.parametrize(("kind", "unified"), [("layers", False), ("hybrid", True)])
def test_drafts_with_backend_sampling_change_no_token(open_bench: OpenBench, kind: str, unified: bool) -> None:
    top_k = SamplingParams(temperature=0.8, top_k=20, seed=3)
    requests = [*requests_of(2), Request(prompt=words(9, 30), max_tokens=40, ignore_eos=True, sampling=top_k)]
    selecting, plain = open_bench(kind, unified, backend_sampling="on"), open_bench(kind, unified)
    found, expected = (run(bench, requests, together=True) for bench in (selecting, plain))
    chains = selecting.core.context.backend_sampling
    assert chains is not None
    assert chains.current, "tokens were selected"
    assert selecting.outputs == plain.outputs
    assert [each.accepted for each in found] == [each.accepted for each in expected] or kind == "hybrid"
    for bench in (selecting, plain):
        bench.backend.close()


def test_a_fault_of_the_layer_ends_its_drafts_only(open_bench: OpenBench, caplog: pytest.LogCaptureFixture) -> None:
    bench, reference = open_bench("cells", True), open_bench("cells", True)
    context = bench.core.context
    assert isinstance(context, MtpContext)
    assert context._layers is not None

    def fail(*_: object) -> None:
        raise NativeFault("injected")

    context._layers.contexts[0].decode = fail  # type: ignore[method-assign, assignment]
    requests = requests_of(2)
    with caplog.at_level(logging.ERROR, "paceline.speculation"):
        run(bench, requests, together=True)
    run(reference, requests, together=True)
    assert bench.outputs == reference.outputs
    assert "draft no more" in bench.speculative_decoding.faults["draft-mtp"]


async def test_the_engine_drafts_by_default_and_counts_the_memory(paths: dict[str, Path], tmp_path: Path) -> None:
    fields: dict[str, Any] = {"path": paths["cells"], "slots": 2, "context": 1024, "warmup": False}
    fixed = Speculation(type=("auto",), order="fixed")
    request = Request(prompt=words(1, 30), max_tokens=30, ignore_eos=True, sampling=GREEDY, speculation=fixed)
    async with Engine.open(EngineConfig.of(**fields)) as engine:
        assert "draft-mtp" in engine.proposers
        *_, with_mtp = await collect(engine, request)
        used = engine.info.cell_bytes
    assert any(each.type == "draft-mtp" and each.drafted for each in with_mtp.drafts)
    async with Engine.open(EngineConfig.of(**fields, speculation={"types": ("suffix",)})) as engine:
        assert engine.unavailable_proposers["draft-mtp"] == "--spec-type names neither draft-mtp nor auto"
        assert used == engine.info.cell_bytes * (tiny.LAYERS + 1) // tiny.LAYERS
    plain = EngineConfig.of(**fields | {"path": tiny.windowed(tmp_path / "plain.gguf", 0)})
    async with Engine.open(plain) as engine:
        assert engine.unavailable_proposers["draft-mtp"] == "the model has no MTP layer that can be used"


@pytest.mark.parametrize(
    ("kind", "supported", "reason"),
    [
        ("cells", "ARCHITECTURES", "llama.cpp computes no MTP layers of the architecture glm4moe"),
        ("layers", "SEVERAL_LAYERS", "the model has 3 MTP layers, and llama.cpp computes only one of the architecture"),
    ],
)
def test_layers_that_the_library_would_abort_on_are_not_used(
    paths: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    supported: str,
    reason: str,
) -> None:
    monkeypatch.setattr(mtp_layer, supported, ())
    config = EngineConfig.of(path=paths[kind], slots=1, context=256)
    with caplog.at_level(logging.WARNING, "paceline.native"):
        backend = open_gguf(config, lambda share: None, lambda: True)
    assert not isinstance(backend.context, MtpContext)
    assert f"MTP is off: {reason}" in caplog.text
    backend.close()


def test_layers_without_weights_are_not_used(
    paths: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = damaged(paths["layers"], tmp_path / "damaged.gguf", "step35.nextn_predict_layers", (4).to_bytes(4, "little"))
    with caplog.at_level(logging.WARNING, "paceline.native"):
        open_gguf(EngineConfig.of(path=path, slots=1, context=256), lambda share: None, lambda: True).close()
    assert "MTP is off: the file has the weights of 3 MTP layers, and its metadata claim 4" in caplog.text


def test_each_of_several_layers_drafts_one_token(open_bench: OpenBench) -> None:
    context = open_bench("layers", False).core.context
    assert isinstance(context, MtpContext)
    assert context.max_draft == 3
    feed(context, 0, 0, [7, 8, 9])
    first = [context.draft([(0, token)]).copy() for token in (1, 2, 3)]
    context.rewind()
    again = [context.draft([(0, token)]).copy() for token in (1, 2, 4)]
    assert [np.array_equal(*rows) for rows in zip(first, again, strict=True)] == [True, True, False]
    context.rewind()
    with pytest.raises(NativeFault, match="at most 3 tokens"):
        [context.draft([(0, 1)]) for _ in range(4)]
    context.close()


async def test_layers_in_a_file_of_their_own_draft_the_same(paths: dict[str, Path]) -> None:
    fields: dict[str, Any] = {"slots": 2, "context": 1024, "warmup": False, **EXACT}
    requests = requests_of(2, speculation=Speculation(type=("draft-mtp",), n_max=3, order="fixed"))
    found = []
    for path, draft in (("cells", ""), ("trunk", str(paths["head"]))):
        async with Engine.open(EngineConfig.of(path=paths[path], draft={"path": draft}, **fields)) as engine:
            assert "MTP layers" in engine.unavailable_proposers["draft"] or not draft
            found.append([await collect(engine, each) for each in requests])
            size = engine.info.cell_bytes
    counts = [[(ids, end.drafts[0].drafted, end.drafts[0].accepted) for ids, *_, end in each] for each in found]
    assert counts[0] == counts[1]
    assert all(accepted > 10 for *_, accepted in counts[1])
    async with Engine.open(EngineConfig.of(path=paths["trunk"], **fields)) as engine:
        assert [(await collect(engine, each))[0] for each in requests_of(2)] == [ids for ids, *_ in found[1]]
        assert size > engine.info.cell_bytes, "the cells of the layer are counted before they are allocated"


@pytest.mark.parametrize(("model", "draft"), [("cells", ""), ("trunk", "head")])
async def test_drafts_with_several_adapters_change_no_token(
    paths: dict[str, Path], tmp_path: Path, model: str, draft: str
) -> None:
    sizes: dict[str, Any] = {"width": tiny.WIDTH, "kv_width": tiny.HEAD_WIDTH, "architecture": "glm4moe"}
    layers = range(tiny.LAYERS + (not draft))
    files = [str(adapter(tmp_path / f"{seed}.gguf", seed, layers=layers, **sizes)) for seed in (1, 2)]
    fields: dict[str, Any] = {"slots": 3, "context": 1024, "warmup": False, "path": paths[model], **EXACT}
    config = EngineConfig.of(draft={"path": str(paths.get(draft, ""))}, adapters={"lora": files}, **fields)
    texts: list[list[list[int]]] = []
    async with Engine.open(config) as engine:
        for type in ((), ("draft-mtp",)):
            speculation = Speculation(type=type, n_max=3, order="fixed")
            request = Request(prompt=words(1, 30), max_tokens=40, ignore_eos=True, sampling=GREEDY, salt=str(type))
            sets = ((AdapterScale(0, 1.0),), (), (AdapterScale(0, 0.5), AdapterScale(1, 1.0)))
            requests = [structs.replace(request, speculation=speculation, adapters=each) for each in sets]
            ends = await asyncio.gather(*(collect(engine, each) for each in requests))
            texts.append([ids for ids, *_ in ends])
    assert texts[0] == texts[1]
    assert len({tuple(ids) for ids in texts[0]}) == 3, "the adapters change the output"
    assert all(end.usage.accepted for *_, end in ends)


@pytest.mark.parametrize(
    ("model", "draft", "types", "reason"),
    [
        ("cells", "head", ("draft",), "has MTP layers only: use --spec-type draft-mtp or auto"),
        ("trunk", "trunk", ("draft-mtp",), "has no MTP layers: use --spec-type draft or auto"),
        ("cells", "eagle3", ("auto",), "is of the architecture eagle3: its input is that of several layers"),
        ("hybrid", "head", ("auto",), "cannot draft: they are for the architecture glm4moe, the model's is qwen35"),
        ("cells", "reader-head", ("auto",), "they are for the architecture gemma4, the model's is glm4moe"),
    ],
)
def test_files_whose_layers_cannot_draft_are_refused(
    paths: dict[str, Path], model: str, draft: str, types: tuple[str, ...], reason: str
) -> None:
    config = EngineConfig.of(path=paths[model], draft={"path": str(paths[draft])}, speculation={"types": types})
    with pytest.raises(ModelError, match=reason):
        open_gguf(config, lambda share: None, lambda: True)


@pytest.mark.parametrize(("layers", "reason"), [(2**32 - 1, "but the file has 5 layers"), (5, "all layers are MTP")])
def test_more_mtp_layers_than_the_file_has(paths: dict[str, Path], tmp_path: Path, layers: int, reason: str) -> None:
    value = layers.to_bytes(4, "little")
    path = damaged(paths["cells"], tmp_path / "damaged.gguf", "glm4moe.nextn_predict_layers", value)
    with pytest.raises(ModelError, match=reason):
        open_gguf(EngineConfig.of(path=path), lambda share: None, lambda: True)


@pytest.mark.parametrize("kind", ["head", "reader-head"])
def test_a_file_of_mtp_layers_is_no_model(paths: dict[str, Path], kind: str) -> None:
    for config in (
        EngineConfig.of(path=paths[kind]),
        EngineConfig.of(path=paths["trunk"], embedding={"path": str(paths[kind])}),
    ):
        with pytest.raises(ModelError, match="has only the MTP layers of a model"):
            open_gguf(config, lambda share: None, lambda: True)


def test_rows_of_an_image_have_cells_of_the_layer(open_bench: OpenBench) -> None:
    context = open_bench("hybrid", True).core.context
    assert isinstance(context, MtpContext)
    context.decode_embeddings(0, 0, np.ones((100, tiny.WIDTH), np.float32), causal=True)
    feed(context, 0, 100, [7, 8, 9])
    assert len(context.draft([(0, 5)])) == 1
    context.rewind()
    assert context.cut(0, 0)
    feed(context, 0, 0, [7, 8, 9])
    assert len(context.draft([(0, 5)])) == 1
    context.close()
