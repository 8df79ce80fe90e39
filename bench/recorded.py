"""Recorded outputs of models that call tools, from the wheel of canitoolcall, read by the formats of Paceline."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from api.openai.messages import message_of
from api.tools.formats import FORMATS, Calls, Format, Parser, Tool
from bench import models

FIXTURES = "canitoolcall/_data/fixtures/"
FAMILIES = {
    "deepseek": "deepseek",
    "gemma4": "gemma",
    "glm": "glm",
    "gpt-oss": "harmony",
    "kimi": "kimi",
    "llama": "llama",
    "mistral": "mistral",
    "qwen3-hermes": "hermes",
    "qwen3-xml": "qwen-xml",
}
"""The format of each family."""
VARIANTS = {
    "deepseek-v32": "dsml",
    "deepseek-v4": "dsml",
    "deepseek-v41": "dsml",
    "kimi-k3-xtml": "kimi-xtml",
    "llama4-pythonic": "pythonic",
}
"""The formats of members of a family that write otherwise."""


class Read(Struct, frozen=True):
    """What a text was taken for."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    """Names and arguments."""


class Recorded(Struct, frozen=True):
    """One output, and what it should be taken for; None if it was cut off or is malformed, and no call is due."""

    name: str
    format: Format
    calls: Calls
    opened: bool
    text: str
    expected: Read | None
    reason: str

    def read(self, pieces: Sequence[str]) -> Read:
        """What the text is taken for, fed in these pieces."""
        parser = Parser(self.format, self.calls, opened=self.opened)
        deltas = [delta for piece in pieces for delta in parser.feed(piece)]
        message = message_of([*deltas, *parser.finish()])
        calls = tuple((str(call.function.name), call.function.arguments) for call in message.tool_calls or ())
        return Read(message.content or "", message.reasoning_content or "", calls)

    def wrong(self, read: Read) -> str:
        """What is wrong with a reading; empty if nothing is. White space around content and reasoning is not told."""
        if self.expected is None:
            return f"a call was told, but: {self.reason}" if read.calls else ""
        found, due = _comparable(read), _comparable(self.expected)
        return "" if found == due else f"read as {found}, not {due}"

    def cuts(self, count: int) -> Iterator[list[str]]:
        """The text in pieces, in so many random ways: single characters first, then longer and longer ones."""
        chance = random.Random(self.name)
        for longest in range(1, count + 1):
            ends = [0]
            while ends[-1] < len(self.text):
                ends.append(ends[-1] + chance.randint(1, longest))
            yield [self.text[start:end] for start, end in pairwise(ends)]


def recorded(wheel: Path = models.SOURCES["canitoolcall"].path) -> list[Recorded]:
    """All of them. Raises FileNotFoundError if the wheel was not brought."""
    found: list[Recorded] = []
    with zipfile.ZipFile(wheel) as archive:
        for family in FAMILIES:
            about = json.loads(archive.read(f"{FIXTURES}{family}/family.json"))
            references = {each["repo"]: each for each in about["reference_models"]}
            for name in sorted(archive.namelist()):
                if name.startswith(f"{FIXTURES}{family}/") and name.endswith(".jsonl"):
                    lines = archive.read(name).decode().splitlines()
                    found += [_record(json.loads(line), references) for line in lines if line.strip()]
    return found


def _record(row: dict[str, Any], references: dict[str, Any]) -> Recorded:
    reference = references[row["models"][0]]
    name = VARIANTS.get(reference.get("variant", ""), FAMILIES[row["family"]])
    format = next(format for format in FORMATS if format.name == name)
    prompt = row.get("generation_prompt")
    prompt = reference.get("default_generation_prompt") or "" if prompt is None else prompt
    tools = tuple(Tool(tool["function"]["name"], tool["function"].get("parameters") or {}) for tool in row["tools"])
    due = row.get("expected")
    expected = due and Read(
        due["content"] or "",
        due["reasoning_content"] or "",
        tuple((call["name"], json.dumps(call["arguments"])) for call in due["tool_calls"]),
    )
    reason = row.get("expected_error", {}).get("reason", "")
    return Recorded(row["id"], format, Calls(tools), format.opened_by(prompt), row["raw_output"], expected, reason)


def _comparable(read: Read) -> tuple[str, str, list[tuple[str, object]]]:
    return read.content.strip(), read.reasoning.strip(), [(name, _value(text)) for name, text in read.calls]


def _value(arguments: str) -> object:
    try:
        return json.dumps(msgspec.json.decode(arguments), sort_keys=True)
    except msgspec.DecodeError:
        return f"not JSON: {arguments}"
