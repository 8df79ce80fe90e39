"""Configuration: ranges are checked, and errors name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import BatchConfig, EngineConfig, ModelConfig, physical_cores


def test_fields_go_to_their_struct() -> None:
    config = EngineConfig.of(path=Path("a.gguf"), slots=4, threads=2)
    assert config == EngineConfig(model=ModelConfig(path="a.gguf", threads=2), batch=BatchConfig(slots=4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": -1}, r"`int` >= 0 - at `\$.batch.slots`"),
        ({"slots": 257}, r"`int` <= 256 - at `\$.batch.slots`"),
        ({"rows": "many"}, r"Expected `int`, got `str` - at `\$.batch.rows`"),
        ({"cache_type_k": "f8"}, r"Invalid enum value 'f8' - at `\$.model.cache_type_k`"),
        ({"slot": 4}, "unknown field `slot`"),
        ({"path": ""}, r"length >= 1 - at `\$.model.path`"),
    ],
)
def test_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        EngineConfig.of(**{"path": "a.gguf", **fields})


def test_physical_cores_is_at_least_one() -> None:
    assert physical_cores() >= 1
