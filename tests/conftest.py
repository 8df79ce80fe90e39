"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

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
