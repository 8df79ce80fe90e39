"""The Berkeley function calling leaderboard, read from the wheel that `python bench/models.py bfcl` brings.

Its names of types become JSON Schema's.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from bench.models import SOURCES

TYPES = {
    **dict.fromkeys(("dict", "HashMap"), "object"),
    **dict.fromkeys(("tuple", "Array", "ArrayList"), "array"),
    **dict.fromkeys(("String", "char"), "string"),
    **dict.fromkeys(("float", "double"), "number"),
    "long": "integer",
    "Boolean": "boolean",
}


class Function(Struct, frozen=True):
    """A function that may be called."""

    name: str
    description: str
    parameters: dict[str, Any]

    @property
    def tool(self) -> dict[str, Any]:
        """It as OpenAI's API describes it."""
        parameters = json_schema(self.parameters)
        about = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": about}


class Question(Struct, frozen=True):
    """What is asked, turn by turn, and what may be called for it."""

    id: str
    question: list[list[dict[str, str]]]
    function: list[Function] | None = None


def questions(category: str = "") -> Iterator[Question]:
    """The questions of the files whose names end so, in their order; all without. Raises FileNotFoundError if the wheel
    was not brought."""
    with zipfile.ZipFile(SOURCES["bfcl"].path) as archive:
        for name in archive.namelist():
            if "/data/BFCL_" in name and "format_sensitivity" not in name and Path(name).stem.endswith(category):
                for line in archive.read(name).splitlines():
                    yield msgspec.json.decode(line, type=Question)


def schemas() -> Iterator[tuple[str, Any]]:
    """The parameters of every function of every question, and where they stand."""
    for question in questions():
        for function in question.function or []:
            yield f"{question.id}:{function.name}", json_schema(function.parameters)


def json_schema(part: Any) -> Any:
    """The leaderboard's schemas in JSON Schema's words; `any` is no type, and `optional` says what `required` does."""
    if not isinstance(part, dict):
        return part
    made = {name: value for name, value in part.items() if name != "optional"}
    kind = made.pop("type", "any")
    if kind not in ("any", ""):
        made["type"] = TYPES.get(kind, kind)
    if "properties" in made:
        made["properties"] = {name: json_schema(inner) for name, inner in made["properties"].items()}
    for name in ("items", "additionalProperties"):
        if name in made:
            made[name] = json_schema(made[name])
    return made
