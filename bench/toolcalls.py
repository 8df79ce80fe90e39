"""Tool calls: recorded outputs of many models read whole and in pieces, and calls of a served model judged.

Without a model, the 469 recorded outputs that `python bench/models.py canitoolcall` brings; each that is not read as
expected is listed with the reason. With one (-m), requests with `tool_choice` `required`, whose arguments must be valid
by their schemas.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import jsonschema_rs

from bench.recorded import Recorded, recorded
from bench.server import HOST, serving


def tool(name: str, about: str, properties: dict[str, Any], required: Sequence[str] | None = None) -> dict[str, Any]:
    """A tool with these parameters, all of them required unless told otherwise."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


TEXT: dict[str, Any] = {"type": "string", "maxLength": 40}
TOOLS = (
    tool("get_weather", "The weather of a city", {"city": TEXT, "unit": {"enum": ["celsius", "fahrenheit"]}}, ["city"]),
    tool("add", "The sum of two whole numbers", {"a": {"type": "integer"}, "b": {"type": "integer"}}),
    tool("search", "Searches the web", {"query": TEXT, "limit": {"type": "integer", "minimum": 1, "maximum": 20}}),
    tool(
        "set_alarm",
        "Sets an alarm",
        {"time": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"}, "on": {"type": "boolean"}},
    ),
    tool(
        "send_mail",
        "Sends a mail",
        {"to": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3}, "subject": TEXT, "body": TEXT},
    ),
    tool(
        "create_event",
        "Puts an event into the calendar",
        {
            "title": TEXT,
            "when": {
                "type": "object",
                "properties": {
                    "day": {"type": "string", "format": "date"},
                    "hour": {"type": "integer", "minimum": 0, "maximum": 23},
                },
                "required": ["day", "hour"],
                "additionalProperties": False,
            },
        },
    ),
    tool("convert", "Converts a temperature", {"value": {"type": "number"}, "to": {"enum": ["C", "F", "K"]}}),
    tool("now", "The time", {}),
    tool("note", "Keeps a note", {"text": TEXT, "tag": {"anyOf": [TEXT, {"type": "null"}]}}, ["text"]),
    tool(
        "move", "Moves the robot", {"steps": {"type": "array", "items": {"enum": ["n", "e", "s", "w"]}, "maxItems": 5}}
    ),
)
ASKED = (
    "Tell me a joke about the sea.",
    "How warm is it in Zürich, in degrees Celsius?",
    "What is 17 and 25 together?",
    "Find out who wrote Faust.",
    "Wake me at half past six.",
    "Write to ana@example.com that I am late.",
    "Dinner with Bo on the third of May 2027 at 19.",
    "Please explain what recursion is.",
    "你好,今天天气怎么样?",
    "Remember the milk. 🥛",
)


def read_all(cuts: int) -> int:
    """Reads all that is recorded, whole and in `cuts` ways; how many are not as expected."""
    rows, failures = recorded(), 0
    counts: Counter[str] = Counter()
    for row in rows:
        whole = row.read([row.text])
        reason = row.wrong(whole) or _unequal(row, whole, cuts)
        counts[row.format.name] += not reason
        if reason:
            failures += 1
            print(f"{row.name} ({row.format.name}): {reason}")
    totals = Counter(row.format.name for row in rows)
    print(", ".join(f"{name} {counts[name]} of {total}" for name, total in totals.items()))
    print(f"{len(rows) - failures} of {len(rows)} read as expected, each whole and in {cuts} ways")
    return failures


def _unequal(row: Recorded, whole: object, cuts: int) -> str:
    for pieces in row.cuts(cuts):
        if (other := row.read(pieces)) != whole:
            return f"in pieces {pieces} read as {other}"
    return ""


def ask(port: int, model: str, question: str, tools: Sequence[dict[str, Any]], choice: object) -> dict[str, Any]:
    """The choice of one request."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}], "tools": list(tools)}
    body |= {"tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 400, "seed": 7}
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            reply = json.load(response)
    except HTTPError as error:
        raise RuntimeError(error.read().decode()) from None
    made: dict[str, Any] = reply["choices"][0]
    return made


def judged(choice: dict[str, Any], tools: Sequence[dict[str, Any]]) -> str:
    """What is wrong with a choice that had to be calls; empty if nothing is."""
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
    calls = choice["message"].get("tool_calls") or []
    if not calls or choice["finish_reason"] != "tool_calls":
        return f"no call, but {choice}"
    for call in calls:
        try:
            jsonschema_rs.validate(schemas[call["function"]["name"]], json.loads(call["function"]["arguments"]))
        except (KeyError, ValueError, jsonschema_rs.ValidationError) as error:
            return f"{call['function']}: {error}"
    return ""


def call_all(model: Path, arguments: Sequence[str]) -> int:
    """Asks each question with each tool alone and all together in turn; how many answers are no valid calls."""
    failures = count = 0
    with serving(model, arguments) as server:
        for index, each in enumerate(TOOLS):
            for place, question in enumerate(ASKED):
                tools = TOOLS if (index + place) % 2 else (each,)
                reason = judged(ask(server.port, model.stem, question, tools, "required"), tools)
                count, failures = count + 1, failures + bool(reason)
                if reason:
                    print(f"{question} {each['function']['name']}: {reason}")
    print(f"{count - failures} of {count} required calls of {model.stem} are valid by their schemas")
    return failures


def main() -> None:
    """Fails if anything is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="GGUF whose calls are judged instead")
    parser.add_argument("--cuts", type=int, default=12, help="ways to cut each recorded output (default: 12)")
    arguments, rest = parser.parse_known_args()
    failures = call_all(arguments.model, rest) if arguments.model else read_all(arguments.cuts)
    raise SystemExit(min(failures, 1))


if __name__ == "__main__":
    main()
