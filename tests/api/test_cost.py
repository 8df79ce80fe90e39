"""`paceline cost`: costs in the terminal and in a file, or an error of one line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from api.__main__ import main
from api.commands import cost
from engine import Calibration, EngineConfig, ModelError
from engine.backend import LoadProgress

MEASURED = Calibration({1: 0.02, 2: 0.03, 4: 0.025}, 5e-6, 0.007)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """Returns the configurations that `paceline cost` measures."""
    configs: list[EngineConfig] = []

    def measure_step_costs(config: EngineConfig, progress: LoadProgress) -> Calibration:
        configs.append(config)
        if config.model.path == "none.gguf":
            raise ModelError("cannot read the model none.gguf: No such file or directory")
        return MEASURED

    monkeypatch.setattr(cost, "measure_step_costs", measure_step_costs)
    return configs


def test_the_curve_is_shown_and_drawn(
    tmp_path: Path, measured: list[EngineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curve.png"
    assert main(["cost", "-o", str(picture), "-m", "some.gguf", "-t", "3", "-ot", "exps=CPU"]) == 0
    assert (measured[0].model.threads, measured[0].load.override_tensor) == (3, ("exps=CPU",))
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "some: cost of a step by number of rows" in out
    assert "7.00 ms" in out


def test_every_count_has_a_line() -> None:
    console = Console(file=io.StringIO(), width=120)
    cost.print_costs("some", MEASURED, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.split()[1:6:2] for line in text.splitlines() if line.startswith("│")] == [
        ["1", "20.00", "20.00"],
        ["2", "30.00", "15.00"],
        ["4", "25.00", "6.25"],
    ]
    assert "5000.0 ns" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-m", "none.gguf"], 1, "cannot read the model none.gguf"),
        ([], 2, "name a GGUF file with -m"),
        (["-m", "some.gguf", "--thread", "2"], 2, "--threads"),
        (["-m", "some.gguf", "-o", "/nowhere/at/all.png"], 1, "/nowhere/at/all.png"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", *arguments]) == code
    assert message in capsys.readouterr().err.splitlines()[-1]
