"""How a setting says which flags and which environment variable set it."""

from __future__ import annotations

from typing import Any


def flags(*names: str, env: str = "") -> dict[str, Any]:
    """The command-line spellings of a field and the environment variable that sets it, as `Meta(extra=...)`."""
    return {"flags": names, "env": env}
