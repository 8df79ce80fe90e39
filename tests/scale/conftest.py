"""Public routers and Ray Serve. `make test-scale` installs them into environments of their own and runs the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder without PACELINE_TEST_SCALE."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(600))
            if not os.environ.get("PACELINE_TEST_SCALE"):
                item.add_marker(pytest.mark.skip(reason="routers and Ray are opt-in: make test-scale"))
