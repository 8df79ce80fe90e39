"""Hypothesis settings of this folder."""

from __future__ import annotations

from hypothesis import settings

# Other processes share the cores, so the time of one example is no criterion.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
