"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

# With parallel workers each process computes with one thread: threads of two processes would spin for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_THREAD_LIMIT"] = "1"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps calibrations in a folder of this run, apart from those of the user."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the path of SmolLM2 cut to its first layers, a quarter of the computation, for tests that do not check
    the meaning of an output. The file has the name of the whole model."""
    from tests.native.cut import cut  # loads the library, which reads OMP_THREAD_LIMIT only then

    return cut(MODEL, tmp_path_factory.mktemp("short") / MODEL.name, 6)
