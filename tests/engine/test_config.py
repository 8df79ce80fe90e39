"""Settings: ranges are checked, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import BatchConfig, EngineConfig, ModelConfig, physical_cores


def test_fields_find_their_concern() -> None:
    config = EngineConfig.of(path=Path("a.gguf"), slots=4, threads=2)
    assert config == EngineConfig(model=ModelConfig(path="a.gguf", threads=2), batch=BatchConfig(slots=4))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slots": 0}, r"`int` >= 1 - at `\$.batch.slots`"),
        ({"slots": 255}, r"`int` <= 254 - at `\$.batch.slots`"),
        ({"rows": "many"}, r"Expected `int`, got `str` - at `\$.batch.rows`"),
        ({"cache_type_k": "f8"}, r"Invalid enum value 'f8' - at `\$.model.cache_type_k`"),
        ({"slot": 4}, "unknown field `slot`"),
        ({"path": ""}, r"length >= 1 - at `\$.model.path`"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        EngineConfig.of(**{"path": "a.gguf", **fields})


def test_there_is_a_core() -> None:
    assert physical_cores() >= 1
