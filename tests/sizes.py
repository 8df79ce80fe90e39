"""Sizes of random tests: small for `make test`, large for `make test-long`."""

from __future__ import annotations

import os

_LONG = os.environ.get("PACELINE_TEST_LONG") == "1"


def sized(short: int, long: int) -> int:
    """Returns `long` if the environment variable PACELINE_TEST_LONG is 1, else `short`."""
    return long if _LONG else short
