"""In the deterministic profile a row's logits are equal to the bit however its context was computed or loaded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from engine.backend import Context, Logits, StatePart
from engine.config import EngineConfig
from engine.llama import open_gguf
from tests.conftest import MODEL
from tests.native.test_llama import feed

TOKENS = [int(token) for token in np.random.default_rng(7).integers(100, 4000, 200)]
LENGTH = 90


@pytest.fixture(scope="module")
def opened() -> Iterator[Context]:
    config = EngineConfig.of(path=MODEL, slots=4, context=1024, rows=128, deterministic=True)
    backend = open_gguf(config, lambda share: None, lambda: True)
    assert (backend.info.exact, backend.info.kv_unified, "deterministic" in backend.info.kv_reason) == (
        True,
        False,
        True,
    )
    yield backend.context
    backend.close()


@pytest.fixture
def context(opened: Context) -> Context:
    opened.clear()
    return opened


@pytest.fixture(scope="module")
def expected(opened: Context) -> Logits:
    """Returns the logits of the last four rows, each computed alone after one prefill."""
    opened.clear()
    feed(opened, 0, 0, TOKENS[: LENGTH - 4], 0)
    return np.concatenate([feed(opened, 0, at, TOKENS[at : at + 1]) for at in range(LENGTH - 4, LENGTH)])


def test_in_any_chunks_and_with_several_rows_at_once(context: Context, expected: Logits) -> None:
    for at, count in ((0, 7), (7, 1), (8, 70), (78, 8)):
        feed(context, 1, at, TOKENS[at : at + count], 0)
    assert np.array_equal(feed(context, 1, LENGTH - 4, TOKENS[LENGTH - 4 : LENGTH], 4), expected)


def test_with_ragged_sequences(context: Context, expected: Logits) -> None:
    context.batch.clear()
    for seq, count in ((0, 30), (1, 3), (2, LENGTH - 4), (3, 1)):
        context.batch.add(seq, 0, TOKENS[:count] if seq == 2 else TOKENS[100 : 100 + count], 0)
    context.decode()
    for at in range(LENGTH - 4, LENGTH, 2):
        context.batch.clear()
        context.batch.add(0, context.length(0), [5], 1)
        context.batch.add(1, context.length(1), [6], 0)
        row = context.batch.add(2, at, TOKENS[at : at + 2], 2)
        rows = context.decode()[row : row + 2]
        assert np.array_equal(rows, expected[at - LENGTH + 4 : at - LENGTH + 6])


def test_after_a_copy_a_rollback_and_a_load(context: Context, expected: Logits) -> None:
    feed(context, 0, 0, [*TOKENS[:40], 5, 6, 7], 0)
    assert context.cut(0, 40)
    feed(context, 0, 40, TOKENS[40:80], 0)
    assert context.copy(0, 3, 60)
    snapshot = context.save(0)
    assert snapshot is not None
    state = snapshot.cut(32, 80)
    assert state is not None
    assert context.load(3, [StatePart(state, 60, 80)])
    feed(context, 3, 80, TOKENS[80 : LENGTH - 4], 0)
    assert np.array_equal(feed(context, 3, LENGTH - 4, TOKENS[LENGTH - 4 : LENGTH], 4), expected)
