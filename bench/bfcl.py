"""Reads the Berkeley function calling leaderboard from its wheel (`python bench/models.py bfcl`).

The leaderboard's type names are translated to those of JSON Schema.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from bench.models import SOURCES

# JSON Schema's type by the leaderboard's type name.
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
    """The user's messages of each turn, and the offered functions; `None` means that no function is offered."""

    id: str
    question: list[list[dict[str, str]]]
    function: list[BfclFunction] | None = None


def questions(category: str = "") -> Iterator[BfclQuestion]:
    """Yields the questions of the files whose names end in `category`, in file order; all questions by default.

    Raises FileNotFoundError if the wheel is not downloaded.
    """
    with zipfile.ZipFile(SOURCES["bfcl"].path) as archive:
        for name in archive.namelist():
            if "/data/BFCL_" in name and "format_sensitivity" not in name and Path(name).stem.endswith(category):
                for line in archive.read(name).splitlines():
                    yield msgspec.json.decode(line, type=BfclQuestion)


def schemas() -> Iterator[tuple[str, Any]]:
    """Yields, for each function of each question, the name `question:function` and the JSON schema of its
    parameters."""
    for question in questions():
        for function in question.function or []:
            yield f"{question.id}:{function.name}", json_schema(function.parameters)


def json_schema(source: Any) -> Any:
    """Returns a schema of the leaderboard as a JSON schema.

    The type `any` is dropped, as is `optional`, which repeats `required`.
    """
    if not isinstance(source, dict):
        return source
    schema = {name: value for name, value in source.items() if name != "optional"}
    kind = schema.pop("type", "any")
    if kind not in ("any", ""):
        schema["type"] = TYPES.get(kind, kind)
    if "properties" in schema:
        schema["properties"] = {name: json_schema(inner) for name, inner in schema["properties"].items()}
    for name in ("items", "additionalProperties"):
        if name in schema:
            schema[name] = json_schema(schema[name])
    return schema
