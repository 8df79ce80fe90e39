"""llama.cpp's top-k on the backend: the selected tokens and logits are those of all logits, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp as native

from engine.backend import NativeFault
from engine.config import EngineConfig, ModelConfig
from engine.contract import ModelError, Request, SamplingParams
from engine.llama import open_gguf, top_k_chains
from engine.llama.model import LlamaBackend
from tests.engine.test_same_as_alone import CoreBench


def opened(model: Path, unified: bool) -> LlamaBackend:
    config = EngineConfig.of(path=model, slots=4, context=2048, rows=256, kv_unified=unified, backend_sampling="on")
    return open_gguf(config, lambda share: None, lambda: True)


@pytest.fixture(scope="module", params=[True, False], ids=["unified", "per-slot"])
def selecting(request: pytest.FixtureRequest, short_model: Path) -> Iterator[LlamaBackend]:
    backend = opened(short_model, request.param)
    yield backend
    backend.close()


# Rows and rows of logits of each sequence, step by step: prompts, drafts, single rows, and ids out of order.
STEPS = (
    ((0, 9, 1), (1, 7, 1), (2, 9, 0), (3, 8, 1)),
    ((0, 1, 1), (1, 4, 4), (2, 3, 1), (3, 2, 2)),
    ((2, 2, 2), (0, 5, 5), (3, 1, 1)),
    ((3, 1, 1),),
    ((1, 1, 1), (2, 1, 1)),
    ((0, 1, 1), (1, 1, 1)),  # as large as the graph before, in which the tokens of sequence 0 were no output
)


def rows_of(context: Any, step: tuple[tuple[int, int, int], ...]) -> tuple[Any, list[int]]:
    """Decodes a step. Returns the rows of logits, and the sequence of each."""
    context.batch.clear()
    for seq, count, outputs in step:
        start = context.length(seq)
        context.batch.add(
            seq, start, [1000 + (seq * 71 + at * 13) % 900 for at in range(start, start + count)], outputs
        )
    return context.decode(), [seq for seq, _, outputs in step for _ in range(outputs)]


def test_selected_tokens_are_the_most_likely_ones_beside_rows_with_all_logits(selecting: LlamaBackend) -> None:
    context: Any = selecting.context
    sampling = context.backend_sampling
    assert sampling is not None
    context.clear()
    expected = [rows_of(context, step)[0].copy() for step in STEPS]
    context.clear()
    changes: list[dict[int, int]] = [
        {0: 64, 1: 64, 3: 320},
        {},
        {1: 0, 2: 64},
        {0: 0, 2: 0, 3: 64},
        {0: 64, 1: 64, 2: 64},
        {},
    ]
    for change, step, wanted in zip(changes, STEPS, expected, strict=True):
        sampling.change(change)
        logits, sequences = rows_of(context, step)
        selected = sampling.selected(len(sequences))
        for row, seq in enumerate(sequences):
            count = sampling.current.get(seq, 0)
            if not count:
                assert np.array_equal(logits[row], wanted[row])
                continue
            ids, values = selected.ids[row, :count], selected.logits[row, :count]
            assert np.array_equal(wanted[row][ids], values)
            assert np.array_equal(np.sort(values), np.sort(wanted[row])[-count:])
            assert len({*ids.tolist()}) == count
    sampling.change(dict.fromkeys(range(4), 0))
    context.clear()


PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 200},
    {"repeat_penalty": 1.2},
    {"top_k": 0},
    {"min_p": 0.3, "top_p": 0.7},
]
REQUESTS = [
    Request(prompt=tuple(range(500 + 9 * i, 512 + 9 * i)), max_tokens=6, sampling=SamplingParams(seed=i, **params))
    for i, params in enumerate(PARAMS)
]


def outputs(backend: Any) -> dict[int, list[int]]:
    """Returns the tokens of all requests."""
    backend.context.clear()
    bench = CoreBench(backend.context, slots=4, backend=backend)
    for key, request in enumerate(REQUESTS):
        bench.submit(key, request)
        bench.core.step()
    bench.run()
    bench.core.kv.drop_idle()
    return bench.outputs


def test_the_tokens_are_those_without_backend_sampling(
    selecting: LlamaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    context: Any = selecting.context
    with_selection = outputs(selecting)
    assert context.backend_sampling.current, "tokens were selected"
    context.backend_sampling.change(dict.fromkeys(range(context.sequences), 0))
    monkeypatch.setattr(context, "backend_sampling", None)
    assert outputs(selecting) == with_selection


def test_a_small_vocabulary_and_a_wrong_selection_are_refused(
    short_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_k_chains, "SELECTED_COUNTS", (10**6,))
    with pytest.raises(ModelError, match="--backend-sampling on is not possible: the vocabulary is too small; use off"):
        opened(short_model, False)
    monkeypatch.setattr(top_k_chains, "SELECTED_COUNTS", (64,))
    add, first = native.llama_sampler_chain_add, native.llama_sampler_init_top_k
    monkeypatch.setattr(native, "llama_sampler_chain_add", lambda chain, sampler: add(chain, first(60)))
    with pytest.raises(ModelError, match="is not possible"):
        opened(short_model, False)


def test_on_a_cpu_it_is_off_by_default(backend: LlamaBackend) -> None:
    assert backend.context.backend_sampling is None


def test_auto_does_without_a_selection_that_fails(backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_k_chains, "serving_gpu", lambda config: "GPU")

    def refuse(*arguments: object) -> None:
        raise NativeFault("no memory")

    monkeypatch.setattr(top_k_chains, "TopKChains", refuse)
    for mode, layers in (("auto", -1), ("auto", 3), ("off", -1)):
        config = ModelConfig(path="x", gpu_layers=layers, backend_sampling=mode)  # type: ignore[arg-type]
        assert top_k_chains.open_chains(config, backend.model, None, 4) is None
    on = ModelConfig(path="x", backend_sampling="on")
    with pytest.raises(NativeFault, match="no memory"):
        top_k_chains.open_chains(on, backend.model, None, 4)
