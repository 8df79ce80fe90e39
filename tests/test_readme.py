"""What the README says is true: its example runs, its flag table and its map are current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""


def test_the_flag_table_is_current() -> None:
    made = subprocess.run([sys.executable, "-m", "api", "flags"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() in README


def test_every_module_is_on_the_map() -> None:
    names = {path.name for package in ("engine", "api", "bench") for path in (ROOT / package).iterdir()}
    modules = {name for name in names if not name.startswith("_") and name not in ("py.typed", "out")}
    assert {name for name in modules if name not in README} == set()
