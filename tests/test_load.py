"""The load tests: workloads, figures, ratios, the report, repeatability and the soak test's counts."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import bfcl, client, models, repeat, report, soak, versus, workloads
from bench.client import Outcome
from bench.example import adapted, configuration
from bench.figures import OUT
from bench.load import is_good
from bench.load import report as loaded
from bench.models import SOURCES
from bench.peers import PACELINE, Settings
from bench.workloads import AgentSession
from engine import Calibration

SETTINGS = Settings(Path("toy.gguf"), 4096, 8, 2)


def outcome(first: float, gaps: list[float], tokens: int = 4) -> Outcome:
    """Returns the outcome of a request that began at 0."""
    arrivals = [first]
    for gap in gaps:
        arrivals.append(arrivals[-1] + gap)
    return Outcome(0.0, 200, arrivals, arrivals[-1], prompt_tokens=10, completion_tokens=tokens)


def test_a_session_grows_until_it_is_too_long() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c" * 9999), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": text} for role, text in turns] * 3
    requests = workloads._turns(AgentSession("1", messages), 8)
    lengths = [len(one.body["messages"]) for one in requests]
    assert lengths == [1, 3, 5, 6, 8, 10, 11, 13, 15]
    assert len(requests[1].body["messages"][-1]["content"]) == workloads.MESSAGE_CHARACTERS
    assert requests[1].body["messages"][:1] == requests[0].body["messages"]


def test_long_prompts_come_among_short_ones() -> None:
    sizes = [len(session[0].body["messages"][0]["content"]) for session in workloads.workload("long", 16, 8)]
    assert [size > 10_000 for size in sizes] == ([False] * 7 + [True]) * 2


def test_rounds_have_different_requests() -> None:
    first, second = workloads.workload("shared", 3, 8), workloads.workload("shared", 3, 8, skip=3)
    assert first != second
    assert first == workloads.workload("shared", 3, 8)


def test_context_prompts_are_deterministic_and_distinct_and_have_the_requested_length() -> None:
    requests = workloads.workload("context", 64, 64, prompt_tokens=500)
    assert requests == workloads.workload("context", 64, 64, prompt_tokens=500)
    assert requests[40:] == workloads.workload("context", 24, 64, skip=40, prompt_tokens=500)
    texts = [session[0].body["messages"][0]["content"] for session in requests]
    assert {len(re.findall(r"\w+|\.", text)) for text in texts} == {500}
    assert len({text.split()[0] for text in texts}) == len(texts)  # prompts share only the chat template
    assert {session[0].body["max_tokens"] for session in requests} == {64}


@pytest.mark.parametrize("tokens", [0, 1, 2, 11, 12, 13, 1000])
def test_a_random_text_has_the_requested_number_of_tokens(tokens: int) -> None:
    words = re.findall(r"\w+|\.", workloads.random_text(7, tokens))
    assert len(words) == tokens
    assert set(words) <= {*workloads.COMMON_WORDS, "."}


def test_the_first_two_words_differ_for_all_numbers() -> None:
    numbers = range(2 * len(workloads.COMMON_WORDS))
    begins = {tuple(workloads.random_text(number, 4).split()[:2]) for number in numbers}
    assert len(set(workloads.COMMON_WORDS)) == len(workloads.COMMON_WORDS)
    assert len(begins) == len(numbers)


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
    """Writes a wheel with three questions, one of which is of another category."""
    monkeypatch.setattr(models, "MODELS_FOLDER", tmp_path)
    rows = [
        {"id": f"row_{number}", "question": [[{"role": "user", "content": f"Which {number}?"}]], "function": [AREA]}
        for number in range(3)
    ]
    with zipfile.ZipFile(SOURCES["bfcl"].path, "w") as wheel:
        for name, of in (("simple_python", rows[:2]), ("multiple", rows[2:]), ("format_sensitivity", [])):
            wheel.writestr(f"bfcl_eval/data/BFCL_v4_{name}.json", b"\n".join(map(msgspec.json.encode, of)))
        wheel.writestr("bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json", b"")


@pytest.mark.usefixtures("leaderboard")
def test_tools_have_the_format_of_openai() -> None:
    requests = [session[0].body for session in workloads.workload("tools", 3, 8)]
    assert [one["messages"][0]["content"] for one in requests] == ["Which 0?", "Which 1?", "Which 0?"]
    assert [one["seed"] for one in requests] == [0, 1, 2]
    assert all((one["tool_choice"], one["max_tokens"], one["ignore_eos"]) == ("auto", 8, False) for one in requests)
    (tool,) = requests[0]["tools"]
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


async def test_tool_calls_count_as_output() -> None:
    result = Outcome(0.0)
    stream = client._Stream(result, b"")
    deltas: list[Any] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"tool_calls": [{"index": 0, "id": "1", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}], "content": None},
    ]
    for position, delta in enumerate(deltas):
        event = msgspec.json.encode({"choices": [{"index": 0, "delta": delta}]})
        stream._event(msgspec.json.decode(event, type=client._Event), float(position))
    assert (result.text, result.arrivals) == ("hmf{}", [1.0, 2.0, 3.0])


async def test_terminal_events_tokens_and_drafts_are_counted() -> None:
    result = Outcome(0.0)
    stream = client._Stream(result, b"")
    result.status = 200
    logprobs = {"content": [{"token": "?", "logprob": -0.5, "bytes": [226]}, {"token": "b", "logprob": -1.0}]}
    events: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": "ab"}, "logprobs": logprobs, "finish_reason": None}]},
        {"choices": [{"delta": {}, "logprobs": None, "finish_reason": "length"}]},
        {"choices": [], "timings": {"draft_n": 3, "draft_n_accepted": 2, "prompt_n": 1}},
    ]
    stream.on_body(b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events) + b"data: [DONE]\n\n")
    assert (result.finish_reasons, result.done_markers) == (1, 1)
    assert (result.tokens, result.logprobs) == ([b"\xe2", b"b"], [-0.5, -1.0])
    assert (result.draft_tokens, result.accepted_tokens) == (3, 2)


@pytest.mark.parametrize("name", ["mt-bench", "agents", "human-eval", "bfcl"])
def test_data_is_never_committed(name: str) -> None:
    assert SOURCES[name].path.parent.name == ".models"
    assert len(SOURCES[name].sha256) == 64


def test_goodput_counts_requests_that_meet_both_limits() -> None:
    quick, late, slow = outcome(0.1, [0.05] * 3), outcome(2.0, [0.05] * 3), outcome(0.1, [0.5] * 3)
    assert [is_good(one, (1000.0, 100.0)) for one in (quick, late, slow)] == [True, False, False]
    failed = Outcome(0.0, 500, error="no")
    figures = loaded([quick, late, slow, failed], 2.0, 0.1)
    assert (figures["requests"], figures["failed"], figures["completion_tokens"]) == (4, 1, 12)
    assert (figures["tokens_per_second"], figures["good_requests_per_second"]) == (6.0, 0.5)
    assert figures["client_cpu_percent"] == 5.0
    assert figures["finish_s"]["max"] == pytest.approx(2.15)


def test_the_bound_is_the_rows_alone() -> None:
    measured = Calibration({1: 0.01, 4: 0.02}, 0.0, 0.001)
    outcomes = [outcome(0.1, [0.1] * 3, tokens=51) for _ in range(4)]
    assert versus.bound(measured, outcomes, 4) == pytest.approx(204 / (40 * 0.001 + 50 * 0.02))


def test_the_bound_ends_as_a_run_does() -> None:
    measured = Calibration({1: 0.01, 2: 0.015}, 0.0, 0.001)
    outcomes = [outcome(0.1, [0.1] * 3, tokens=tokens) for tokens in (11, 21, 11)]
    three = 43 / (30 * 0.001 + 20 * 0.015)  # the third request begins when the first ends, and ends with the second
    assert versus.bound(measured, outcomes, 2) == pytest.approx(three)
    two = 32 / (20 * 0.001 + 10 * 0.015 + 10 * 0.01)  # the second request is alone in its last steps
    assert versus.bound(measured, outcomes[:2], 2) == pytest.approx(two)


def test_the_first_difference_counts_ends() -> None:
    assert repeat.first_difference("abc", "abc") is None
    assert repeat.first_difference("abc", "abd") == 2
    assert repeat.first_difference("abc", "ab") == repeat.first_difference("ab", "abc") == 2
    assert repeat.first_difference("", "") is None


def answer(tokens: list[bytes], text: str = "", last: float = -1.0) -> repeat.RepeatedAnswer:
    """Returns an answer with one log probability."""
    return repeat.RepeatedAnswer(tuple(tokens), (last,), text, cached=3, accepted=2)


def test_a_comparison_names_the_first_differing_token_of_all_answers() -> None:
    reference, situation = answer([b"a", b"b", b"c"], "abc"), repeat.situations(4)[0]
    others = [reference, answer([b"a", b"b", b"c"], "abc", last=-1.1), answer([b"a", b"x"]), answer([b"a", b"b", b"x"])]
    comparison = repeat.compared("greedy", 8, situation, reference, others, 5)
    assert (comparison.answers, comparison.same, comparison.differs_at, comparison.same_bits) == (4, 2, 1, 1)
    assert (comparison.cached, comparison.accepted, comparison.others_accepted) == (12, 8, 5)
    assert repeat.compared("greedy", 8, situation, reference, [reference], 0).differs_at is None
    assert repeat.differs_at(reference, answer([b"a", b"b", b"c"], "ab?")) == 3


def test_the_slope_is_that_of_the_second_half() -> None:
    samples = [soak.MemorySample(ended, 10**6 if ended < 50 else 10**8 + 300 * ended) for ended in range(0, 101, 5)]
    assert soak.slope(samples) == pytest.approx(300)
    assert soak.slope(samples[:1]) == soak.slope([]) == 0.0


def test_a_request_is_lost_without_exactly_one_terminal_event() -> None:
    def kind(status: int = 200, error: str = "", finishes: int = 1, dones: int = 1) -> str:
        return soak.kind_of(Outcome(0.0, status, error=error, finish_reasons=finishes, done_markers=dones))

    assert kind() == "complete"
    assert kind(error=client.ABANDONED, finishes=0, dones=0) == "abandoned"
    assert [kind(dones=0), kind(finishes=0), kind(finishes=2)] == ["lost"] * 3
    assert kind(error="the connection was closed", finishes=0, dones=0) == "lost"
    assert kind(status=503, error='{"error": {}}', finishes=0, dones=0) == "failed"
    assert kind(status=0, error="[Errno 111] refused", finishes=0, dones=0) == "lost"


def test_the_soak_sends_the_same_requests_in_every_run() -> None:
    plan = soak.plan_requests(400, 8, 0.4)
    assert plan == soak.plan_requests(400, 8, 0.4)
    abandoned = [planned for planned in plan if planned.seconds is not None or planned.events is not None]
    assert 120 < len(abandoned) < 200
    assert all(
        soak.SHORTEST_HANG_UP_SECONDS <= planned.seconds <= soak.LONGEST_HANG_UP_SECONDS
        for planned in abandoned
        if planned.seconds is not None
    )


METRICS = """# HELP paceline_requests_total Requests
paceline_requests_total{reason="stop"} 1.0
paceline_requests_total{reason="length"} 7.0
paceline_requests_total{reason="cancelled"} 2.0
paceline_requests_total{reason="error"} 0.0
paceline_requests_running 0.0
paceline_requests_waiting 1.0
paceline_prompt_tokens_total 100.0
paceline_completion_tokens_total 50.0
"""


def test_the_counts_of_the_server_may_not_contradict_those_of_the_client() -> None:
    start = soak.Counts({"length": 1}, 0, 10, 5)
    server = soak.counts_of(METRICS).since(start)
    assert (server.finished["length"], server.prompt_tokens, server.completion_tokens) == (6, 90, 45)
    agreed = soak.Summary(10, complete=6, abandoned=4, failed=0, lost=0, prompt_tokens=90, completion_tokens=45)
    assert soak.disagreements(agreed, server) == ["1 requests are still in progress"]
    quiet = msgspec.structs.replace(server, in_progress=0)
    assert soak.disagreements(agreed, quiet) == []
    more = msgspec.structs.replace(agreed, complete=9, abandoned=1, completion_tokens=46)
    assert soak.disagreements(more, quiet) == [
        "7 requests finished, 9 to 10 expected",
        "2 requests cancelled, at most 1 expected",
        "45 completion tokens, at least 46 expected",
    ]
    failed = msgspec.structs.replace(quiet, finished={**quiet.finished, "error": 1})
    assert soak.disagreements(agreed, failed) == ["1 requests ended otherwise"]


def test_the_example_server_has_equal_settings() -> None:
    model = configuration(SETTINGS, 80)["model"]
    assert (model["n_ctx"], model["n_seq_max"], model["threads"], model["threads_batch"]) == (4096, 8, 2, 2)
    assert adapted({"ignore_eos": True}, (7,))["logit_bias"] == {"7": -100}
    assert adapted({"max_tokens": 3}, (7,)) == {"max_tokens": 3}


def rounds(speeds: list[float], gap: float) -> list[dict[str, Any]]:
    """Returns the rounds of one contender."""
    return [{"tokens_per_second": speed, "gap_ms": {"p99": gap}, "resident_mib": 100.0} for speed in speeds]


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Any]:
    """Returns the result files of two commands, as `report.read` returns them."""
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


def test_the_readme_has_the_best_mode_of_the_peer(runs: dict[str, Any], tmp_path: Path) -> None:
    table = report.headline(runs)
    assert "| tokens per second, 8 clients | 2.00 (1.00–2.00) |  | 0.50 (0.25–0.75) |" in table
    assert "| 99th percentile of gaps, 8 clients | 0.25 (0.25–0.25) |" in table
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    report.replace_table(readme, table)
    assert "old" not in readme.read_text()
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith(f"{report.MARKS[1]}\nafter\n")
    assert OUT not in tmp_path.parents
