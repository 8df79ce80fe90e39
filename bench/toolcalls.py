"""Tool calls: recorded outputs of many models read whole and in pieces, and calls of a served model judged.

Without a model, the 469 recorded outputs that `python bench/models.py canitoolcall` brings; each that is not read as
expected is listed with the reason. With one (-m), questions of the Berkeley function calling leaderboard, which
`python bench/models.py bfcl` brings, of all its categories, relevant to their tools or not, with `tool_choice`
`required`: the arguments must be valid by their schemas, and a call that `max_tokens` cut off counts as a failure.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import jsonschema_rs

from bench import bfcl
from bench.recorded import Recorded, recorded
from bench.server import HOST, serving

MOST, LONGEST, AT_ONCE = 512, 6000, 4
"""Tokens of a call, as most tools bound no text and a small model may not find its end; characters of a question's
tools; and requests."""


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


def drawn(count: int) -> list[bfcl.Question]:
    """So many of the leaderboard's questions that have tools, not too many to read, at even distances."""
    found = [question for question in bfcl.questions() if question.function and _size(question) <= LONGEST]
    return [found[place * len(found) // count] for place in range(count)]


def _size(question: bfcl.Question) -> int:
    return len(json.dumps([function.tool for function in question.function or []]))


def ask(port: int, model: str, question: bfcl.Question, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The choice of one request. Raises RuntimeError with what the server says if it refuses."""
    body: dict[str, Any] = {"model": model, "messages": question.question[0], "tools": list(tools)}
    body |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": MOST, "seed": 7}
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


def call_all(model: Path, count: int, arguments: Sequence[str]) -> int:
    """Asks `count` questions, some at once; how many answers are no valid calls."""

    def failed(question: bfcl.Question) -> bool:
        tools = [function.tool for function in question.function or []]
        try:
            reason = judged(ask(server.port, model.stem, question, tools), tools)
        except RuntimeError as error:
            reason = str(error)
        if reason:
            print(f"{question.id}: {reason}", flush=True)
        return bool(reason)

    with serving(model, arguments) as server, ThreadPoolExecutor(AT_ONCE) as pool:
        failures = sum(pool.map(failed, drawn(count)))
    print(f"{count - failures} of {count} required calls of {model.stem} are valid by their schemas")
    return failures


def main() -> None:
    """Fails if anything is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="GGUF whose calls are judged instead")
    parser.add_argument("--calls", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--cuts", type=int, default=12, help="ways to cut each recorded output (default: 12)")
    arguments, rest = parser.parse_known_args()
    failures = call_all(arguments.model, arguments.calls, rest) if arguments.model else read_all(arguments.cuts)
    raise SystemExit(min(failures, 1))


if __name__ == "__main__":
    main()
