"""Fixtures with the real model. The tests fail without its file, which `make test` downloads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.config import EngineConfig
from engine.llama import open_gguf
from engine.llama.model import LlamaBackend
from engine.pace import calibration
from tests.conftest import MODEL


@pytest.fixture(scope="package", autouse=True)
def _short_calibrations() -> Iterator[None]:
    """Ends calibrations early: nearly every configuration is new, and would be measured for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_MIN_SECONDS", 0.2)
        patch.setattr(calibration, "_MIN_STEPS", 4)
        yield


@pytest.fixture(scope="session")
def shared_backend() -> Iterator[LlamaBackend]:
    """Yields one opened model for all native tests, with unified KV and few cells, which tests fill quickly."""
    backend = open_gguf(EngineConfig.of(path=MODEL, slots=4, context=1024, rows=256), lambda share: None, lambda: True)
    yield backend
    backend.close()


@pytest.fixture
def backend(shared_backend: LlamaBackend) -> LlamaBackend:
    """Returns the opened model with empty cells and an empty batch."""
    context = shared_backend.context
    context.batch.clear()
    for seq in range(context.sequences):
        context.cut(seq, 0)
    return shared_backend
