"""The choice between per-slot and unified KV: the cells of each slot, and the logged reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.contract import ModelError
from engine.llama import layout, open_gguf
from engine.llama.exact import NotExact, exact_config
from engine.llama.layout import LayoutInputs, choose_layout
from engine.llama.params import alternatives_for, context_params, sequences_for
from tests.conftest import MODEL


def inputs(
    unified: bool | None = None, slots: int = 4, cells: int = 0, trained: int = 8192, **rest: Any
) -> LayoutInputs:
    return LayoutInputs(unified, slots, cells, trained, **({"memory_cells": 10**6} | rest))


@pytest.mark.parametrize(
    ("given", "unified", "cells", "reason"),
    [
        # -c is given.
        (inputs(cells=4096), False, 4096, "-c 4096 gives each of 4 slots 1024 tokens"),
        (inputs(cells=4095), True, 4095, "-c 4095 leaves 1023 tokens for each of 4 slots, less than 1024"),
        (inputs(cells=4100), False, 5120, "-c 4100 gives each of 4 slots 1025 tokens"),
        (inputs(cells=2048, trained=512), False, 2048, "-c 2048 gives each of 4 slots 512 tokens"),
        (inputs(cells=2040, trained=512), True, 2040, "leaves 510 tokens for each of 4 slots, less than 512"),
        # Without -c: the training context, at most 8,192 and a quarter of the free memory.
        (inputs(), False, 4 * 8192, "the training context gives each of 4 slots 8192 tokens"),
        (inputs(trained=131072), False, 4 * 8192, "the default of 8192 gives each of 4 slots 8192 tokens"),
        (
            inputs(memory_cells=4 * 3000),
            False,
            4 * 2816,
            "a quarter of the free memory gives each of 4 slots 2816 tokens",
        ),
        (
            inputs(memory_cells=4 * 1000),
            True,
            3840,
            "a quarter of the free memory leaves 768 tokens for each of 4 slots",
        ),
        (inputs(trained=600), False, 4 * 768, "the training context gives each of 4 slots 600 tokens"),
        # --fit found the cells, which must not be exceeded.
        (inputs(cells=9999, fitted=True), False, 4 * 2304, "--fit with 9999 cells gives each of 4 slots 2304 tokens"),
        (inputs(cells=4000, fitted=True), True, 4000, "--fit with 4000 cells leaves 768 tokens"),
        # A flag is given.
        (inputs(True, cells=65536), True, 65536, "--kv-unified"),
        (inputs(True), True, 8192, "--kv-unified"),
        (inputs(False, cells=1000), False, 4 * 256, "--no-kv-unified"),
        (inputs(False, memory_cells=0), False, 4 * 256, "--no-kv-unified"),
        # Models whose states cannot be cut with per-slot KV.
        (
            inputs(cells=65536, kind="sliding-window"),
            True,
            65536,
            "sliding-window models have unified KV; --no-kv-unified",
        ),
        (inputs(False, cells=65536, kind="hybrid"), False, 65536, "--no-kv-unified"),
        # -c without -np: one request can use all of it.
        (inputs(slots=16, cells=16384, slots_given=False), True, 16384, "-c 16384 without -np is shared by 16 slots"),
        (inputs(slots=16, cells=16 * 8192, slots_given=False), False, 16 * 8192, "gives each of 16 slots 8192 tokens"),
    ],
)
def test_per_slot_kv_where_each_slot_gets_enough(given: LayoutInputs, unified: bool, cells: int, reason: str) -> None:
    found = choose_layout(given)
    assert (found.unified, found.cells) == (unified, cells)
    assert reason in found.reason
    assert "kv-unified" in found.reason, "the flag that changes it is named"


def test_parameters_follow_the_layout() -> None:
    config = EngineConfig.of(path="m.gguf", slots=5, rows=64)
    for given, cells, sequences in ((inputs(True, cells=1000), 1024, 35), (inputs(False, 5, 1000), 1280, 5)):
        params = context_params(config.model, config.batch, choose_layout(given), 1, 8, False)
        assert (params.kv_unified, params.n_ctx, params.n_seq_max) == (given.unified, cells, sequences)
        assert params.n_outputs_max <= params.n_batch == 64
        assert alternatives_for(5, params, partial=True, window=0) == (8 if given.unified else 0)
        assert alternatives_for(5, params, partial=False, window=0) == 0
        assert alternatives_for(16, params, partial=True, window=0) == (1 if given.unified else 0), "an id for each"
    assert sequences_for(200, True) == 256
    assert sequences_for(256, False) == 256


def test_a_draft_model_gets_as_many_tokens_per_slot_as_the_target() -> None:
    for unified, expected in ((None, None), (True, None), (False, False)):
        config = EngineConfig.of(path="m.gguf", slots=4, kv_unified=unified, draft={"path": "d.gguf"})
        draft = config.for_draft_model(4 * 2048)
        assert draft.model.kv_unified is expected
        given = LayoutInputs(draft.model.kv_unified, draft.batch.slots, draft.batch.context, 32768)
        assert choose_layout(given)[:2] == (False, 4 * 2048)


def test_little_free_memory_makes_fewer_cells(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cell = 23040  # 30 layers, 3 heads of 64 F16 keys and values
    monkeypatch.setattr(layout, "free_memory", lambda: 4 * cell * 2 * 1300)
    with caplog.at_level(logging.INFO, "paceline.native"):
        backend = open_gguf(EngineConfig.of(path=MODEL, slots=2), lambda share: None, lambda: True)
    backend.close()
    assert (backend.info.kv_unified, backend.info.context) == (False, 2560)
    assert backend.info.kv_reason.startswith("a quarter of the free memory gives each of 2 slots 1280 tokens")
    assert backend.info.kv_reason not in caplog.text, "the start message of the server has it"


def test_free_memory_is_known() -> None:
    assert 2**20 < layout.free_memory() < 2**50


def test_the_deterministic_profile_has_per_slot_kv() -> None:
    for unified in (None, False):
        config = EngineConfig.of(path=MODEL, deterministic=True, kv_unified=unified).model
        assert exact_config(config, "").kv_unified is False
    refused = EngineConfig.of(path=MODEL, deterministic=True, kv_unified=True)
    with pytest.raises(NotExact, match="--kv-unified"):
        exact_config(refused.model, "")
    with pytest.raises(ModelError, match="cannot be served with --deterministic: with --kv-unified the order"):
        open_gguf(refused, lambda share: None, lambda: True)
