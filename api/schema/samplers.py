"""The `samplers` field of a request."""

from __future__ import annotations

from api.config.samplers import stages_of_letters, stages_of_names
from engine import RequestRefused, SamplerStage


def parse_samplers(samplers: str | list[str]) -> tuple[SamplerStage, ...]:
    """Returns the stages of a list of names, of names separated by semicolons, or of letters. Raises RequestRefused."""
    try:
        if isinstance(samplers, str) and ";" not in samplers:
            return stages_of_letters(samplers)
        return stages_of_names(filter(None, samplers.split(";")) if isinstance(samplers, str) else samplers)
    except ValueError as error:
        raise RequestRefused(f"samplers: {error}", field="samplers") from None
