"""Recorded outputs of models that call tools, from the wheel of canitoolcall, parsed by the formats of Paceline."""

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

from api.openai.messages import message_from_deltas
from api.tools.formats import CHAT_FORMATS, AllowedCalls, ChatFormat, MessageParser, Tool
from bench import models

FIXTURES = "canitoolcall/_data/fixtures/"
# The name of the format by model family.
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
# The name of the format by variant, for members of a family with another format.
VARIANTS = {
    "deepseek-v32": "dsml",
    "deepseek-v4": "dsml",
    "deepseek-v41": "dsml",
    "kimi-k3-xtml": "kimi-xtml",
    "llama4-pythonic": "pythonic",
}


class ParsedOutput(Struct, frozen=True):
    """Content, reasoning, and the name and the JSON arguments of each tool call."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]


class RecordedOutput(Struct, frozen=True):
    """One output and its expected parse.

    `expected` is `None` for a truncated or malformed output, which must give no tool call; `reason` is the cause.
    `opened` is true if the prompt ends inside the reasoning.
    """

    name: str
    format: ChatFormat
    calls: AllowedCalls
    opened: bool
    text: str
    expected: ParsedOutput | None
    reason: str

    def parse(self, chunks: Sequence[str]) -> ParsedOutput:
        """Returns the parse of the text when the parser is fed `chunks`."""
        parser = MessageParser(self.format, self.calls, in_reasoning=self.opened)
        deltas = [delta for chunk in chunks for delta in parser.feed(chunk)]
        message = message_from_deltas([*deltas, *parser.finish()])
        calls = tuple((str(call.function.name), call.function.arguments) for call in message.tool_calls or ())
        return ParsedOutput(message.content or "", message.reasoning_content or "", calls)

    def mismatch(self, parsed: ParsedOutput) -> str:
        """Returns the difference to the expected parse, white space around content and reasoning ignored; empty if the
        parses are equal."""
        if self.expected is None:
            return f"a tool call was found, but: {self.reason}" if parsed.calls else ""
        found, expected = _comparable(parsed), _comparable(self.expected)
        return "" if found == expected else f"parsed as {found}, expected {expected}"

    def splits(self, count: int) -> Iterator[list[str]]:
        """Yields `count` random splits of the text: into single characters first, then into chunks of at most 2, 3 and
        more characters."""
        rng = random.Random(self.name)
        for longest in range(1, count + 1):
            ends = [0]
            while ends[-1] < len(self.text):
                ends.append(ends[-1] + rng.randint(1, longest))
            yield [self.text[start:end] for start, end in pairwise(ends)]


def recorded_outputs(wheel: Path = models.SOURCES["canitoolcall"].path) -> list[RecordedOutput]:
    """Returns all recorded outputs. Raises FileNotFoundError if the wheel is not downloaded."""
    outputs: list[RecordedOutput] = []
    with zipfile.ZipFile(wheel) as archive:
        for family in FAMILIES:
            family_info = json.loads(archive.read(f"{FIXTURES}{family}/family.json"))
            references = {model["repo"]: model for model in family_info["reference_models"]}
            for name in sorted(archive.namelist()):
                if name.startswith(f"{FIXTURES}{family}/") and name.endswith(".jsonl"):
                    lines = archive.read(name).decode().splitlines()
                    outputs += [_record(json.loads(line), references) for line in lines if line.strip()]
    return outputs


def _record(row: dict[str, Any], references: dict[str, Any]) -> RecordedOutput:
    reference = references[row["models"][0]]
    name = VARIANTS.get(reference.get("variant", ""), FAMILIES[row["family"]])
    format = next(format for format in CHAT_FORMATS if format.name == name)
    prompt = row.get("generation_prompt")
    prompt = reference.get("default_generation_prompt") or "" if prompt is None else prompt
    tools = tuple(Tool(tool["function"]["name"], tool["function"].get("parameters") or {}) for tool in row["tools"])
    message = row.get("expected")
    expected = message and ParsedOutput(
        message["content"] or "",
        message["reasoning_content"] or "",
        tuple((call["name"], json.dumps(call["arguments"])) for call in message["tool_calls"]),
    )
    reason = row.get("expected_error", {}).get("reason", "")
    return RecordedOutput(
        row["id"], format, AllowedCalls(tools), format.opens_reasoning(prompt), row["raw_output"], expected, reason
    )


def _comparable(parsed: ParsedOutput) -> tuple[str, str, list[tuple[str, object]]]:
    return parsed.content.strip(), parsed.reasoning.strip(), [(name, _value(text)) for name, text in parsed.calls]


def _value(arguments: str) -> object:
    try:
        return json.dumps(msgspec.json.decode(arguments), sort_keys=True)
    except msgspec.DecodeError:
        return f"not JSON: {arguments}"
