"""A pytest plugin for llama-server's test suite: does not start every preset once to download its model.

The suite runs in an environment of its own, so this module imports nothing of the project.
"""

from __future__ import annotations

import importlib


def pytest_sessionstart() -> None:
    """Replaces the suite's download of all models."""
    importlib.import_module("utils").ServerPreset.load_all = staticmethod(lambda: None)
