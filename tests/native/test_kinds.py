"""Saved KV of sliding-window, recurrent and hybrid models, and of tiny plain ones, in both layouts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import Logits, StatePart
from engine.config import EngineConfig
from engine.contract import ModelError
from engine.llama import open_gguf
from engine.llama.context import LlamaContext
from engine.llama.model import LlamaBackend
from engine.llama.state import StateFormat, UnknownStateFormat
from tests.native import tiny
from tests.native.test_llama import close, feed

WINDOW = 32
TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 490, 400)]
KINDS: dict[str, Callable[[Path], Path]] = {
    "plain": lambda path: tiny.windowed(path, 0),
    "sliding-window": lambda path: tiny.windowed(path, WINDOW),
    "recurrent": tiny.recurrent,
    "hybrid": tiny.hybrid,
}
OpenModel = Callable[..., LlamaBackend]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make(folder / f"{kind}.gguf") for kind, make in KINDS.items()}


@pytest.fixture
def opened(models: dict[str, Path]) -> Iterator[OpenModel]:
    """Yields a function that opens a tiny model by its kind."""
    backends: list[LlamaBackend] = []

    def open_kind(kind: str, **fields: Any) -> LlamaBackend:
        settings = {"slots": 3, "context": 1536, "rows": 256, "threads": 1} | fields
        config = EngineConfig.of(path=models[kind], **settings)
        backends.append(open_gguf(config, lambda share: None, lambda: True))
        return backends[-1]

    yield open_kind
    for backend in backends:
        backend.close()


def context_of(backend: LlamaBackend) -> LlamaContext:
    assert isinstance(backend.context, LlamaContext)
    return backend.context


def next_four_logits(context: LlamaContext, seq: int) -> Logits:
    """Returns the logits of the next four rows, each in a separate decode."""
    start = context.length(seq)
    return np.stack([feed(context, seq, at, TOKENS[at : at + 1])[0] for at in range(start, start + 4)])


@pytest.mark.parametrize(
    ("kind", "unified"),
    [("recurrent", True), ("recurrent", False), ("hybrid", True), ("hybrid", False), ("sliding-window", False)],
)
def test_whole_states_and_copies_of_a_model_whose_states_are_not_cut(
    opened: OpenModel, kind: str, unified: bool
) -> None:
    context = context_of(opened(kind, kv_unified=unified, flash_attention="off", memory={"reuse": 16}))
    assert (context.unified, context.divisible, context.shifts) == (unified, False, False)
    feed(context, 0, 0, TOKENS[:100])
    snapshot = context.save(0)
    assert snapshot is not None
    assert snapshot.cut(0, 64) is None
    state = snapshot.cut(0, 100)
    assert state is not None
    assert context.copy(0, 1, 50), "all positions are copied"
    assert context.length(1) == 100
    expected = next_four_logits(context, 0)
    assert np.array_equal(next_four_logits(context, 1), expected)
    assert context.cut(0, 0)
    assert not context.load(0, [StatePart(state[:-1], 0, 100)])
    assert not context.load(0, [StatePart(state, 0, 99)])
    assert context.length(0) == 0
    assert context.load(2, [StatePart(state, 0, 100)])
    assert np.array_equal(next_four_logits(context, 2), expected)


@pytest.mark.parametrize("flash", ["off", "on"])
def test_the_library_cuts_states_of_a_sliding_window(opened: OpenModel, flash: str) -> None:
    backend = opened("sliding-window", flash_attention=flash)
    context = context_of(backend)
    assert (context.unified, context.divisible, context.window) == (True, True, WINDOW)
    assert "sliding-window" in backend.info.kv_reason
    feed(context, 0, 0, TOKENS[:200])
    snapshot = context.save(0)
    assert snapshot is not None
    assert snapshot.cut(0, WINDOW + 1) is None, "more than the window"
    spans = [(start, min(200, start + WINDOW)) for start in range(0, 200, WINDOW)]
    states = [snapshot.cut(*span) for span in spans]
    expected = next_four_logits(context, 0)
    parts = [StatePart(state, *span) for span, state in zip(spans, states, strict=True) if state is not None]
    context.clear()
    assert not context.load(1, [*parts[:2], StatePart(parts[3].state, 64, 96)]), "the last state has other positions"
    assert context.length(1) == 0
    assert context.load(1, parts)
    assert np.array_equal(next_four_logits(context, 1), expected)
    assert context.cut(1, 150)
    assert context.intact(1, 150)
    assert context.copy(1, 2, 150)
    assert np.array_equal(next_four_logits(context, 2), next_four_logits(context, 1))


def test_an_unknown_state_format_is_not_used(
    opened: OpenModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(state: object) -> StateFormat:
        raise UnknownStateFormat("another version")

    monkeypatch.setattr(StateFormat, "of", unknown)
    with caplog.at_level(logging.WARNING, "paceline.native"):
        contexts = [context_of(opened("plain", kv_unified=unified)) for unified in (True, False)]
    assert [context.divisible for context in contexts] == [True, False]
    assert "another version" in caplog.text
    for context in contexts:
        feed(context, 0, 0, TOKENS[:60])
        snapshot = context.save(0)
        assert snapshot is not None
        spans = [(0, 25), (25, 60)] if context.unified else [(0, 60)]
        saved = [(snapshot.cut(*span), *span) for span in spans]
        expected = next_four_logits(context, 0)
        context.clear()
        assert context.load(1, [StatePart(state, *span) for state, *span in saved if state is not None])
        assert np.array_equal(next_four_logits(context, 1), expected)


def test_cells_out_of_order_are_saved_in_order(opened: OpenModel) -> None:
    context = context_of(opened("plain", kv_unified=True, flash_attention="off"))
    feed(context, 0, 0, TOKENS[:20])
    feed(context, 1, 0, TOKENS[:40])
    context.cut(0, 5)
    feed(context, 1, 40, TOKENS[40:60])  # the first of these rows take the cells that became free
    snapshot = context.save(1)
    assert snapshot is not None
    native = context.get_state(1)
    assert native is not None
    assert context._format is not None
    assert context._format.cells(native).view.cells["pos"].tolist() != list(range(60))
    halves = [(snapshot.cut(0, 30), 0, 30), (snapshot.cut(30, 60), 30, 60)]
    expected = next_four_logits(context, 1)
    context.clear()
    assert context.load(2, [StatePart(state, start, end) for state, start, end in halves if state is not None])
    again = context.get_state(2)
    assert again is not None
    assert context._format.cells(again).view.cells["pos"].tolist() == list(range(60))
    assert close(next_four_logits(context, 2).ravel(), expected.ravel())


def test_each_kind_has_its_layout_and_its_reason(opened: OpenModel) -> None:
    for kind, unified, reason in (
        ("plain", True, "-c 1536 leaves 512 tokens for each of 3 slots, less than 1024"),
        ("recurrent", True, "recurrent models have unified KV; --no-kv-unified gives"),
        ("hybrid", True, "hybrid models have unified KV; --no-kv-unified gives"),
    ):
        info = opened(kind).info
        assert (info.kv_unified, info.context) == (unified, 1536)
        assert reason in info.kv_reason
    info = opened("plain", context=3072).info
    assert (info.kv_unified, info.context) == (False, 3072)
    assert "-c 3072 gives each of 3 slots 1024 tokens; --kv-unified" in info.kv_reason


def test_states_of_a_whole_sequence_are_distinguished_by_layout(opened: OpenModel) -> None:
    layouts = {opened("hybrid", kv_unified=unified).info.layout for unified in (True, False)}
    assert len(layouts) == 2
    with pytest.raises(ModelError, match="at most 254 requests"):
        opened("plain", slots=255, kv_unified=True)
