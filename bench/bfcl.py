"""The Berkeley function calling leaderboard, read from its wheel (`python bench/models.py bfcl`).

Its type names are translated to those of JSON Schema.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from bench.models import SOURCES

# JSON Schema's type by the leaderboard's.
TYPES = {
    **dict.fromkeys(("dict", "HashMap"), "object"),
    **dict.fromkeys(("tuple", "Array", "ArrayList"), "array"),
    **dict.fromkeys(("String", "char"), "string"),
    **dict.fromkeys(("float", "double"), "number"),
    "long": "integer",
    "Boolean": "boolean",
}


class BfclFunction(Struct, frozen=True):
    """A function of the leaderboard; `parameters` is a schema with the leaderboard's type names."""

    name: str
    description: str
    parameters: dict[str, Any]

    @property
    def tool(self) -> dict[str, Any]:
        """The function as a tool of OpenAI's API."""
        parameters = json_schema(self.parameters)
        about = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": about}


class BfclQuestion(Struct, frozen=True):
    """The user's messages by turn, and the functions offered, if the question has any."""

    id: str
    question: list[list[dict[str, str]]]
    function: list[BfclFunction] | None = None


def questions(category: str = "") -> Iterator[BfclQuestion]:
    """Yields the questions of the files whose names end in `category`, in their order; by default all questions.

    Raises FileNotFoundError if the wheel is not downloaded.
    """
    with zipfile.ZipFile(SOURCES["bfcl"].path) as archive:
        for name in archive.namelist():
            if "/data/BFCL_" in name and "format_sensitivity" not in name and Path(name).stem.endswith(category):
                for line in archive.read(name).splitlines():
                    yield msgspec.json.decode(line, type=BfclQuestion)


def schemas() -> Iterator[tuple[str, Any]]:
    """Yields for every function of every question its name `question:function` and its parameters' JSON schema."""
    for question in questions():
        for function in question.function or []:
            yield f"{question.id}:{function.name}", json_schema(function.parameters)


def json_schema(part: Any) -> Any:
    """Returns a schema of the leaderboard as a JSON schema.

    The type `any` is dropped, as is `optional`, which repeats `required`.
    """
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
