"""Checks tool calls: parses recorded outputs of many models, or validates the tool calls of a served model.

Without `-m` the 469 recorded outputs of `python bench/models.py canitoolcall` are parsed, each whole and in random
chunks; mismatches are listed. With `-m` the model gets questions of all categories of the Berkeley function calling
leaderboard (`python bench/models.py bfcl`) with `tool_choice` `required`. The arguments of a call must be valid by its
schema; a call truncated by `max_tokens` is a failure. With `--required` the model gets 20 small tasks instead, which
must end by themselves with the number of calls that the question asks for. Further flags are passed to the server.
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
from bench.recorded import RecordedOutput, recorded_outputs
from bench.required_tasks import REQUIRED_TASKS, RequiredTask, offered_tools
from bench.server import HOST, serving
from bench.workloads import CHAT_PATH

# Most schemas do not bound the length of strings, and a small model may never end one.
_MAX_TOKENS = 512
# Questions with longer tools are skipped.
_MAX_TOOL_CHARACTERS = 6000
# Number of concurrent requests.
_CLIENTS = 4


def parse_all(splits: int) -> int:
    """Parses all recorded outputs, whole and in `splits` random splits. Returns the number of mismatches."""
    rows, failures = recorded_outputs(), 0
    counts: Counter[str] = Counter()
    for row in rows:
        whole = row.parse([row.text])
        reason = row.mismatch(whole) or _unequal(row, whole, splits)
        counts[row.format.name] += not reason
        if reason:
            failures += 1
            print(f"{row.name} ({row.format.name}): {reason}")
    totals = Counter(row.format.name for row in rows)
    print(", ".join(f"{name} {counts[name]} of {total}" for name, total in totals.items()))
    print(f"{len(rows) - failures} of {len(rows)} parsed as expected, each whole and in {splits} random splits")
    return failures


def _unequal(row: RecordedOutput, whole: object, splits: int) -> str:
    for chunks in row.splits(splits):
        if (other := row.parse(chunks)) != whole:
            return f"in chunks {chunks} parsed as {other}"
    return ""


def sample(count: int) -> list[bfcl.BfclQuestion]:
    """Returns `count` questions with tools of at most `_MAX_TOOL_CHARACTERS`, evenly spread over the leaderboard."""
    found = [question for question in bfcl.questions() if question.function and _size(question) <= _MAX_TOOL_CHARACTERS]
    return [found[index * len(found) // count] for index in range(count)]


def _size(question: bfcl.BfclQuestion) -> int:
    return len(json.dumps([function.tool for function in question.function or []]))


def answer(
    port: int, messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]], **fields: Any
) -> dict[str, Any]:
    """Returns the choice of one request. Raises RuntimeError with the server's error if the request fails."""
    body = {"messages": messages, "tools": tools, "tool_choice": "required", "max_tokens": _MAX_TOKENS, **fields}
    request = urllib.request.Request(
        f"http://{HOST}:{port}{CHAT_PATH}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            reply = json.load(response)
    except HTTPError as error:
        raise RuntimeError(error.read().decode()) from None
    choice: dict[str, Any] = reply["choices"][0]
    return choice


def fault(choice: dict[str, Any], tools: Sequence[dict[str, Any]]) -> str:
    """Returns the reason why a choice is not a complete list of valid tool calls; empty if it is such a list."""
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
    """Sends `count` questions to a server on `model`. Returns the number of answers without valid tool calls."""

    def failed(question: bfcl.BfclQuestion) -> bool:
        tools = [function.tool for function in question.function or []]
        try:
            choice = answer(server.port, question.question[0], tools, parallel_tool_calls=False, seed=7)
            reason = fault(choice, tools)
        except RuntimeError as error:
            reason = str(error)
        if reason:
            print(f"{question.id}: {reason}", flush=True)
        return bool(reason)

    with serving(model, arguments) as server, ThreadPoolExecutor(_CLIENTS) as pool:
        failures = sum(pool.map(failed, sample(count)))
    print(f"{count - failures} of {count} required calls of {model.stem} are valid by their schemas")
    return failures


def call_required(model: Path, arguments: Sequence[str]) -> int:
    """Sends the required tasks, at temperature 0, to a server on `model`. Returns the number of wrong answers."""

    def failed(task: RequiredTask) -> bool:
        tools = offered_tools(task)
        choice = answer(server.port, [{"role": "user", "content": task.question}], tools, temperature=0)
        calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
        reason = fault(choice, tools) or ("" if tuple(call["name"] for call in calls) == task.calls else "other calls")
        print(f"{task.question} {[call['arguments'] for call in calls]} {reason or 'as asked for'}", flush=True)
        return bool(reason)

    with serving(model, arguments) as server:
        failures = sum(map(failed, REQUIRED_TASKS))
    print(f"{len(REQUIRED_TASKS) - failures} of {len(REQUIRED_TASKS)} required tasks of {model.stem} end as asked for")
    return failures


def main() -> None:
    """Prints the failures and their number; the exit code is 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="GGUF file of the model whose tool calls are validated")
    parser.add_argument("--calls", type=int, default=100, help="number of questions (default: 100)")
    parser.add_argument("--required", action="store_true", help="20 small tasks, with the number of calls asked for")
    parser.add_argument("--cuts", type=int, default=12, help="random splits of each recorded output (default: 12)")
    arguments, rest = parser.parse_known_args()
    if arguments.required and not arguments.model:
        parser.error("--required needs a model: add -m FILE")
    if arguments.required:
        failures = call_required(arguments.model, rest)
    else:
        failures = call_all(arguments.model, arguments.calls, rest) if arguments.model else parse_all(arguments.cuts)
    raise SystemExit(min(failures, 1))


if __name__ == "__main__":
    main()
