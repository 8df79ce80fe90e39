"""`paceline cost`: a curve in the terminal and as a picture, or one line about why there is none."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from api.__main__ import main
from api.commands import cost
from engine import EngineConfig, Measured, ModelError
from engine.backend import Progress

MEASURED = Measured({1: 0.02, 2: 0.03, 4: 0.025}, 5e-6, 0.007)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """What was asked to be measured."""
    asked: list[EngineConfig] = []

    def step_costs(config: EngineConfig, progress: Progress) -> Measured:
        asked.append(config)
        if config.model.path == "none.gguf":
            raise ModelError("cannot read the model none.gguf: No such file or directory")
        return MEASURED

    monkeypatch.setattr(cost, "step_costs", step_costs)
    return asked


def test_the_curve_is_shown_and_drawn(
    tmp_path: Path, measured: list[EngineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curve.png"
    assert main(["cost", "-o", str(picture), "-m", "some.gguf", "-t", "3"]) == 0
    assert measured[0].model.threads == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "some: a step by its rows" in out
    assert "7.00 ms" in out


def test_every_count_has_a_line() -> None:
    console = Console(file=io.StringIO(), width=120)
    cost.print_curve("some", MEASURED, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.split()[1:6:2] for line in text.splitlines() if line.startswith("│")] == [
        ["1", "20.00", "20.00"],
        ["2", "30.00", "15.00"],
        ["4", "25.00", "6.25"],
    ]
    assert "5000.0 ns" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-m", "none.gguf"], 1, "cannot read the model none.gguf"),
        ([], 2, "name a GGUF file with -m"),
        (["-m", "some.gguf", "--thread", "2"], 2, "--threads"),
        (["-m", "some.gguf", "-o", "/nowhere/at/all.png"], 1, "/nowhere/at/all.png"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", *arguments]) == code
    assert words in capsys.readouterr().err.splitlines()[-1]
