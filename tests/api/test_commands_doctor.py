"""`paceline doctor`: a report of ten lines, or as JSON."""

from __future__ import annotations

import json
import signal

import msgspec
import pytest

from api.__main__ import main
from api.commands import doctor
from api.commands.doctor import doctor_report, report_text
from api.config.command_line import parse
from engine import (
    Diagnosis,
    MachineInfo,
    MemoryInfo,
    OpenedEngine,
    Opening,
    StepEstimate,
    core_process,
)
from tests.api.fake import INFO
from tests.conftest import MODEL

MACHINE = MachineInfo(
    "Some CPU", 4, 8, 2**34, 2**33, (), "ggml 1.2 abc CPU : SSE3 = 1 | AVX2 = 1 | NEON = 0 | OPENMP = 1"
)
MEMORY = MemoryInfo(False, "each slot has 512 tokens", True, 0, 2**30, False, 0, 0)
ENGINE = OpenedEngine(
    msgspec.structs.replace(INFO, cell_bytes=2**20, chat_template="{{ messages }}<tool_call>"),
    MEMORY,
    4,
    512,
    ("grammar", "suffix"),
    {"draft": "there is no draft model"},
    (StepEstimate(1, 0, 0.01), StepEstimate(8, 2048, 0.04)),
)
EXACT = msgspec.structs.replace(ENGINE, steps=(StepEstimate(1, 0, 0.01), StepEstimate(8, 2048, 0.06)))
OPTIONS = parse(["-m", "fake.gguf"], {})


def test_ten_lines() -> None:
    report = doctor_report(OPTIONS, Diagnosis(MACHINE, Opening(ENGINE), Opening(EXACT)))
    lines = {line[:14].rstrip(): line[15:] for line in report_text(report).splitlines()}
    assert len(lines) == 10
    assert lines["machine"] == (
        "Some CPU, 4 cores, 8 CPUs usable; memory: 8.0 of 16.0 GiB free; devices besides the CPU: none"
    )
    assert lines["library"] == "ggml 1.2 abc: SSE3 AVX2"
    assert lines["KV cache"] == (
        "per slot, 4 slots, 512 tokens for each request, 2048 cells, 2.00 GiB (each slot has 512 tokens)"
    )
    assert lines["context"] == "about 8191 cells (-c) fill the free memory"
    assert lines["chat template"].endswith("format of tool calls: hermes")
    assert lines["speculation"] == "grammar, suffix; not draft: there is no draft model"
    assert lines["speed"] == "a step of 1 × 0 tokens: 10.0 ms (100 tokens/s), 8 × 2048 tokens: 40.0 ms (200 tokens/s)"
    assert lines["deterministic"].endswith(": 1.00 for 1 × 0 tokens, 1.50 for 8 × 2048 tokens")


@pytest.mark.parametrize(
    ("served", "exact", "line"),
    [
        (Opening(None, "it is broken"), None, "model          cannot be served: it is broken"),
        (Opening(ENGINE), Opening(None, "a GPU"), "deterministic  not possible: a GPU"),
        (Opening(msgspec.structs.replace(ENGINE, steps=())), None, "deterministic  not tried"),
    ],
    ids=["broken", "refused", "untried"],
)
def test_last_lines(served: Opening, exact: Opening | None, line: str) -> None:
    assert report_text(doctor_report(OPTIONS, Diagnosis(None, served, exact))).splitlines()[-1] == line


def test_an_invalid_template() -> None:
    options = parse(["-m", "fake.gguf", "--chat-template", "{% if"], {})
    report = doctor_report(options, Diagnosis(None, Opening(ENGINE), None))
    assert report.template is not None
    assert report.template.problem
    assert "from the flags; cannot be used: " in report_text(report)


def test_a_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The model opens with and without the deterministic profile, in two processes."""
    assert main(["doctor", "--json", "-m", str(MODEL), "-c", "512", "-np", "1", "-t", "1", "--no-warmup"]) == 0
    report = json.loads(capsys.readouterr().out)
    served, exact = report["diagnosis"]["served"]["engine"], report["diagnosis"]["exact"]["engine"]
    assert (served["request_limit"], served["info"]["cell_bytes"], served["info"]["exact"]) == (512, 23040, False)
    assert exact["info"]["exact"]
    assert report["template"]["source"] == "model"
    assert report["diagnosis"]["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name a GGUF file with -m"),
        (["-m", "m", "--chat-template", "chatmll"], 2, "the nearest is chatml"),
    ],
    ids=["no model", "no template"],
)
def test_an_error_is_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_model_that_cannot_be_served(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Diagnosis(MACHINE, Opening(None, "it is broken"), None)
    monkeypatch.setattr(doctor, "diagnose", lambda config, progress: broken)
    assert main(["doctor", "-m", "m"]) == 1
    assert "cannot be served: it is broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exit_code", "problem"),
    [
        (-signal.SIGABRT, "ended the process (SIGABRT)"),
        (-signal.SIGILL, "another processor (SIGILL)"),
        (3, "exit code 3"),
    ],
    ids=str,
)
def test_the_end_of_the_process_is_a_problem(exit_code: int, problem: str) -> None:
    assert problem in core_process.end_of_process(exit_code)
