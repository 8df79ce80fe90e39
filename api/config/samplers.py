"""llama-server's names and letters of the sampling stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from api.http.decode_errors import choices_hint
from engine import SamplerStage

# Maximum stages of one request.
MAX_SAMPLERS = 64

_STAGES: tuple[SamplerStage, ...] = get_args(SamplerStage)
_LETTERS = dict(zip("edskypmxtia", _STAGES, strict=True))
# Names are compared without case, underscores and dashes.
_ALIASES: dict[str, SamplerStage] = {
    **{stage.replace("_", ""): stage for stage in _STAGES},
    "typical": "typ_p",
    "typicalp": "typ_p",
    "typ": "typ_p",
    "nucleus": "top_p",
    "temp": "temperature",
}


def stages_of_names(names: Iterable[str]) -> tuple[SamplerStage, ...]:
    """Returns the stages of llama-server's names. Raises ValueError for an unknown name."""
    stages = []
    for name in names:
        stage = _ALIASES.get(name.strip().lower().replace("_", "").replace("-", ""))
        if stage is None:
            raise ValueError(f"unknown stage {name[:32]!r}{choices_hint(name, _STAGES)}")
        stages.append(stage)
    return tuple(stages)


def stages_of_letters(letters: str) -> tuple[SamplerStage, ...]:
    """Returns the stages of llama-server's letters. Raises ValueError for an unknown letter."""
    for letter in letters:
        if letter not in _LETTERS:
            raise ValueError(f"unknown stage {letter!r}{choices_hint(letter, _LETTERS)}")
    return tuple(_LETTERS[letter] for letter in letters)
