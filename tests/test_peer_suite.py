"""The runner of llama-server's test suite: command lines, reports, comparison, and the vocabulary of its models."""

from __future__ import annotations

from pathlib import Path

from bench.peer_suite import (
    TestOutcome,
    as_paceline,
    comparison,
    parse_report,
    summary,
    with_local_model,
)
from bench.suite_models import learned_pieces

MODELS = Path("models")
REPORT = """<testsuites><testsuite>
<testcase classname="unit.test_a" name="one" />
<testcase classname="unit.test_a" name="two"><failure message="assert 1 == 2&#10;more">text</failure></testcase>
<testcase classname="unit.test_a" name="two"><error message="teardown" /></testcase>
<testcase classname="unit.test_b" name="three"><skipped /></testcase>
<testcase classname="unit.test_b" name="four"><error message="RuntimeError: Server process died with 2" />
<system-out>tests: starting server with: x
--tools: there is no such flag
server pid=1</system-out></testcase>
</testsuite></testsuites>"""


def test_models_of_the_hub_become_files() -> None:
    words = ["--port", "1", "--hf-repo", "ggml-org/models", "--hf-file", "bert-bge-small/x.gguf", "--slots"]
    assert with_local_model(words, MODELS) == ["--model", "models/bert.gguf", "--port", "1", "--slots"]
    story = ["--hf-repo", "ggml-org/test-model-stories260K"]
    assert with_local_model(story, MODELS) == ["--model", "models/llama.gguf"]
    assert with_local_model([*story[:1], story[1] + "-infill"], MODELS) == ["--model", "models/infill.gguf"]
    assert with_local_model(["--port", "1"], MODELS) == ["--port", "1"], "a server without a model"


def test_command_lines_of_paceline() -> None:
    words = ["--model", "x.gguf", "--n-predict", "64"]
    assert as_paceline(words) == [*words, "--no-kv-unified"]
    assert as_paceline([*words, "--kv-unified"]) == [*words, "--kv-unified"]
    assert as_paceline(["--kv-unified"])[:1] == ["--model"], "a router"


def test_outcomes_of_a_report() -> None:
    outcomes = parse_report(REPORT)
    assert outcomes == [
        TestOutcome("test_a", "one", "passed"),
        TestOutcome("test_a", "two", "failed", "assert 1 == 2"),
        TestOutcome("test_b", "three", "skipped"),
        TestOutcome("test_b", "four", "failed", "the server did not start: --tools: there is no such flag"),
    ]
    assert summary(outcomes).splitlines()[-1].split() == ["all", "1", "2", "1"]


def test_comparison_with_llama_server() -> None:
    peer = [TestOutcome("test_a", name, "passed") for name in ("one", "two", "not run")]
    text = comparison([*peer, TestOutcome("test_b", "four", "failed")], parse_report(REPORT))
    assert text.splitlines() == [
        "3 pass with llama-server; 2 of these ran with Paceline, and 1 of those pass",
        "test_a: 1: assert 1 == 2",
        "    two",
    ]


def test_learned_pieces() -> None:
    assert learned_pieces("ab ab abc", 6) == ["a", "b", "c", "\u2581", "\u2581a", "\u2581ab"]
