"""Servers and installed packages for clients from npm. `make test-clients` installs the packages and runs the tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.models import SOURCES
from tests.api.server import ROOT, Server

INSTALLED = ROOT / "build" / "clients"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder without PACELINE_TEST_CLIENTS, and where their packages are not installed."""
    reason = ""
    if not os.environ.get("PACELINE_TEST_CLIENTS"):
        reason = "clients from npm are opt-in: make test-clients"
    elif not (INSTALLED / "node_modules").is_dir():
        reason = f"{INSTALLED.relative_to(ROOT)} has no packages: make test-clients"
    for item in items:
        if reason and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder with `node_modules`, into which the scripts are copied, because imports look beside a script."""
    for script in Path(__file__).parent.glob("*.mjs"):
        shutil.copy(script, INSTALLED)
    return INSTALLED


@pytest.fixture(scope="module")
def chat_server() -> Iterator[Server]:
    """A server for the clients of one module."""
    yield from _server("-c", "8192", "-np", "2")


@pytest.fixture
def agent_server() -> Iterator[Server]:
    """A server for one coding agent. Without a limit a weak model may repeat its calls to the end of the context."""
    yield from _server("-c", "32768", "-np", "1", "--temp", "0", "-n", "256")


def _server(*flags: str) -> Iterator[Server]:
    source = SOURCES["qwen-target"]
    model = Path(os.environ.get("PACELINE_CLIENT_MODEL") or source.path)
    if not model.is_file():
        pytest.skip(f"{model} is absent: python bench/models.py qwen-target, or set PACELINE_CLIENT_MODEL to a GGUF")
    server = Server("-m", str(model), "--port", "0", "--no-warmup", *flags)
    try:
        server.ready()
        yield server
    finally:
        server.close()
