"""READMEs: the example of the top README runs, and every folder is named in the README above it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("engine", "api", "bench", "tests")
MAX_LINES = 150


def folders() -> list[Path]:
    """Returns the folders that hold Python files or a README, relative to the root."""
    found = [folder for package in PACKAGES for folder in (ROOT / package, *(ROOT / package).rglob("*/"))]
    return sorted(
        folder.relative_to(ROOT) for folder in found if any(folder.glob("*.py")) or (folder / "README.md").exists()
    )


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""


def test_the_top_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_a_readme(package: str) -> None:
    assert (ROOT / package / "README.md").is_file()


@pytest.mark.parametrize("folder", folders(), ids=str)
def test_every_folder_is_named_in_the_readme_above(folder: Path) -> None:
    """The README above is the README of the nearest parent folder that has one."""
    readme = next(path for parent in folder.parents if (path := ROOT / parent / "README.md").is_file())
    named = re.search(rf"(?<!\w){re.escape(folder.name)}/", readme.read_text())
    assert named is not None, f"{readme.relative_to(ROOT)} has no line for {folder}/"
