"""The `samplers` field of a request: llama-server's names and letters of the sampling stages."""

from __future__ import annotations

from collections.abc import Sequence

from api.http.decode_errors import choices_hint
from api.schema.generation_settings import SAMPLERS
from engine import RequestRefused

# For each stage, the parameters with which it has no effect.
_NEUTRAL_VALUES: dict[str, dict[str, float | int]] = {
    "penalties": {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "dry": {"dry_multiplier": 0.0},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0},
}

_SAMPLER_LETTERS = dict(zip("edskypmxt", SAMPLERS, strict=True))
_SAMPLER_ALIASES = {"typical_p": "typ_p", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p", "temp": "temperature"}


def parse_samplers(samplers: str | list[str] | None) -> Sequence[str]:
    """Returns the stages of `samplers`, names or letters in one string. None means all stages.

    Raises RequestRefused for an unknown stage and for another order than that of `SAMPLERS`.
    """
    if samplers is None:
        return SAMPLERS
    known = _SAMPLER_LETTERS if isinstance(samplers, str) else dict.fromkeys(SAMPLERS)
    for name in samplers:
        if name not in known and name not in _SAMPLER_ALIASES:
            raise RequestRefused(
                f"samplers contains an unknown stage {name[:32]!r}{choices_hint(name, known)}", field="samplers"
            )
    names = _SAMPLER_LETTERS if isinstance(samplers, str) else _SAMPLER_ALIASES
    stages = [names.get(name, name) for name in samplers]
    positions = [SAMPLERS.index(stage) for stage in stages]
    if positions != sorted(set(positions)):
        raise RequestRefused(
            f"samplers may omit stages but must keep this order: {', '.join(SAMPLERS)}.", field="samplers"
        )
    return stages


def neutral_values(stages: Sequence[str]) -> dict[str, float | int]:
    """Returns the sampling parameters that turn off every stage outside of `stages`."""
    omitted = [values for stage, values in _NEUTRAL_VALUES.items() if stage not in stages]
    return {name: value for values in omitted for name, value in values.items()}
