"""The load tests: what is asked, what is counted, and what the report makes of it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import bfcl, client, models, report, versus, workloads
from bench.client import Outcome
from bench.example import adapted, configuration
from bench.figures import OUT
from bench.load import is_good
from bench.load import report as loaded
from bench.models import SOURCES
from bench.peers import PACELINE, Settings
from bench.workloads import Recorded
from engine import Measured

SETTINGS = Settings(Path("toy.gguf"), 4096, 8, 2)


def outcome(first: float, gaps: list[float], tokens: int = 4) -> Outcome:
    """A request that began at 0."""
    arrivals = [first]
    for gap in gaps:
        arrivals.append(arrivals[-1] + gap)
    return Outcome(0.0, 200, arrivals, arrivals[-1], prompt_tokens=10, completion_tokens=tokens)


def test_a_session_grows_until_it_is_too_long() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c" * 9999), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": text} for role, text in turns] * 3
    asked = workloads._turns(Recorded("1", messages), 8)
    lengths = [len(one.body["messages"]) for one in asked]
    assert lengths == [1, 3, 5, 6, 8, 10, 11, 13, 15]
    assert len(asked[1].body["messages"][-1]["content"]) == workloads.MESSAGE
    assert asked[1].body["messages"][:1] == asked[0].body["messages"]


def test_long_prompts_come_among_short_ones() -> None:
    sizes = [len(session[0].body["messages"][0]["content"]) for session in workloads.workload("long", 16, 8)]
    assert [size > 10_000 for size in sizes] == ([False] * 7 + [True]) * 2


def test_rounds_ask_different_things() -> None:
    first, second = workloads.workload("shared", 3, 8), workloads.workload("shared", 3, 8, skip=3)
    assert first != second
    assert first == workloads.workload("shared", 3, 8)


AREA = {
    "name": "math.area",
    "description": "The area of a triangle",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "float", "description": "Its base", "optional": False},
            "unit": {"type": "any"},
            "points": {"type": "tuple", "items": {"type": "dict", "properties": {"x": {"type": "integer"}}}},
        },
        "required": ["base"],
    },
}


@pytest.fixture
def leaderboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel with three questions, one of which is of another kind."""
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    rows = [
        {"id": f"row_{number}", "question": [[{"role": "user", "content": f"Which {number}?"}]], "function": [AREA]}
        for number in range(3)
    ]
    with zipfile.ZipFile(SOURCES["bfcl"].path, "w") as wheel:
        for name, of in (("simple_python", rows[:2]), ("multiple", rows[2:]), ("format_sensitivity", [])):
            wheel.writestr(f"bfcl_eval/data/BFCL_v4_{name}.json", b"\n".join(map(msgspec.json.encode, of)))
        wheel.writestr("bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json", b"")


@pytest.mark.usefixtures("leaderboard")
def test_tools_are_offered_as_openai_has_them() -> None:
    asked = [session[0].body for session in workloads.workload("tools", 3, 8)]
    assert [one["messages"][0]["content"] for one in asked] == ["Which 0?", "Which 1?", "Which 0?"]
    assert [one["seed"] for one in asked] == [0, 1, 2]
    assert all((one["tool_choice"], one["max_tokens"], one["ignore_eos"]) == ("auto", 8, False) for one in asked)
    (tool,) = asked[0]["tools"]
    assert (tool["type"], tool["function"]["name"]) == ("function", "math.area")
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "base": {"type": "number", "description": "Its base"},
            "unit": {},
            "points": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        },
        "required": ["base"],
    }


@pytest.mark.usefixtures("leaderboard")
def test_schemas_of_all_kinds_of_questions() -> None:
    assert [where for where, _ in bfcl.schemas()] == [f"row_{number}:math.area" for number in range(3)]


async def test_calls_count_as_they_come() -> None:
    made = Outcome(0.0)
    stream = client._Stream(made, b"")
    deltas: list[Any] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"tool_calls": [{"index": 0, "id": "1", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}], "content": None},
    ]
    for place, delta in enumerate(deltas):
        event = msgspec.json.encode({"choices": [{"index": 0, "delta": delta}]})
        stream._event(msgspec.json.decode(event, type=client._Event), float(place))
    assert (made.text, made.arrivals) == ("hmf{}", [1.0, 2.0, 3.0])


@pytest.mark.parametrize("name", ["mt-bench", "agents", "human-eval", "bfcl"])
def test_data_is_never_committed(name: str) -> None:
    assert SOURCES[name].path.parent.name == ".models"
    assert len(SOURCES[name].sha256) == 64


def test_goodput_counts_what_meets_both_limits() -> None:
    quick, late, slow = outcome(0.1, [0.05] * 3), outcome(2.0, [0.05] * 3), outcome(0.1, [0.5] * 3)
    assert [is_good(one, (1000.0, 100.0)) for one in (quick, late, slow)] == [True, False, False]
    failed = Outcome(0.0, 500, error="no")
    figures = loaded([quick, late, slow, failed], 2.0, 0.1)
    assert (figures["requests"], figures["failed"], figures["completion_tokens"]) == (4, 1, 12)
    assert (figures["tokens_per_second"], figures["good_requests_per_second"]) == (6.0, 0.5)
    assert figures["client_cpu_percent"] == 5.0


def test_the_bound_is_the_rows_alone() -> None:
    measured = Measured({1: 0.01, 4: 0.02}, 0.0, 0.001)
    outcomes = [outcome(0.1, [0.1] * 3, tokens=51) for _ in range(4)]
    assert versus.bound(measured, outcomes, 4) == pytest.approx(204 / (40 * 0.001 + 50 * 0.02))


def test_the_bound_ends_as_a_run_does() -> None:
    measured = Measured({1: 0.01, 2: 0.015}, 0.0, 0.001)
    outcomes = [outcome(0.1, [0.1] * 3, tokens=tokens) for tokens in (11, 21, 11)]
    three = 43 / (30 * 0.001 + 20 * 0.015)  # the third begins as the first ends, and ends with the second
    assert versus.bound(measured, outcomes, 2) == pytest.approx(three)
    two = 32 / (20 * 0.001 + 10 * 0.015 + 10 * 0.01)  # the second is alone in the end
    assert versus.bound(measured, outcomes[:2], 2) == pytest.approx(two)


def test_the_example_server_is_told_the_same() -> None:
    model = configuration(SETTINGS, 80)["model"]
    assert (model["n_ctx"], model["n_seq_max"], model["threads"], model["threads_batch"]) == (4096, 8, 2, 2)
    assert adapted({"ignore_eos": True}, (7,))["logit_bias"] == {"7": -100}
    assert adapted({"max_tokens": 3}, (7,)) == {"max_tokens": 3}


def rounds(speeds: list[float], gap: float) -> list[dict[str, Any]]:
    """Rounds of one contender."""
    return [{"tokens_per_second": speed, "gap_ms": {"p99": gap}, "resident_mib": 100.0} for speed in speeds]


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Any]:
    """What two commands wrote, read back."""
    cell = {
        PACELINE: rounds([10.0, 20.0, 30.0], 5.0),
        "llama-server-unified": rounds([5.0, 20.0, 15.0], 50.0),
        "llama-server-split": rounds([1.0, 1.0, 1.0], 20.0),
        "bound": [{"tokens_per_second": 40.0}] * 3,
    }
    figures = {"model": "toy", "cells": {"8": cell}, "options": {"workload": "chat", "start": {PACELINE: 1.0}}}
    about = {"machine": {"processor": "a quick one", "cores": 2}, "command": "python -m bench.versus"}
    (tmp_path / "versus.json").write_bytes(msgspec.json.encode({**about, "figures": figures}))
    (tmp_path / "limits.json").write_bytes(msgspec.json.encode({**about, "figures": [{"slots": 1, "speed": 2.0}]}))
    (tmp_path / "other.json").write_bytes(b"[]")
    return report.read(tmp_path)


def test_ratios_compare_runs_of_one_round(runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plot", lambda *_: None)
    text = report.section("versus", runs["versus"])
    assert "| 8 | llama-server-unified | 15.0 (5.0–20.0) | 2.00 (1.00–2.00) | 50 (50–50) | 0.10 (0.10–0.10) |" in text
    assert "a quick one, 2 cores" in text
    assert "| slots | speed |" in report.section("limits", runs["limits"])
    assert report.section("unknown", runs["limits"]) == ""


def test_the_readme_shows_the_best_mode_of_the_peer(runs: dict[str, Any], tmp_path: Path) -> None:
    table = report.headline(runs)
    assert "| tokens a second, 8 clients | 2.00 (1.00–2.00) |  | 0.50 (0.25–0.75) |" in table
    assert "| 99th percentile of gaps, 8 clients | 0.25 (0.25–0.25) |" in table
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    report.renew(readme, table)
    assert "old" not in readme.read_text()
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith(f"{report.MARKS[1]}\nafter\n")
    assert OUT not in tmp_path.parents
